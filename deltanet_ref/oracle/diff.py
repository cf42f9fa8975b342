"""Compares two traces in network order and explains the first divergence; measures how a model drifts from itself."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError, shown
from deltanet_ref.oracle.reasons import CHUNKS, HEADS, Site, explain
from deltanet_ref.oracle.trace import Trace, order_value_heads

# The RMS error of a tensor, relative to its RMS, that two correct implementations may have. Measured between this one
# and HF's over 150 tokens of the test models (float32: 1.3e-6 forward, 1.3e-5 backward; float64: 1.4e-14), with a
# margin for models six times as deep; float16 and bfloat16: eight units in the last place of 11 and 8 bits.
TOLERANCE = {"float64": 1e-11, "float32": 3e-5, "float16": 4e-3, "bfloat16": 3e-2}
GRADIENT = 10  # factor for gradients
ROW = 10  # factor for a single row; measured: at most 1e-5 forward, 1.6e-4 backward
FAILED = ("DIFF", "SHAPE", "NONFINITE")


class Row(NamedTuple):
    """The comparison of one tensor, ours with theirs."""

    name: str
    status: str  # ok DIFF SHAPE MISSING NONFINITE
    meaning: str
    error: float | None = None  # RMS of the difference, relative to our RMS
    worst: float | None = None  # the same for the worst row: a token, or a head of a token
    largest: float | None = None  # largest absolute difference
    token: int | None = None  # of the first row that differs
    head: int | None = None
    where: str = ""  # which tokens and heads differ; or the two shapes


@dataclass
class TraceDiff:
    """The result of diff_traces."""

    rows: list[Row]  # in network order
    unknown: list[str]  # names in theirs that no trace of this model has
    tolerance: float  # of the relative RMS error of a forward tensor
    partial: bool  # tensors may be missing in theirs
    reasons: list[str]  # sentences that explain the first divergence, most likely first

    def first(self) -> Row | None:
        """The first Row with status DIFF, SHAPE or NONFINITE, or None."""
        return next((row for row in self.rows if row.status in FAILED), None)

    def count(self, status: str) -> int:
        """Number of rows with this status."""
        return sum(row.status == status for row in self.rows)

    def equal(self) -> bool:
        """True when no tensor differs and none is missing, unless that is allowed."""
        return self.first() is None and (self.partial or not self.count("MISSING"))


def diff_traces(ours: Trace, theirs: Trace, tolerance: float | None = None, partial: bool = False) -> TraceDiff:
    """Compare two traces of the same tokens, tensor by tensor in network order.

    tolerance  allowed relative RMS error of a forward tensor; None: TOLERANCE of the coarser dtype of the two
    partial    True allows tensors to be missing in theirs
    raises     InputError for different tokens or layer types, an unknown dtype, or no tensor in common
    """
    _check_comparable(ours, theirs)
    tolerance = max(_tolerance(ours.dtype), _tolerance(theirs.dtype)) if tolerance is None else tolerance
    table = {name: traced for name, traced in ours.table().items() if name in ours.tensors}
    rows = []
    for name, traced in table.items():
        if name not in theirs.tensors:
            rows.append(Row(name, "MISSING", traced.meaning))
            continue
        x, y = _read(ours, traced), _read(theirs, traced)
        if x.shape == y.shape:
            rows.append(_diff_tensor(traced, x, y, _allowed(name, tolerance)))
        else:
            transposed = ": the axes are transposed" if sorted(x.shape) == sorted(y.shape) else ""
            rows.append(Row(name, "SHAPE", traced.meaning, where=f"{y.shape} instead of {x.shape}{transposed}"))
    result = TraceDiff(rows, sorted(set(theirs.tensors) - set(ours.table())), tolerance, partial, [])
    if result.count("MISSING") == len(rows):
        raise InputError("the two traces have no tensor in common; docs/trace.md lists the names")
    first = result.first()
    if first and first.status == "DIFF":

        def get(name):
            return _read(ours, table[name]).astype(np.float64)

        site = Site(
            table[first.name],
            get(first.name),
            _read(theirs, table[first.name]).astype(np.float64),
            ours.config,
            np.array(ours.tokens),
            get,
        )
        result.reasons = explain(site, _allowed(first.name, tolerance))
    return result


def _check_comparable(ours, theirs):
    if ours.tokens != theirs.tokens:
        raise InputError(
            f"the traces are of different tokens ({len(ours.tokens)}: {str(ours.tokens)[:40]}... and "
            f"{len(theirs.tokens)}: {str(theirs.tokens)[:40]}...): trace both with the same tokens"
        )
    if ours.config.layer_types != theirs.config.layer_types:
        raise InputError(
            f"the traces are of different models: the layers are {', '.join(ours.config.layer_types)} and "
            f"{', '.join(theirs.config.layer_types)}"
        )


def _tolerance(dtype):
    if dtype not in TOLERANCE:
        raise InputError(
            f"a trace has the dtype {shown(dtype)}, for which there is no default tolerance: give a "
            f"tolerance, or write one of {', '.join(TOLERANCE)} as dtype in its metadata"
        )
    return TOLERANCE[dtype]


def _allowed(name, tolerance):
    return tolerance * (GRADIENT if name.startswith("d.") else 1)


def _read(trace, traced):
    """The tensor in the table's shape with grouped value heads; unchanged if its shape does not fit.

    Axes of size 1 may be added or missing, and heads merged with their features: (L, H d) for (L, H, d).
    """
    x, shape = np.asarray(trace.tensors[traced.name]), traced.shape
    merged = (*shape[:1], int(np.prod(shape[1:])))
    if any([n for n in x.shape if n > 1] == [n for n in form if n > 1] for form in (shape, merged)):
        x = x.reshape(shape)
        if trace.head_order == "tiled":
            x = order_value_heads(x, traced, trace.config, to="grouped")
    return x


def _diff_tensor(traced, x, y, tolerance):
    """Compare two arrays of one shape -> Row. Their rows are tokens or heads of tokens; outputs, for a parameter."""
    axes = [a for a in traced.axes if a in ("L", "K-1", *HEADS)] if traced.axes else ["row"] * (x.ndim - 1)
    rows = x.shape[: len(axes)]
    x, y = (z.reshape(*rows, -1).astype(np.result_type(x, y, np.float32), copy=False) for z in (x, y))
    with np.errstate(all="ignore"):
        difference = np.abs(x - y)
        off, size = np.linalg.norm(difference, axis=-1), np.linalg.norm(x, axis=-1)
        error = _ratio(np.linalg.norm(off), np.linalg.norm(size))
        row_errors = _ratio(off, np.maximum(size, np.sqrt(np.mean(size * size))))
    finite = np.isfinite(y).all(-1)
    if not finite.all():
        return Row(traced.name, "NONFINITE", traced.meaning, **_place(~finite, axes, rows))
    numbers = dict(error=float(error), worst=float(row_errors.max()), largest=float(difference.max()))
    if error <= tolerance and numbers["worst"] <= ROW * tolerance:
        return Row(traced.name, "ok", traced.meaning, **numbers)
    bad = row_errors > min(ROW * tolerance, numbers["worst"] / 2)
    return Row(traced.name, "DIFF", traced.meaning, **numbers, **_place(bad, axes, rows))


def _ratio(x, size):
    """x / size, with 0 / 0 = 0; NaN becomes inf, so that it fails every limit."""
    ratio = np.where(x == 0, 0.0, x / np.where(size == 0, np.finfo(np.float32).tiny, size))
    return np.where(np.isnan(ratio), np.inf, ratio)


def _place(bad, axes, rows):
    """The location of the bad rows: token and head of the first, and all of them in words."""
    if not rows:
        return {}
    first, words = np.argwhere(bad)[0].tolist(), []
    for axis, (letter, size) in enumerate(zip(axes, rows)):
        what = "head" if letter in HEADS else "row" if letter in ("row", "K-1") else "token"
        members = np.flatnonzero(bad.any(tuple(i for i in range(bad.ndim) if i != axis)))
        if len(members) < size:
            words.append(_members(what, members, size))
    place = dict(zip(axes, first))
    return dict(
        token=place.get("L"),
        head=next((place[a] for a in axes if a in HEADS), None),
        where=", ".join(words) or "everywhere",
    )


def _members(what, members, size):
    """Some of 0 .. size - 1 in words; a start at a multiple of a chunk length is pointed out."""
    first, last = int(members[0]), int(members[-1])
    if len(members) == 1:
        return f"{what} {first} only" + (", the last" if first == size - 1 else "")
    if len(members) < last + 1 - first:
        return f"{len(members)} of {size} {what}s from {first} to {last}"
    chunk = max((C for C in CHUNKS if first % C == 0), default=None) if what == "token" and first else None
    return f"{what}s {first} to {last}" + (f" ({first} is a multiple of {chunk})" if chunk else "")


# ---- a model compared with itself


class Drift(NamedTuple):
    """Relative RMS errors of one layer's output between two ways of computing it."""

    layer: str  # "blk.0", "output_norm"
    kind: str  # of the layer
    decode: float  # one token per call against one prefill, float32
    decode_token: int  # the token where that is largest
    state: float | None  # the states after the last token: conv and S, or the KV cache
    dtype: float  # float32 against float64, one prefill each
    dtype_token: int


