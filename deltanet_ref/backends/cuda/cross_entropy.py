"""Cross-entropy of rows of logits, by itself and after a linear map: kernels/cross_entropy.cu.

Mathematics: docs/derivations/cross-entropy.md. The linear map goes tile by tile, TOKENS rows of x times BLOCK rows of
w; each block of w is read once. Losses are float32 arrays without axes, on the device.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.ops.cross_entropy import kept_rows
from deltanet_ref.ops.sequences import rounded

THREADS = 256  # of a block, which has one row
TOKENS, BLOCK = 2048, 2048  # rows and columns of a tile of logits: it stays in the L2 cache
ALIGNED = 8  # rows of a tile start at multiples of this
IGNORED = -1  # the label of an ignored row, for the kernels


class CrossEntropyCache(NamedTuple):
    """Kept by cross_entropy_forward; the probabilities are recomputed."""

    logits: object  # (n, V)
    labels: object  # (n,) int32, IGNORED where a row is
    peak: object  # (n,) float32: the largest logit of the row
    total: object  # (n,) float32: sum of exp(logit - peak)
    count: object  # () float32: the divisor of the loss, at least 1


class LinearCrossEntropyCache(NamedTuple):
    """Kept by linear_cross_entropy_forward. Only dw recomputes logits.

    n here and below is the number of kept rows, rounded up (ops.sequences): their shapes shall be few. The rows that
    fill up are ignored ones.
    """

    x: object  # (n, D)
    w: object  # (V, D)
    labels: object  # (n,) int32, IGNORED where a row is
    place: object  # (rows,) int32: which of the n a row is, -1 if it is ignored
    peak: object  # (n,) float32: the largest logit
    total: object  # (n,) float32: sum of exp(logit - peak)
    dx_row: object  # (n, D) float32: sum over v of softmax_v w_v - w_label; None without need_gradient
    count: object  # () float32: the divisor of the loss, at least 1


def cross_entropy_forward(device, logits, labels, *, ignore_index=-100, count=None):
    """loss (float32, without axes), cache: arguments and errors as ops.cross_entropy_forward."""
    _check(device, logits=logits)
    n, V = logits.shape
    labels, count = np.asarray(labels), _count(device, labels, n, V, ignore_index, count)
    logits = device.contiguous(logits)
    labels = device.upload(labels, np.int32, lambda labels: np.where(labels == ignore_index, IGNORED, labels))
    peak, total, surprise = (device.empty(n, np.float32) for _ in range(3))
    _launch(device, logits.dtype, "cross_entropy_forward", n, logits, labels, peak, total, surprise, V)
    return _mean(device, logits.dtype, surprise, count), CrossEntropyCache(logits, labels, peak, total, count)


def cross_entropy_backward(device, dloss, cache):
    """dlogits, in the dtype of logits: as ops.cross_entropy_backward."""
    logits, labels, peak, total, count = cache
    n, V = logits.shape
    dlogits = device.empty(logits.shape, logits.dtype)
    args = (logits, labels, peak, total, dlogits, V, float(dloss), count)
    _launch(device, logits.dtype, "cross_entropy_backward", n, *args)
    return dlogits


def linear_cross_entropy_forward(device, x, w, labels, *, ignore_index=-100, count=None, need_gradient=True):
    """loss (float32, without axes), cache: arguments and errors as ops.linear_cross_entropy_forward."""
    first = w[:1]
    _check(device, x=x, w=first)
    if first.shape[1] != x.shape[1]:
        raise InputError(f"x has {x.shape[1]} features and the rows of w {first.shape[1]}: w must be (V, {x.shape[1]})")
    count = _count(device, labels, len(x), len(w), ignore_index, count)
    x, labels, place = _kept(device, x, labels, ignore_index)
    n, D = x.shape
    peak, total, label_logit, surprise = (device.empty(n, np.float32) for _ in range(4))
    weighted = device.empty((n, D), np.float32) if need_gradient else None
    label_row = device.empty((n, D), x.dtype) if need_gradient else None
    tile = Tile(device, n, len(w), x.dtype)
    for block, rows in _blocks(device, w):
        for part in tile.parts():
            # 1  logits of the tile
            s = tile.logits(x[part], rows)
            # 2  s = exp(s - peak), total = sum_v s
            of_part = (None if a is None else a[part] for a in (peak, total, label_logit, weighted, label_row))
            columns = (block.start, len(rows), tile.stride)
            args = (tile.s, labels[part], rows, *of_part, tile.e, *columns, D)
            _launch(device, x.dtype, "linear_cross_entropy_tile", len(s), *args)
            # 3  weighted = sum_v s_v w_v
            if need_gradient:
                device.matmul(tile.results(s), rows, out=weighted[part], accumulate=block.start > 0)
    # 4..5  -log p, and in weighted E_softmax[w] - w_label: dx of one row
    args = (labels, peak, total, label_logit, label_row, weighted, surprise, D)
    _launch(device, x.dtype, "linear_cross_entropy_end", n, *args)
    loss = _mean(device, x.dtype, surprise, count)
    return loss, LinearCrossEntropyCache(x, w, labels, place, peak, total, weighted, count)


def linear_cross_entropy_backward(device, dloss, cache, need_dw=True):
    """dx in the dtype of x, dw float32 or None: as ops.linear_cross_entropy_backward."""
    x, w, labels, place, peak, total, dx_row, count = cache
    dloss, D = float(dloss), x.shape[1]
    # 5..1  loss = mean of -log softmax(x w^T)[label], with respect to x
    dx = device.empty((len(place), D), x.dtype)
    _launch(device, x.dtype, "linear_cross_entropy_dx", len(place), dx_row, place, dx, D, dloss, count)
    if not need_dw:
        return dx, None
    # 1  logits = x w^T, with respect to w
    dw = device.empty((len(w), D), np.float32)
    tile = Tile(device, len(x), len(w), x.dtype)
    if len(x) == 0:
        dw.fill(0)
    for block, rows in _blocks(device, w):
        for part in tile.parts():
            s = tile.logits(x[part], rows)
            of_part = (a[part] for a in (labels, peak, total))
            args = (tile.s, *of_part, tile.e, block.start, len(rows), tile.stride, dloss, count)
            _launch(device, x.dtype, "linear_cross_entropy_dlogits", len(s), *args)
            device.matmul(tile.results(s), x[part], transpose_a=True, out=dw[block], accumulate=part.start > 0)
    return dx, dw


class Tile:
    """Buffers for a tile of logits: s, float32, and e, what becomes of them as a factor of the next product."""

    def __init__(self, device, n, V, dtype):
        self.device, self.n = device, n
        self.stride = -(-min(V, BLOCK) // ALIGNED) * ALIGNED
        self.s = device.empty((min(n, TOKENS), self.stride), np.float32)
        self.e = device.empty(self.s.shape, dtype)

    def parts(self) -> Iterator[slice]:
        """The rows of x, TOKENS at a time."""
        return (slice(start, min(start + TOKENS, self.n)) for start in range(0, self.n, TOKENS))

    def logits(self, x, rows):
        """x rows^T, in s."""
        s = self.s[: len(x), : len(rows)]
        return self.device.matmul(x, rows, transpose_b=True, out=s)

    def results(self, s):
        """The part of e that belongs to the logits s."""
        return self.e[: s.shape[0], : s.shape[1]]


def _blocks(device, w):
    """Iterator over (slice, rows of w), BLOCK at a time."""
    for start in range(0, len(w), BLOCK):
        block = slice(start, min(start + BLOCK, len(w)))
        yield block, device.contiguous(w[block])


def _count(device, labels, n, V, ignore_index, count):
    """The divisor of the loss, on the device. Raises InputError as kept_rows."""
    kept_rows(labels, n, V, ignore_index, count)
    if count is not None:
        return device.upload(count, np.float32)
    return device.upload(labels, np.float32, lambda labels: max(np.count_nonzero(labels != ignore_index), 1))


def _kept(device, x, labels, ignore_index):
    """The kept rows of x, filled up with copies of the first one; their labels, IGNORED where a row fills up; for each
    row of x its place among them, or -1 if it is ignored."""

    def kept(labels):
        return np.flatnonzero(labels != ignore_index)

    def places(labels):
        place = np.full(len(labels), -1)
        place[kept(labels)] = np.arange(len(kept(labels)))
        return place

    n, D = min(rounded(len(kept(labels))), len(labels)), x.shape[1]
    rows = device.upload(labels, np.int32, lambda labels: _filled(kept(labels), n, kept(labels)[0] if n else None))
    few = device.empty((n, D), x.dtype)
    _launch(device, x.dtype, "gather_rows", n, device.contiguous(x), rows, few, D)
    of_rows = device.upload(labels, np.int32, lambda labels: _filled(labels[kept(labels)], n, IGNORED))
    return few, of_rows, device.upload(labels, np.int32, places)


def _filled(x, n, filler):
    """x up to n elements."""
    return np.concatenate([x, np.full(n - len(x), filler)]) if n else x


def _mean(device, dtype, surprise, count):
    """sum of surprise / count, without axes."""
    loss = device.empty((), np.float32)
    _launch(device, dtype, "sum_rows", 1, surprise, loss, len(surprise), count)
    return loss


def _check(device, **arrays):
    """All must be float32, or all bfloat16."""
    dtypes = {x.dtype.name for x in arrays.values()}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        found = ", ".join(f"{name} is {x.dtype}" for name, x in arrays.items())
        raise InputError(f"{found}; this backend needs float32 or bfloat16, the same for all")


def _launch(device, dtype, name, rows, *args):
    """One block per row; dtype: that of activations."""
    device.launch(device.kernel("cross_entropy", name, REAL=dtype, THREADS=THREADS), rows, THREADS, *args)
