"""One implementation's answers against the expected ones: status and error per stage, and the first bad place."""
from typing import NamedTuple

import numpy as np

from deltanet_ref.oracle.cases import CHUNK, Case
from deltanet_ref.oracle.chunk_by_chunk import BACKWARD, FORWARD
from deltanet_ref.oracle.expected import Expected
from deltanet_ref.oracle.noise import FACTOR, relative_error
from deltanet_ref.oracle.operators import OPERATORS

# the order in which a kernel makes them; a wrong stage spoils those after it
DELTA_PIPELINE = (*FORWARD, "o", "S_end", *BACKWARD, "dq", "dv", "dbeta", "dk", "dg", "dS0")
WALKS = ({"S": 1, "V_new": 1, "o": 1}, {"dV_new": -1, "dS": -1})           # made chunk after chunk, in this direction
STRICTLY_LOWER = ("dA", "dT")              # A and T are constant on the diagonal and above: gradients there mean nothing
FLOAT32_SHARE_OF_FLOAT64 = 2.0 ** -29                                      # ratio of the two unit roundoffs


def pipeline(op):
    """The names of an operator's outputs, gradients and intermediates, in the order in which a kernel makes them."""
    return DELTA_PIPELINE if op == "gated_delta_rule" else (*OPERATORS[op].outputs, *OPERATORS[op].gradients)


class Stage(NamedTuple):
    """One output of one case."""
    status: str               # ok, DIFF, SHAPE, MISSING, NONFINITE
    error: float              # multiple of the noise floor; inf when not finite, nan when it cannot be compared
    first_bad: dict | None    # sequence, chunk, token, head of the first bad element in pipeline order
    message: str = ""


class CaseResult(NamedTuple):
    case: Case
    status: str               # ok, DIFF, SHAPE, MISSING, NONFINITE of the first bad stage; ERROR, TIMEOUT, SKIP
    stages: dict              # name -> Stage in pipeline order; empty when nothing came back
    outputs: dict             # name -> array in the kit's own layout
    expected: Expected | None
    message: str = ""

    @property
    def first_bad(self):
        """The first bad stage in pipeline order and its first bad place; None when there is none.

        What is made chunk after chunk goes by chunks first: V_new of chunk 0 comes before S of chunk 1.
        """
        bad = {name: stage.first_bad or {} for name, stage in self.stages.items() if stage.status != "ok"}
        if not bad:
            return None
        first = next(iter(bad))
        for walk in WALKS:
            if first in walk:
                placed = [name for name in bad if name in walk and bad[name]]
                first = min(placed, default=first,
                            key=lambda name: (bad[name]["sequence"], walk[name] * bad[name]["chunk"]))
        return {"output": first, **dict.fromkeys(("sequence", "chunk", "token", "head"))} | bad[first]


def compare(case, expected, outputs, *, dtype, gradients):
    """CaseResult of the outputs, name -> array.

    gradients  True: every gradient must be there; False: none is judged
    Intermediates are judged where both sides have them.
    """
    op = OPERATORS[case.op]
    required = [*op.outputs, *(op.gradients if gradients else ())]
    names = [name for name in pipeline(case.op)
             if name in required or (name in outputs and name in expected.values and name not in op.gradients)]
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
        got = got.reshape(())                                              # files keep a number as (1,)
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


def noise_multiples(got, want, expected, name, dtype):
    """|got - want| in noise floors of this output of a case, elementwise; inf where got is not finite."""
    precision = "bfloat16" if dtype == "bfloat16" else "float32"
    share = FLOAT32_SHARE_OF_FLOAT64 if dtype == "float64" else 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        error = relative_error(got, want, expected.scales[name]) / (expected.floors[name][precision] * share)
    return np.where(np.isfinite(got), error, np.inf)


def full_shape(case, want, sampled):
    """The shape that an answer must have: of a sampled case only some tokens are expected, all are asked for."""
    return (want.shape[0], case.sizes["L"], *want.shape[2:]) if sampled else want.shape


def first_bad(bad, axes, case, sample, backward):
    """sequence, chunk, token, head of the first bad element: sequences in turn, tokens as the pass meets them (a
    backward pass meets the last one first), then heads. None for an axis that the output does not have.
    """
    for axis in reversed([axis for axis, letter in enumerate(axes[:bad.ndim]) if letter == "f"]):
        bad = bad.any(axis)
    letters = axes.replace("f", "")[:bad.ndim]
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
    return {"sequence": place.get("s"), "chunk": place["t"] // CHUNK if "t" in place else place.get("c"),
            "token": place.get("t"), "head": place.get("h")}


def _token_major(got, shape):
    """Intermediates may also come as (B, H_v, N, C, ...) or (B, N, H_v, C, ...), the last chunk filled up."""
    if len(shape) < 3 or got.ndim != len(shape) + 1:
        return got
    B, L, H = shape[:3]
    N = -(-L // CHUNK)
    if got.shape[:4] == (B, H, N, CHUNK):
        got = got.swapaxes(1, 2)
    if got.shape[:4] != (B, N, H, CHUNK) or got.shape[4:] != shape[3:]:
        return got
    return got.swapaxes(2, 3).reshape(B, N * CHUNK, H, *shape[3:])[:, :L]
