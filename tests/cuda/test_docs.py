"""What docs/cuda.md and the headers of kernels promise to a reader is there."""

import re
from pathlib import Path

import pytest

from deltanet_ref.backends.cuda.device import KERNELS

PAGE = Path(__file__).parents[2] / "docs" / "cuda.md"
SOURCES = sorted(KERNELS.glob("*.cu"))
ENTRY_POINT = re.compile(r'extern "C" __global__ void(?:\s+__launch_bounds__\([^)]*\))?\s+(\w+)\(')


def header(source: Path) -> str:
    """The comment at the top of a file."""
    lines = source.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("//"))
    return "\n".join(lines[:end])


def rows() -> dict:
    """(file, entry point) -> cells of the table of floors and predictions."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in PAGE.read_text().splitlines() if "|" in line]
    return {(c[0].strip("`"), c[1].strip("`")): c[2:] for c in cells if len(c) == 5 and c[0].endswith(".cu`")}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_a_header_states_design_floors_and_versions(source):
    for word in (r"Design\b", r"Floors?\b", r"Versions\b"):
        assert re.search(rf"^// {word}", header(source), re.M), f"{source.name} has no {word}"


def test_every_kernel_has_a_floor_and_a_prediction():
    entry_points = {(source.name, name) for source in SOURCES for name in ENTRY_POINT.findall(source.read_text())}
    assert set(rows()) == entry_points
    for kernel, (floor, predicted, _) in rows().items():
        least = 0.0 if floor == "below 1" else float(floor.replace(",", ""))
        assert least < float(predicted.replace(",", "")), kernel


def test_the_map_names_every_file_of_kernels():
    text = PAGE.read_text().partition("## Floors")[0]
    assert [path.name for path in sorted(KERNELS.iterdir()) if f"`{path.name}`" not in text] == []


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text())
    assert links and [link for link in links if not (PAGE.parent / link).exists()] == []
