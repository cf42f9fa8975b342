"""Cross-entropy against scipy's logsumexp, with ignored labels and labels that are no labels; with its linear map, in
one pass over the vocabulary, against the two by themselves."""

import numpy as np
import pytest
from scipy.special import logsumexp, softmax

from deltanet_ref import ops
from deltanet_ref.backends import numba_cpu
from deltanet_ref.errors import InputError
from deltanet_ref.ops import cross_entropy, linear_cross_entropy
from tests.tolerances import assert_identical, assert_within, rounding

RNG = np.random.default_rng(6)
LOGITS = 3 * RNG.standard_normal((6, 11))
LABELS = np.array([10, -100, 0, 4, 4, -100])
KEPT = LABELS >= 0
# exp of differences of up to twice the largest logit, a sum of 11, its logarithm, a mean of 4: on both sides; absolute,
# losses and probabilities are of order 1
A_LOSS = rounding(2 * (2 * np.abs(LOGITS).max() + 11 + 4 + 4))


def test_loss_is_the_mean_surprise_of_the_kept_rows():
    loss, _ = ops.cross_entropy_forward(LOGITS, LABELS)
    rows = LOGITS[KEPT]
    assert_within("loss", loss, np.mean(logsumexp(rows, 1) - rows[np.arange(4), LABELS[KEPT]]), A_LOSS)


def test_gradient_is_probability_minus_one_hot_and_exactly_zero_where_ignored():
    _, cache = ops.cross_entropy_forward(LOGITS, LABELS)
    dlogits = ops.cross_entropy_backward(1.5, cache)
    expected = softmax(LOGITS[KEPT], 1) - np.eye(11)[LABELS[KEPT]]
    assert_within("dlogits", dlogits[KEPT], 1.5 / 4 * expected, A_LOSS)
    assert not dlogits[~KEPT].any()


def test_count_replaces_the_number_of_kept_rows_so_that_parts_add_up():
    loss, cache = ops.cross_entropy_forward(LOGITS, LABELS)
    whole = ops.cross_entropy_backward(1.0, cache)
    parts = [ops.cross_entropy_forward(LOGITS[s], LABELS[s], count=4) for s in (slice(0, 3), slice(3, 6))]
    assert_within("loss", parts[0][0] + parts[1][0], loss, A_LOSS)
    gradients = [ops.cross_entropy_backward(1.0, cache) for _, cache in parts]
    assert_within("dlogits", np.concatenate(gradients), whole, A_LOSS)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_with_every_label_ignored_loss_and_gradient_are_zero(dtype):
    loss, cache = ops.cross_entropy_forward(LOGITS.astype(dtype), np.full(6, -100))
    dlogits = ops.cross_entropy_backward(1.0, cache)
    assert loss == 0 and loss.dtype == dtype
    assert dlogits.shape == LOGITS.shape and dlogits.dtype == dtype and not dlogits.any()


