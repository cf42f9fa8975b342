"""Two traces side by side in network order: where they part first, and why. And how a model drifts from itself."""
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.oracle.reasons import CHUNKS, HEADS, Site, explain
from deltanet_ref.oracle.trace import order_value_heads

# The RMS error of a tensor, relative to its RMS, that two correct implementations may have. Measured between this one
# and HF's over 150 tokens of the test models (float32: 1.3e-6 forward, 1.3e-5 backward; float64: 1.4e-14), with room
# for models that are six times as deep; float16 and bfloat16: eight units of their 11 and 8 bits.
TOLERANCE = {"float64": 1e-11, "float32": 3e-5, "float16": 4e-3, "bfloat16": 3e-2}
GRADIENT = 10                 # times as much for gradients
ROW = 10                      # times as much for a single row; measured: 1e-5 at worst forward, 1.6e-4 backward
FAILED = ("DIFF", "SHAPE", "NONFINITE")


class Row(NamedTuple):
    """One tensor of ours against theirs."""
    name: str
    status: str               # ok DIFF SHAPE MISSING NONFINITE
    meaning: str
    error: float | None = None       # RMS of the difference, relative to our RMS
    worst: float | None = None       # that of the worst row, a token or a token and a head
    largest: float | None = None     # largest difference of two values
    token: int | None = None         # the first row that is off
    head: int | None = None
    where: str = ""                  # which tokens and heads are off, or which shapes there are


@dataclass
class Comparison:
    rows: list                # of Row, in network order
    unknown: list             # names of theirs that no trace of this model has
    tolerance: float
    partial: bool             # what theirs lacks is no failure
    reasons: list             # sentences about the first that diverges, the likeliest first

    def first(self):
        """The first Row that is DIFF, SHAPE or NONFINITE, or None."""
        return next((row for row in self.rows if row.status in FAILED), None)

    def count(self, status):
        return sum(row.status == status for row in self.rows)

    def equal(self):
        return self.first() is None and (self.partial or not self.count("MISSING"))


