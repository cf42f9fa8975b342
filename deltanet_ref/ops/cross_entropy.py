"""Cross-entropy with ignored labels. Derivation: docs/derivations/cross-entropy.md."""
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError

ROWS = 64                     # rows at a time, which bounds the temporary exp(logits)


class CrossEntropyCache(NamedTuple):
    """Kept by cross_entropy_forward; the probabilities are recomputed. The log-sum-exp is kept in two parts."""
    logits: np.ndarray        # (n, V)
    labels: np.ndarray        # (n,)
    kept: np.ndarray          # (n,) bool
    peak: np.ndarray          # (n, 1) the largest logit of the row, real
    total: np.ndarray         # (n, 1) sum of exp(logit - peak)
    count: int                # the divisor of the loss, at least 1


def cross_entropy_forward(logits, labels, *, ignore_index=-100, count=None):
    """loss = sum over kept rows of -log softmax(logits)[label], divided by count [xent.1..4].

    logits (n, V), labels int (n,); rows with label ignore_index do not contribute
    count   the divisor; None means the number of kept rows
    returns loss (a scalar in the dtype of logits; 0 when nothing is kept), cache
    raises  InputError for a kept label outside 0..V-1, labels of another length, or count < 1
    """
    n, V = logits.shape
    kept, count = kept_rows(labels, n, V, ignore_index, count)
    peak = logits.real.max(1, keepdims=True)                               # 1  peak = max_v logit_v
    total = np.empty((n, 1), logits.dtype)
    for start in range(0, n, ROWS):                                        # 2  total = sum_v exp(logit_v - peak)
        rows = slice(start, start + ROWS)
        shifted = logits[rows] - peak[rows]
        total[rows] = np.exp(shifted, out=shifted).sum(1, keepdims=True)
    rows = np.flatnonzero(kept)                                            # 3  -log p = log total + peak - logit_label
    surprise = np.log(total[rows, 0]) + (peak[rows, 0] - logits[rows, labels[rows]])
    loss = surprise.sum() / count                                          # 4  loss = sum / count
    return loss, CrossEntropyCache(logits, labels, kept, peak, total, count)


def cross_entropy_backward(dloss, cache):
    """dlogits = dloss / count (softmax(logits) - onehot(label)), zero where ignored [xent.5].

    dloss a scalar -> dlogits (n, V)
    """
    logits, labels, kept, peak, total, count = cache
    dlogits = logits - peak
    np.exp(dlogits, out=dlogits)
    dlogits *= np.where(kept[:, None], dloss / count / total, 0).astype(dlogits.dtype)
    rows = np.flatnonzero(kept)
    dlogits[rows, labels[rows]] -= dloss / count
    return dlogits


def kept_rows(labels, n, V, ignore_index, count):
    """Which of n rows contribute, bool (n,), and the divisor of the loss. Raises InputError as
    cross_entropy_forward."""
    if labels.shape != (n,):
        raise InputError(f"labels have shape {labels.shape}; for {n} rows they must be ({n},)")
    kept = labels != ignore_index
    bad = np.flatnonzero(kept & ((labels < 0) | (labels >= V)))
    if len(bad):
        raise InputError(f"label {labels[bad[0]]} at row {bad[0]} is outside the vocabulary: it must be "
                         f"0 .. {V - 1}, or {ignore_index} to be ignored")
    if count is None:
        return kept, max(int(kept.sum()), 1)
    if count < 1:
        raise InputError(f"count is {count}; the loss is divided by it, so it must be at least 1")
    return kept, count
