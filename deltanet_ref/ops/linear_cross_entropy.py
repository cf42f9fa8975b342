"""A linear map to the vocabulary and its cross-entropy, in one pass over blocks of the vocabulary.

Derivation: docs/derivations/cross-entropy.md. The running maximum: Milakov and Gimelshein 2018, "Online normalizer
calculation for softmax". Only one block of the logits exists at a time.
"""
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.ops import linear as numpy_linear
from deltanet_ref.ops.cross_entropy import kept_rows

BLOCK = 4096                  # rows of w at a time


class LinearCrossEntropyCache(NamedTuple):
    """Kept by linear_cross_entropy_forward. Only dw recomputes logits, for every block except the last, which is
    cached."""
    x: np.ndarray             # (n, D); n counts the kept rows here and below
    w: object                 # (V, D)
    labels: np.ndarray        # (n,)
    kept: np.ndarray          # (rows,) bool
    peak: np.ndarray          # (n, 1) the largest logit, real
    total: np.ndarray         # (n, 1) sum of exp(logit - peak)
    dx: np.ndarray            # (n, D) sum over v of softmax_v w_v - w_label; (n, 0) without need_gradient
    last: np.ndarray          # (n, V % BLOCK or BLOCK) exp(logit - peak) of the last block
    count: int                # the divisor of the loss, at least 1


def linear_cross_entropy_forward(x, w, labels, *, ignore_index=-100, count=None, need_gradient=True):
    """loss = sum over kept rows of -log softmax(x w^T)[label], divided by count [xent.4, xent.7..9].

    x (rows, D), labels int (rows,); rows with label ignore_index are skipped
    w (V, D): an array, or anything with a length that returns rows as w[start:stop]; each block is read once
    count          the divisor; None means the number of kept rows
    need_gradient  False skips what only backward needs
    returns        loss (a scalar in the dtype of x; 0 when nothing is kept), cache
    raises         InputError for a kept label outside 0 .. V-1, labels of another length, count < 1, another width of w
    """
    return one_pass(numpy_linear, x, w, labels, ignore_index, count, need_gradient, accumulate)


def linear_cross_entropy_backward(dloss, cache, need_dw=True):
    """Gradients of linear_cross_entropy_forward [xent.10..11].

    dloss a scalar -> dx (rows, D), dw (V, D) or None without need_dw
    """
    return gradients(numpy_linear, dloss, cache, need_dw, probabilities)


def one_pass(linear, x, w, labels, ignore_index, count, need_gradient, accumulate):
    """linear_cross_entropy_forward with the linear maps of a module like ops.linear, and the element-wise work on a
    block as a function."""
    if w[:1].shape[1:] != x.shape[1:]:
        raise InputError(f"x has {x.shape[1]} features and the rows of w {w[:1].shape[1]}: w must be (V, {x.shape[1]})")
    kept, count = kept_rows(labels, len(x), len(w), ignore_index, count)
    x, labels = x[kept], labels[kept]
    n, D = x.shape
    peak, total = np.full((n, 1), -np.inf, x.real.dtype), np.zeros((n, 1), x.dtype)
    label_logit = np.zeros(n, x.dtype)
    weighted = np.zeros((n, D if need_gradient else 0), x.dtype)
    label_row = np.zeros_like(weighted)
    for start in range(0, len(w), BLOCK):
        rows = w[start:start + BLOCK]
        s = linear.linear_forward(x, rows)                                 # 1  logits of the block
        here = np.flatnonzero((labels >= start) & (labels < start + len(rows)))
        label_logit[here] = s[here, labels[here] - start]
        accumulate(s, peak, total, weighted)                               # 2  s = exp(s - peak), total = sum_v s
        if need_gradient:
            weighted += linear.linear_backward_input(s, rows)              # 3  weighted = sum_v s_v w_v
            label_row[here] = rows[labels[here] - start]
    loss = (np.log(total[:, 0]) + (peak[:, 0] - label_logit)).sum() / count                # 4  mean of -log p
    if need_gradient:
        weighted /= total                                                  # 5  E_softmax[w] - w_label, dx of one row
        weighted -= label_row
    return loss, LinearCrossEntropyCache(x, w, labels, kept, peak, total, weighted, s, count)


def gradients(linear, dloss, cache, need_dw, probabilities):
    """linear_cross_entropy_backward, likewise."""
    x, w, labels, kept, peak, total, dx_row, last, count = cache
    share = np.asarray(dloss / count, x.dtype)
    # 5..1  loss = mean of -log softmax(x w^T)[label], with respect to x
    dx = np.zeros((len(kept), x.shape[1]), x.dtype)
    dx[kept] = share * dx_row
    if not need_dw:
        return dx, None
    # 1  logits = x w^T, with respect to w
    dw = np.empty((len(w), x.shape[1]), x.dtype)
    for start in range(0, len(w), BLOCK):
        rows = slice(start, min(start + BLOCK, len(w)))
        p = last / total if rows.stop == len(w) else probabilities(linear.linear_forward(x, w[rows]), peak, total)
        here = np.flatnonzero((labels >= start) & (labels < rows.stop))
        p[here, labels[here] - start] -= 1
        dw[rows] = linear.linear_backward_weight(p, share * x)
    return dx, dw


def accumulate(s, peak, total, weighted):
    """Online softmax: raise peak to the block's maximum, rescale total and weighted, then s = exp(s - peak) and
    total += sum_v s."""
    top = np.maximum(peak, s.real.max(1, keepdims=True))
    shrink = np.exp(peak - top)
    peak[:] = top
    np.exp(np.subtract(s, top, out=s), out=s)
    total *= shrink
    total += s.sum(1, keepdims=True)
    weighted *= shrink


def probabilities(s, peak, total):
    """exp(s - peak) / total, in place."""
    np.exp(np.subtract(s, peak, out=s), out=s)
    s /= total
    return s
