"""Cross-entropy of rows of logits, one task per row. Mathematics: docs/derivations/cross-entropy.md."""
import numpy as np

from deltanet_ref import ops
from deltanet_ref.backends.numba_cpu.kernel import exp, inlined, kernel, row, same_float
from deltanet_ref.ops.cross_entropy import CrossEntropyCache

LANES = 64                    # maxima that are followed side by side: one would depend on the one before
SPAN = 1024                   # terms that are summed in the working precision, before float64


def cross_entropy_forward(logits, labels, *, ignore_index=-100, count=None):
    """loss, cache: arguments, returns and errors as ops.cross_entropy_forward."""
    same_float(logits)
    n, V = logits.shape
    kept = labels != ignore_index
    if labels.shape != (n,) or (kept & ((labels < 0) | (labels >= V))).any() or count is not None and count < 1:
        return ops.cross_entropy_forward(logits, labels, ignore_index=ignore_index, count=count)   # raises the remedy
    peak, total = np.empty((n, 1), logits.dtype), np.empty((n, 1), logits.dtype)
    _totals(n, logits, peak, total)
    rows = np.flatnonzero(kept)
    count = max(len(rows), 1) if count is None else count
    surprise = np.log(total[rows, 0]) + (peak[rows, 0] - logits[rows, labels[rows]])
    return surprise.sum() / count, CrossEntropyCache(logits, labels, kept, peak, total, count)


def cross_entropy_backward(dloss, cache):
    """dlogits: as ops.cross_entropy_backward."""
    logits, labels, kept, peak, total, count = cache
    dlogits = np.empty(logits.shape, logits.dtype)
    _dlogits(len(logits), logits, labels.astype(np.int64), kept.astype(np.int64), peak, total, dloss / count, dlogits)
    return dlogits


@kernel("r2 w2 w2")
def _totals(first, last, logits, peak, total):
    """peak = max over v, total = sum over v of exp(logit - peak)."""
    for t in range(first, last):
        top = _max(row(logits, t))
        peak[t, 0], total[t, 0] = top, _sum_exp(row(logits, t), top)


@kernel("r2 i1 i1 r2 r2 f w2")
def _dlogits(first, last, logits, labels, kept, peak, total, share, dlogits):
    """share (softmax - onehot(label)), zero for rows that are not kept."""
    for t in range(first, last):
        factor = share / total[t, 0] if kept[t] else logits.dtype.type(0)
        _times_exp(factor, row(logits, t), peak[t, 0], row(dlogits, t))
        if kept[t]:
            dlogits[t, labels[t]] -= share


@inlined
def _times_exp(factor, x, top, y):
    for v in range(len(x)):
        y[v] = factor * exp(x[v] - top)


@inlined
def _max(x):
    lanes = np.full(LANES, -np.inf, x.dtype)
    whole = len(x) // LANES * LANES
    for start in range(0, whole, LANES):
        part = x[start:start + LANES]
        for j in range(LANES):
            lanes[j] = part[j] if part[j] > lanes[j] else lanes[j]
    top = x.dtype.type(-np.inf)
    for j in range(LANES):
        top = lanes[j] if lanes[j] > top else top
    for v in range(whole, len(x)):
        top = x[v] if x[v] > top else top
    return top


@inlined
def _sum_exp(x, top):
    total = 0.0
    for start in range(0, len(x), SPAN):
        part, s = x[start:start + SPAN], x.dtype.type(0)
        for j in range(len(part)):
            s += exp(part[j] - top)
        total += s
    return total
