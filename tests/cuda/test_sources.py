"""Every kernel's header says what the kernel could reach at best, and docs/cuda.md leads to every kernel."""

import re
from pathlib import Path

import pytest

from deltanet_ref.backends.cuda.device import KERNELS

DOCS = Path(__file__).parents[2] / "docs" / "cuda.md"


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.cu")), ids=lambda path: path.name)
def test_headers_state_design_floor_and_versions(path):
    header = path.read_text("utf-8").partition("#include")[0]
    assert all(line.startswith("//") or not line for line in header.splitlines())
    for word in ("Floor", "Version"):
        assert re.search(rf"^// *{word}", header, re.M), f"{path.name} has no line that begins with {word}"
    assert "us" in header or "launch" in header, f"{path.name} predicts no time"


def test_the_documentation_names_every_kernel():
    text = DOCS.read_text("utf-8")
    assert [path.name for path in KERNELS.iterdir() if path.name not in text] == []
