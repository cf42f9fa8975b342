"""Cross-entropy of rows of logits, by itself and after a linear map; one task per row.

Mathematics: docs/derivations/cross-entropy.md.
"""
import numpy as np

from deltanet_ref.backends.numba_cpu import linear
from deltanet_ref.backends.numba_cpu.arrays import row, same_float
from deltanet_ref.backends.numba_cpu.compiler import inlined, kernel
from deltanet_ref.backends.numba_cpu.elementary import exp
from deltanet_ref.ops.cross_entropy import CrossEntropyCache, kept_rows
from deltanet_ref.ops.linear_cross_entropy import gradients, one_pass

LANES = 64                    # running maxima of interleaved elements: a single one would be a chain of dependent steps
SPAN = 1024                   # terms summed in the working precision; the sums of spans are added in float64


def cross_entropy_forward(logits, labels, *, ignore_index=-100, count=None):
    """loss, cache: arguments, returns and errors as ops.cross_entropy_forward."""
    same_float(logits)
    n, V = logits.shape
    kept, count = kept_rows(labels, n, V, ignore_index, count)
    peak, total = np.empty((n, 1), logits.dtype), np.empty((n, 1), logits.dtype)
    _totals(n, logits, peak, total)
    rows = np.flatnonzero(kept)
    surprise = np.log(total[rows, 0]) + (peak[rows, 0] - logits[rows, labels[rows]])
    return surprise.sum() / count, CrossEntropyCache(logits, labels, kept, peak, total, count)


def cross_entropy_backward(dloss, cache):
    """dlogits: as ops.cross_entropy_backward."""
    logits, labels, kept, peak, total, count = cache
    dlogits = np.empty(logits.shape, logits.dtype)
    _dlogits(len(logits), logits, labels.astype(np.int64), kept.astype(np.int64), peak, total, dloss / count, dlogits)
    return dlogits


def linear_cross_entropy_forward(x, w, labels, *, ignore_index=-100, count=None, need_gradient=True):
    """loss, cache: arguments, returns and errors as ops.linear_cross_entropy_forward."""
    same_float(x, w[:1])
    return one_pass(linear, x, w, labels, ignore_index, count, need_gradient, _accumulate)


def linear_cross_entropy_backward(dloss, cache, need_dw=True):
    """dx, dw: as ops.linear_cross_entropy_backward."""
    return gradients(linear, dloss, cache, need_dw, _probabilities)


def _accumulate(s, peak, total, weighted):
    """As ops.linear_cross_entropy.accumulate."""
    _accumulate_row(len(s), s, peak, total, weighted)


def _probabilities(s, peak, total):
    """As ops.linear_cross_entropy.probabilities."""
    _softmax_row(len(s), s, peak, total)
    return s


@kernel("w2 w2 w2 w2")
def _accumulate_row(first, last, s, peak, total, weighted):
    for t in range(first, last):
        s_t, weighted_t = row(s, t), row(weighted, t)
        before, highest = peak[t, 0], _max(s_t)
        top = highest if highest > before else before
        shrink = exp(before - top)
        peak[t, 0], total[t, 0] = top, total[t, 0] * shrink + _replace_by_exp(s_t, top)
        for m in range(len(weighted_t)):
            weighted_t[m] *= shrink


@kernel("w2 r2 r2")
def _softmax_row(first, last, s, peak, total):
    for t in range(first, last):
        s_t, factor, top = row(s, t), s.dtype.type(1) / total[t, 0], peak[t, 0]
        for v in range(len(s_t)):
            s_t[v] = factor * exp(s_t[v] - top)


@kernel("r2 w2 w2")
def _totals(first, last, logits, peak, total):
    """peak = max over v, total = sum over v of exp(logit - peak)."""
    terms = np.empty(logits.shape[1], logits.dtype)
    for t in range(first, last):
        terms[:] = row(logits, t)
        top = _max(terms)
        peak[t, 0], total[t, 0] = top, _replace_by_exp(terms, top)


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
def _replace_by_exp(x, top):
    """x = exp(x - top). Returns the sum of x."""
    total = 0.0
    for start in range(0, len(x), SPAN):
        part, s = x[start:start + SPAN], x.dtype.type(0)
        for j in range(len(part)):
            part[j] = exp(part[j] - top)
            s += part[j]
        total += s
    return total