def compare(ours, theirs, tolerance=None, partial=False):
    """Walks two Traces of the same tokens in network order -> Comparison.

    tolerance  of the RMS error of a forward tensor; None for that of the coarser dtype of the two
    partial    theirs may lack tensors
    raises     InputError when they are of other tokens or another shape of model, or have no tensor in common
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
            rows.append(_compare(traced, x, y, _allowed(name, tolerance)))
        else:
            transposed = ": its axes are transposed" if sorted(x.shape) == sorted(y.shape) else ""
            rows.append(Row(name, "SHAPE", traced.meaning, where=f"{y.shape} where {x.shape} belongs{transposed}"))
    result = Comparison(rows, sorted(set(theirs.tensors) - set(ours.table())), tolerance, partial, [])
    if result.count("MISSING") == len(rows):
        raise InputError("the two traces have no tensor in common; docs/trace.md lists the names")
    first = result.first()
    if first and first.status == "DIFF":
        def get(name):
            return _read(ours, table[name]).astype(np.float64)

        site = Site(table[first.name], get(first.name), _read(theirs, table[first.name]).astype(np.float64),
                    ours.config, np.array(ours.tokens), get)
        result.reasons = explain(site, _allowed(first.name, tolerance))
    return result


def _check_comparable(ours, theirs):
    if ours.tokens != theirs.tokens:
        raise InputError(f"the traces are of different tokens ({len(ours.tokens)}: {str(ours.tokens)[:40]}... and "
                         f"{len(theirs.tokens)}: {str(theirs.tokens)[:40]}...): trace both with the same")
    if ours.config.layer_types != theirs.config.layer_types:
        raise InputError(f"the traces are of different models: the layers are {', '.join(ours.config.layer_types)} and "
                         f"{', '.join(theirs.config.layer_types)}")


def _tolerance(dtype):
    if dtype not in TOLERANCE:
        raise InputError(f"no tolerance is known for the dtype {dtype!r} of a trace: give one, or write one of "
                         f"{', '.join(TOLERANCE)} in its metadata")
    return TOLERANCE[dtype]


def _allowed(name, tolerance):
    return tolerance * (GRADIENT if name.startswith("d.") else 1)


def _read(trace, traced):
    """The tensor in the table's shape and with grouped value heads, if it can be brought to it.

    Axes of 1 may be there or not, and features of heads may stand in one axis, (L, H d) for (L, H, d).
    """
    x, shape = np.asarray(trace.tensors[traced.name]), traced.shape
    merged = (*shape[:1], int(np.prod(shape[1:])))
    if any([n for n in x.shape if n > 1] == [n for n in form if n > 1] for form in (shape, merged)):
        x = x.reshape(shape)
        if trace.head_order == "tiled":
            x = order_value_heads(x, traced, trace.config, to="grouped")
    return x


def _compare(traced, x, y, tolerance):
    """The Row of two arrays of one shape. A row of them is a token, or a head of one; of a parameter, an output."""
    axes = [a for a in traced.axes if a in ("L", "K-1", *HEADS)] if traced.axes else ["row"] * (x.ndim - 1)
    rows = x.shape[:len(axes)]
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
    """x / size; 0 / 0 is 0, and what is not a number is infinite: it must not pass."""
    ratio = np.where(x == 0, 0.0, x / np.where(size == 0, np.finfo(np.float32).tiny, size))
    return np.where(np.isnan(ratio), np.inf, ratio)


def _place(bad, axes, rows):
    """Where the rows are that are off: token and head of the first, and which they are in words."""
    if not rows:
        return {}
    first, words = np.argwhere(bad)[0].tolist(), []
    for axis, (letter, size) in enumerate(zip(axes, rows)):
        what = "head" if letter in HEADS else "row" if letter in ("row", "K-1") else "token"
        members = np.flatnonzero(bad.any(tuple(i for i in range(bad.ndim) if i != axis)))
        if len(members) < size:
            words.append(_members(what, members, size))
    place = dict(zip(axes, first))
    return dict(token=place.get("L"), head=next((place[a] for a in axes if a in HEADS), None),
                where=", ".join(words) or "everywhere")


def _members(what, members, size):
    """Some of 0 .. size - 1 in words; where they begin may tell of chunks."""
    first, last = int(members[0]), int(members[-1])
    if len(members) == 1:
        return f"{what} {first} alone" + (", the last" if first == size - 1 else "")
    if len(members) < last + 1 - first:
        return f"{len(members)} of {size} {what}s from {first} to {last}"
    chunk = max((C for C in CHUNKS if first % C == 0), default=None) if what == "token" and first else None
    return f"{what}s {first} to {last}" + (f" ({first} is a multiple of {chunk})" if chunk else "")


# ---- a model against itself

class Drift(NamedTuple):
    """How far one layer's output is from what it should equal, as RMS relative to RMS."""
    layer: str                # "blk.0", "output_norm"
    kind: str                 # of the layer
    decode: float             # one token per call against all at once, float32
    decode_token: int         # where that is worst
    state: float | None       # the states after the last token: conv and S, or the KV cache
    dtype: float              # float32 against float64, all at once
    dtype_token: int


def drift(narrow, wide, tokens):
    """Runs tokens (L,) through the float32 model all at once and one by one, and through the float64 model.

    Returns a list of Drift, one for each layer and the last norm. Raises InputError for no tokens.
    """
    tokens = np.asarray(tokens)
    at_once, state = _outputs(narrow, [tokens])
    one_by_one, stepped = _outputs(narrow, tokens[:, None])
    exact, _ = _outputs(wide, [tokens])
    rows = []
    for i, name in enumerate(exact):
        last = i == len(narrow.layers)
        decode, dtype = _drift(one_by_one[name], at_once[name]), _drift(at_once[name], exact[name])
        held = None if last else max(_drift(x, y)[0] for x, y in zip(stepped.blocks[i], state.blocks[i]))
        kind = "" if last else narrow.config.layer_types[i]
        rows.append(Drift(name.removesuffix(".out"), kind, *decode, held, *dtype))
    return rows


def _outputs(model, pieces):
    """What each block and the last norm give when pieces are read in turn: dict name -> (L, D); and the last state."""
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
