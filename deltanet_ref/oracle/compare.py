"""Compares an implementation's outputs with the expected ones: status and error per output, and the first bad place."""

from typing import NamedTuple

import numpy as np

from deltanet_ref.oracle.cases import CHUNK, Case
from deltanet_ref.oracle.chunk_by_chunk import BACKWARD, FORWARD
from deltanet_ref.oracle.expected import Expected
from deltanet_ref.oracle.noise import FACTOR, FLOAT64_PER_FLOAT32, relative_error
from deltanet_ref.oracle.operators import OPERATORS

# the order in which a kernel computes them; a wrong stage makes the later ones wrong too
DELTA_PIPELINE = (*FORWARD, "o", "S_end", *BACKWARD, "dq", "dv", "dbeta", "dk", "dg", "dS0")
SEQUENTIAL = ({"S": 1, "V_new": 1, "o": 1}, {"dV_new": -1, "dS": -1})  # computed chunk by chunk, in this direction
STRICTLY_LOWER = ("dA", "dT")  # A and T are constant on and above the diagonal, where these mean nothing


def pipeline(op: str) -> tuple[str, ...]:
    """Names of an operator's outputs, gradients and intermediates, in the order in which a kernel computes them."""
    return DELTA_PIPELINE if op == "gated_delta_rule" else (*OPERATORS[op].outputs, *OPERATORS[op].gradients)


class Stage(NamedTuple):
    """The verdict on one output of one case."""

    status: str  # ok, DIFF, SHAPE, MISSING, NONFINITE
    error: float  # multiple of the noise floor; inf when not finite, nan when not comparable
    first_bad: dict | None  # sequence, chunk, token, head of the first bad element that the pass computes
    message: str = ""


class CaseResult(NamedTuple):
    """The verdict on one case."""

    case: Case
    status: str  # of the first bad stage (ok, DIFF, SHAPE, MISSING, NONFINITE); or ERROR, TIMEOUT, SKIP
    stages: dict  # name -> Stage in pipeline order; empty when the implementation returned nothing
    outputs: dict  # name -> array in the kit's own layout
    expected: Expected | None
    message: str = ""

    @property
    def first_bad(self):
        """The first bad stage in pipeline order and its first bad place; None when all are ok.

        Stages computed chunk by chunk are ordered by chunk first: V_new of chunk 0 comes before S of chunk 1.
        """
        bad = {name: stage.first_bad or {} for name, stage in self.stages.items() if stage.status != "ok"}
        if not bad:
            return None
        first = next(iter(bad))
        for direction in SEQUENTIAL:
            if first in direction:
                placed = [name for name in bad if name in direction and bad[name]]
                first = min(
                    placed,
                    default=first,
                    key=lambda name: (bad[name]["sequence"], direction[name] * bad[name]["chunk"]),
                )
        return {"output": first, **dict.fromkeys(("sequence", "chunk", "token", "head"))} | bad[first]


def compare_case(
    case: Case, expected: Expected, outputs: dict[str, np.ndarray], *, dtype: str, gradients: bool
) -> CaseResult:
    """Compare the outputs of one case, name -> array in the kit's own layout, with the expected values.

    dtype      "float32", "bfloat16" or "float64": the noise floor that errors are measured in
    gradients  True: every gradient is required; False: none is compared
    Intermediates are compared where both sides have them.
    """
    op = OPERATORS[case.op]
    required = [*op.outputs, *(op.gradients if gradients else ())]
    names = [
        name
        for name in pipeline(case.op)
        if name in required or (name in outputs and name in expected.values and name not in op.gradients)
    ]
    axes = {"S": "schff", "dS": "schff"} | op.outputs | op.gradients
    stages = {name: _stage(case, name, axes.get(name, "sthf"), outputs.get(name), expected, dtype) for name in names}
    status = next((stage.status for stage in stages.values() if stage.status != "ok"), "ok")
    return CaseResult(case, status, stages, outputs, expected)