def drift(narrow, wide, tokens: np.ndarray) -> list[Drift]:
    """Compare decode with prefill, and float32 with float64, layer by layer over tokens (L,).

    narrow, wide  one model loaded in float32 and in float64
    returns       one Drift per layer, and one for the final norm
    raises        InputError for no tokens
    """
    tokens = np.asarray(tokens)
    prefilled, state = _outputs(narrow, [tokens])
    decoded, stepped = _outputs(narrow, tokens[:, None])
    exact, _ = _outputs(wide, [tokens])
    rows = []
    for i, name in enumerate(exact):
        last = i == len(narrow.layers)
        decode, dtype = _drift(decoded[name], prefilled[name]), _drift(prefilled[name], exact[name])
        held = None if last else max(_drift(x, y)[0] for x, y in zip(stepped.blocks[i], state.blocks[i]))
        kind = "" if last else narrow.config.layer_types[i]
        rows.append(Drift(name.removesuffix(".out"), kind, *decode, held, *dtype))
    return rows


def _outputs(model, pieces):
    """Outputs of each block and the final norm over consecutive pieces: dict name -> (L, D); and the final state."""
    found, state = {}, None

    def record(name, array):
        if name.endswith(".out") or name == "output_norm":
            found.setdefault(name, []).append(np.array(array[0]))

    twin = model.observed(record)
    for piece in pieces:
        _, state = twin.prefill(piece, state)
    return {name: np.concatenate(parts) for name, parts in found.items()}, state


def _drift(x, y):
    """RMS error of x relative to y's RMS, and the first index at which it is largest."""
    off = np.linalg.norm((x - y).reshape(len(y), -1), axis=1)
    error = _ratio(np.linalg.norm(off), np.linalg.norm(y))
    return float(error), int(np.argmax(np.where(np.isnan(off), np.inf, off)))
