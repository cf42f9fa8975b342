"""NVRTC compiles every kernel that a model launches for every kind of card, without spills, within the card's limits;
registers and shared memory are those of the committed table resources.json (python -m tests.cuda.resources)."""

import json
import os

import pytest

from tests.cuda import resources

if os.environ.get("CI") != "true":
    pytest.importorskip("cupy", reason="NVRTC comes with the extra cuda13")
    pytest.importorskip("nvidia", reason="NVRTC's headers come with the extra cuda13")


@pytest.fixture(scope="module")
def table():
    return json.loads(resources.TABLE.read_text())


def test_the_table_has_every_kernel_that_a_model_launches(table):
    launched = {
        resources.key(file, name, macros): row
        for (file, macros), entries in resources.dry_run().items()
        for name, row in entries.items()
    }
    assert set(launched) == set(table["kernels"])
    for name, (threads, shared) in launched.items():
        row = table["kernels"][name]
        assert (row["threads"], row["dynamic_shared"]) == (threads, shared), name


def test_no_kernel_spills_and_every_launch_fits_its_card(table):
    assert resources.problems(table["kernels"]) == []


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_kernels_compile_to_what_the_table_says(table, architecture):
    measured = resources.measure([architecture])
    assert resources.problems(measured) == []
    if resources.version() != table["nvrtc"]:
        pytest.skip(f"registers are those of NVRTC {table['nvrtc']}, this is {resources.version()}")
    name = f"sm_{architecture}"
    assert {kernel: row[name] for kernel, row in measured.items()} == {
        kernel: row[name] for kernel, row in table["kernels"].items()
    }