def _stage(case, name, axes, got, expected, dtype):
    want = expected.values[name]
    sampled = expected.sample is not None and axes[:2] == "st"
    if got is None:
        return Stage("MISSING", np.nan, None, "is missing")
    shape = full_shape(case, want, sampled)
    if shape == () and got.size == 1:
        got = got.reshape(())  # files store a number as (1,)
    if got.shape != shape and name not in OPERATORS[case.op].gradients:
        got = _token_major(got, shape)
    if got.shape != shape:
        return Stage("SHAPE", np.nan, None, f"has shape {got.shape}; it must be {shape}")
    if got.dtype.kind != "f":
        return Stage("SHAPE", np.nan, None, f"has dtype {got.dtype}; it must be a float type")
    if sampled:
        got = got[:, expected.sample]
    if name in STRICTLY_LOWER:
        row = np.arange(got.shape[1]) % CHUNK
        got = np.where(np.arange(CHUNK) < row[:, None, None], got, want)
    error = noise_multiples(got, want, expected, name, dtype)
    bad = error > FACTOR[dtype]
    worst = float(np.max(error, initial=0.0))
    if not bad.any():
        return Stage("ok", worst, None)
    where = first_bad(bad, axes, case, expected.sample if sampled else None, backward=name.startswith("d"))
    return Stage("DIFF" if np.isfinite(got).all() else "NONFINITE", worst, where)


def noise_multiples(got: np.ndarray, want: np.ndarray, expected: Expected, name: str, dtype: str) -> np.ndarray:
    """|got - want| elementwise, as a multiple of this output's noise floor; inf where got is not finite."""
    precision = "bfloat16" if dtype == "bfloat16" else "float32"
    ratio = FLOAT64_PER_FLOAT32 if dtype == "float64" else 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        error = relative_error(got, want, expected.scales[name]) / (expected.floors[name][precision] * ratio)
    return np.where(np.isfinite(got), error, np.inf)


def full_shape(case, want, sampled):
    """The shape that an output must have: all tokens, although a sampled case expects values only for some."""
    return (want.shape[0], case.sizes["L"], *want.shape[2:]) if sampled else want.shape


def first_bad(bad, axes, case, sample, backward):
    """sequence, chunk, token, head of the first bad element; None for an axis that the output does not have.

    The order is by sequence, then token in the order of the pass (a backward pass starts at the last one), then head.
    """
    for axis in reversed([axis for axis, letter in enumerate(axes[: bad.ndim]) if letter == "f"]):
        bad = bad.any(axis)
    letters = axes.replace("f", "")[: bad.ndim]
    places = np.argwhere(bad)
    if not letters:
        return {}
    columns = {letter: places[:, axis] for axis, letter in enumerate(letters)}
    if "t" in columns:
        if sample is not None:
            columns["t"] = np.asarray(sample)[columns["t"]]
        if case.options.get("lengths"):
            starts = np.cumsum([0, *case.options["lengths"]])
            columns["s"] = np.searchsorted(starts, columns["t"], side="right") - 1
            columns["t"] = columns["t"] - starts[columns["s"]]
    order = [columns[letter] * (-1 if letter in "ct" and backward else 1) for letter in "scth" if letter in columns]
    first = np.lexsort(order[::-1])[0]
    place = {letter: int(column[first]) for letter, column in columns.items()}
    return {
        "sequence": place.get("s"),
        "chunk": place["t"] // CHUNK if "t" in place else place.get("c"),
        "token": place.get("t"),
        "head": place.get("h"),
    }


def _token_major(got, shape):
    """Accept intermediates of shape (B, H_v, N, C, ...) or (B, N, H_v, C, ...) too, with the last chunk padded."""
    if len(shape) < 3 or got.ndim != len(shape) + 1:
        return got
    B, L, H = shape[:3]
    N = -(-L // CHUNK)
    if got.shape[:4] == (B, H, N, CHUNK):
        got = got.swapaxes(1, 2)
    if got.shape[:4] != (B, N, H, CHUNK) or got.shape[4:] != shape[3:]:
        return got
    return got.swapaxes(2, 3).reshape(B, N * CHUNK, H, *shape[3:])[:, :L]
