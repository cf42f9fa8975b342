"""NVRTC compiles every kernel that a model launches for every kind of card, without spills, within the card's limits;
registers and shared memory are those of the committed table resources.json (python -m tests.cuda.resources)."""

import os

import pytest

from tests.cuda import resources

if os.environ.get("CI") != "true":
    pytest.importorskip("cupy", reason="NVRTC comes with the extra cuda13")
    pytest.importorskip("nvidia", reason="NVRTC's headers come with the extra cuda13")


@pytest.fixture(scope="module")
def table():
    return resources.read()


def test_the_table_has_every_kernel_that_a_model_launches(table):
    launched = {
        resources.key(file, name, macros): row
        for (file, macros), entries in resources.dry_run().items()
        for name, row in entries.items()
    }
    _, kernels = table
    assert set(launched) == set(kernels)
    for name, (threads, shared) in launched.items():
        assert (kernels[name]["threads"], kernels[name]["dynamic_shared"]) == (threads, shared), name


def test_no_kernel_spills_and_every_launch_fits_its_card(table):
    assert resources.problems(table[1]) == []


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_kernels_compile_to_what_the_table_says(table, architecture):
    measured, (nvrtc, kernels) = resources.measure([architecture]), table
    assert resources.problems(measured) == []
    if resources.version() != nvrtc:
        pytest.skip(f"registers are those of NVRTC {nvrtc}, this is {resources.version()}")
    name = f"sm_{architecture}"
    assert [
        f"{kernel}: the table says {kernels[kernel][name]}, NVRTC {row[name]}"
        for kernel, row in measured.items()
        if row[name] != kernels[kernel][name]
    ] == []
