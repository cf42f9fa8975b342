"""The expected values of a case: from the committed vectors, or computed from the definition in float64."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deltanet_ref.formats.safetensors import read_safetensors
from deltanet_ref.oracle.cases import CASES, Case, make_inputs
from deltanet_ref.oracle.chunk_by_chunk import INTERMEDIATES, chunk_by_chunk
from deltanet_ref.oracle.noise import floors, scales
from deltanet_ref.oracle.operators import OPERATORS, in_dtype

VECTORS = Path(__file__).parent / "vectors"
SAMPLES = 48  # tokens, about, for which a sampled case holds expected values


class Expected(NamedTuple):
    """Expected values of a case, and how accurate an implementation can be (noise.py)."""

    values: dict  # output, gradient or intermediate -> float64 array
    scales: dict  # the same names -> float64 array over the leading axes
    floors: dict  # the same names -> {"float32": floor, "bfloat16": floor}
    sample: np.ndarray | None  # tokens that per-token values are given for; None: all

    def tensors(self) -> dict[str, np.ndarray]:
        """The arrays of a vector file: each value, NAME.scale and NAME.floor (float32's, bfloat16's or 0)."""
        tensors = {}
        for name, value in self.values.items():
            floor = [self.floors[name]["float32"], self.floors[name].get("bfloat16", 0.0)]
            tensors |= {
                name: value,
                f"{name}.scale": self.scales[name].astype(np.float32),
                f"{name}.floor": np.array(floor, np.float32),
            }
        return tensors


def compute(case: Case, x: dict | None = None) -> Expected:
    """Compute the expected values of a case; x: other inputs for it, of the form that make_inputs returns."""
    x = in_dtype(make_inputs(case) if x is None else x, np.float64)
    if case.options.get("head_order"):
        x = x | {"head_order": case.options["head_order"]}
    y = OPERATORS[case.op].reference(x)
    if case.options.get("intermediates"):
        chunks = chunk_by_chunk(x)
        y = y | {name: chunks[name] for name in INTERMEDIATES}
    scale = scales(case, x, y)
    expected = Expected(y, scale, floors(case, x, y, scale), None)
    return _sampled(case, expected) if case.options.get("sampled") else expected


def _sampled(case, expected):
    """Keep only some tokens of whatever has a token axis: the first and last two, and others evenly spaced."""
    L = case.sizes["L"]
    sample = np.unique([0, 1, *(n * L // SAMPLES for n in range(SAMPLES)), L - 2, L - 1])
    axes = OPERATORS[case.op].outputs | OPERATORS[case.op].gradients
    values, scale = (
        {name: a[:, sample] if axes[name][:2] == "st" else a for name, a in table.items()}
        for table in (expected.values, expected.scales)
    )
    return Expected(values, scale, expected.floors, sample)


@functools.lru_cache(None)
def expected(case: Case) -> Expected:
    """The expected values of a case from the committed vectors; computed for a case that is not in the table."""
    if CASES.get(case.id) != case:
        return compute(case)
    entries, tensors = _group(case.group)
    entry = entries[case.id]
    values, scale, floor = {}, {}, {}
    for name, facts in entry["tensors"].items():
        if facts["role"] in ("output", "gradient", "intermediate"):
            values[name] = tensors[f"{case.id}/{name}"]
            scale[name] = tensors[f"{case.id}/{name}.scale"].astype(np.float64)
            floor[name] = dict(zip(("float32", "bfloat16"), tensors[f"{case.id}/{name}.floor"].tolist()))
    return Expected(values, scale, floor, np.array(entry["sample"]) if "sample" in entry else None)


@functools.lru_cache(None)
def _group(group):
    metadata = json.loads((VECTORS / f"{group}.json").read_text("utf-8"))
    return {entry["id"]: entry for entry in metadata["cases"]}, read_safetensors(VECTORS / metadata["file"])