def test_another_ignore_index_is_obeyed():
    labels = np.where(KEPT, LABELS, 7)
    loss, _ = ops.cross_entropy_forward(LOGITS, labels, ignore_index=7)
    assert_identical("loss", loss, ops.cross_entropy_forward(LOGITS, LABELS)[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_huge_logits_neither_overflow_nor_lose_the_small_differences(dtype):
    offset = 2.0**15  # LOGITS + offset must be exact in float32: steps of 1/64
    logits = (np.round(LOGITS * 64) / 64).astype(dtype)
    near, cache_near = ops.cross_entropy_forward(logits, LABELS)
    far, cache_far = ops.cross_entropy_forward(logits + dtype(offset), LABELS)
    assert_identical("loss", far, near)
    assert_identical("dlogits", ops.cross_entropy_backward(1.0, cache_far), ops.cross_entropy_backward(1.0, cache_near))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_huge_spread_of_logits_gives_the_difference_as_loss(dtype):
    logits = np.array([[-1e4, 2e4, 0]], dtype)
    loss, cache = ops.cross_entropy_forward(logits, np.array([0]))
    assert loss == dtype(3e4)
    assert np.array_equal(ops.cross_entropy_backward(1.0, cache), [[-1, 1, 0]])


def test_rows_taken_in_several_blocks_give_the_same_loss(monkeypatch):
    expected, _ = ops.cross_entropy_forward(LOGITS, LABELS)
    monkeypatch.setattr(cross_entropy, "ROWS", 4)
    assert ops.cross_entropy_forward(LOGITS, LABELS)[0] == expected


@pytest.mark.parametrize("labels, named", [([0, 11, 12], "label 11 at row 1"), ([0, -100, -1], "label -1 at row 2")])
def test_the_first_label_outside_the_vocabulary_is_named(labels, named):
    with pytest.raises(InputError, match=f"{named} .*0 .. 10, or -100"):
        ops.cross_entropy_forward(LOGITS[:3], np.array(labels))


@pytest.mark.parametrize(
    "labels, options, remedy", [(LABELS[:5], {}, r"must be \(6,\)"), (LABELS, {"count": 0}, "at least 1")]
)
def test_arguments_that_do_not_fit_are_refused_with_the_remedy(labels, options, remedy):
    with pytest.raises(InputError, match=remedy):
        ops.cross_entropy_forward(LOGITS, labels, **options)


# ---- with its linear map

X, W = RNG.standard_normal((6, 5)), RNG.standard_normal((11, 5))
both_backends = pytest.mark.parametrize("backend", [ops, numba_cpu])


@both_backends
@pytest.mark.parametrize("block", [1, 4, 11, 4096])
@pytest.mark.parametrize("labels", [LABELS, np.full(6, -100)])
def test_one_pass_over_blocks_of_the_vocabulary_equals_linear_then_cross_entropy(monkeypatch, backend, block, labels):
    monkeypatch.setattr(linear_cross_entropy, "BLOCK", block)
    expected, cache = ops.cross_entropy_forward(ops.linear_forward(X, W), labels)
    dlogits = ops.cross_entropy_backward(1.5, cache)
    loss, cache = backend.linear_cross_entropy_forward(X, W, labels)
    dx, dw = backend.linear_cross_entropy_backward(1.5, cache)
    # the logits are sums of 5 products in another order; each of them, and each probability, may be off by that
    logits_off = rounding(2 * 5) * (np.abs(X) @ np.abs(W).T).max()
    limit = A_LOSS + 2 * logits_off
    assert_within("loss", loss, expected, limit)
    assert_within("dx", dx, ops.linear_backward_input(dlogits, W), 11 * limit * np.abs(W).max())
    assert_within("dw", dw, ops.linear_backward_weight(dlogits, X), 6 * limit * np.abs(X).max())


class Rows:
    """w, which notes the slices that it is asked for."""

    def __init__(self, w):
        self.w, self.asked = w, []

    def __len__(self):
        return len(self.w)

    def __getitem__(self, rows):
        self.asked.append((rows.start, rows.stop))
        return self.w[rows]


@both_backends
def test_each_block_of_the_vocabulary_is_decoded_once_for_loss_and_dx(monkeypatch, backend):
    monkeypatch.setattr(linear_cross_entropy, "BLOCK", 4)
    w = Rows(W)
    _, cache = backend.linear_cross_entropy_forward(X, w, LABELS)
    dx, dw = backend.linear_cross_entropy_backward(1.0, cache, need_dw=False)
    assert [rows for rows in w.asked if rows != (None, 1)] == [(0, 4), (4, 8), (8, 12)]
    assert dw is None and not dx[~KEPT].any() and dx[KEPT].any(1).all()


@both_backends
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_huge_spread_of_logits_between_blocks_gives_the_difference_as_loss(monkeypatch, backend, dtype):
    """The largest logit last, then first: what was summed before it becomes zero, what comes after it stays zero."""
    monkeypatch.setattr(linear_cross_entropy, "BLOCK", 1)
    w = np.array([[-1e4], [0], [2e4]], dtype)
    for order in ([0, 1, 2], [2, 1, 0]):
        loss, cache = backend.linear_cross_entropy_forward(np.ones((1, 1), dtype), w[order], np.array([1]))
        dx, dw = backend.linear_cross_entropy_backward(1.0, cache)
        assert loss == dtype(2e4) and dx[0, 0] == dtype(2e4)
        assert np.array_equal(dw[:, 0], np.array([0, -1, 1])[order])


@both_backends
def test_one_pass_refuses_what_does_not_fit(backend):
    for arguments, remedy in (
        ((X, W[:, :3], LABELS), "w must be .V, 5."),
        ((X, W, LABELS[1:]), "must be .6,."),
        ((X, W, LABELS + 1), "label 11 at row 0 .*0 .. 10"),
    ):
        with pytest.raises(InputError, match=remedy):
            backend.linear_cross_entropy_forward(*arguments)
