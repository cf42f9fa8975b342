"""Linear, LoRA and embedding against the dense formulas that they abbreviate."""

import numpy as np
import pytest

from deltanet_ref import ops
from deltanet_ref.errors import InputError
from deltanet_ref.ops.lora_linear import Update
from tests.tolerances import assert_identical, assert_within, rounding

RNG = np.random.default_rng(1)
X, W, DY = RNG.standard_normal((2, 3, 5)), RNG.standard_normal((7, 5)), RNG.standard_normal((2, 3, 7))


def test_linear_is_the_sum_over_features_of_every_row():
    y = ops.linear_forward(X, W)
    for b, t, o in np.ndindex(y.shape):
        terms = [X[b, t, i] * W[o, i] for i in range(5)]
        assert_within(f"y[{b}, {t}, {o}]", y[b, t, o], sum(terms), rounding(5) * sum(map(abs, terms)))


def test_linear_weight_gradient_is_the_sum_of_outer_products():
    terms = [np.outer(DY[b, t], X[b, t]) for b in range(2) for t in range(3)]
    assert_within("dw", ops.linear_backward_weight(DY, X), sum(terms), rounding(6) * sum(map(np.abs, terms)))


def test_lora_is_the_linear_map_of_scale_b_a_and_its_gradients_are_the_dense_ones_projected():
    a, b, scale = RNG.standard_normal((4, 5)), RNG.standard_normal((7, 4)), 0.3
    y = np.zeros_like(DY)
    cache = ops.lora_forward([y], X, [Update(0, a, b, scale)])
    dx, [(da, db)] = ops.lora_backward([DY], cache)
    dw = ops.linear_backward_weight(DY, X)
    # products of three factors in two orders of summation: sums of 5, 6 or 7, then of 4 terms or the other way round,
    # on both sides, and the scale; relative to the same products of absolute values
    abs_x, abs_dy, abs_a, abs_b = (np.abs(m) for m in (X, DY, a, b))
    abs_dw, limit = ops.linear_backward_weight(abs_dy, abs_x), rounding(2 * (7 + 6 + 4 + 1)) * scale
    assert_within("y", y, ops.linear_forward(X, scale * b @ a), limit * ops.linear_forward(abs_x, abs_b @ abs_a))
    assert_within(
        "dx", dx, ops.linear_backward_input(DY, scale * b @ a), limit * ops.linear_backward_input(abs_dy, abs_b @ abs_a)
    )
    assert_within("da", da, scale * b.T @ dw, limit * abs_b.T @ abs_dw)
    assert_within("db", db, scale * dw @ a.T, limit * abs_dw @ abs_a.T)


def test_lora_with_b_zero_changes_nothing_and_moves_only_b():
    a, b = RNG.standard_normal((4, 5)), np.zeros((7, 4))
    y = DY.copy()
    dx, [(da, db)] = ops.lora_backward([DY], ops.lora_forward([y], X, [Update(0, a, b, 0.3)]))
    assert_identical("y", y, DY)
    assert not dx.any() and not da.any() and db.any()


def test_updates_of_several_maps_of_one_input_are_those_of_each_alone():
    """Two maps, one with two updates of other ranks: results, dx, and the gradients of the factors that are trained."""
    outs, plan = (7, 4), ((0, 3, 0.3), (1, 2, -1.5), (1, 4, 0.7))
    updates = [Update(m, RNG.standard_normal((r, 5)), RNG.standard_normal((outs[m], r)), s) for m, r, s in plan]
    bases, dys = ([RNG.standard_normal((2, 3, out)) for out in outs] for _ in range(2))
    ys = [base.copy() for base in bases]
    cache = ops.lora_forward(ys, X, updates)
    weights = [sum(u.scale * u.b @ u.a for u in updates if u.map == m) for m in range(2)]
    # absolute values in place of every number bound what is summed: 5 or 7 features, 2, 3 or 4 of the rank, 6 tokens
    abs_weights = [sum(abs(u.scale) * np.abs(u.b) @ np.abs(u.a) for u in updates if u.map == m) for m in range(2)]
    limit = rounding(2 * (7 + 4 + 6 + 2))
    for m, (y, base, w, abs_w) in enumerate(zip(ys, bases, weights, abs_weights, strict=True)):
        magnitude = np.abs(base) + ops.linear_forward(np.abs(X), abs_w)
        assert_within(f"y of map {m}", y, base + ops.linear_forward(X, w), limit * magnitude)
    dx, factors = ops.lora_backward(dys, cache, trained=[True, False, True])
    magnitude = sum(map(ops.linear_backward_input, map(np.abs, dys), abs_weights))
    assert_within("dx", dx, sum(map(ops.linear_backward_input, dys, weights)), limit * magnitude)
    assert factors[1] is None
    for i in (0, 2):
        u, (da, db) = updates[i], factors[i]
        dw = ops.linear_backward_weight(dys[u.map], X)
        abs_dw = abs(u.scale) * ops.linear_backward_weight(np.abs(dys[u.map]), np.abs(X))
        assert_within(f"da of update {i}", da, u.scale * u.b.T @ dw, limit * np.abs(u.b).T @ abs_dw)
        assert_within(f"db of update {i}", db, u.scale * dw @ u.a.T, limit * abs_dw @ np.abs(u.a).T)
    none, same = ops.lora_backward(dys, cache, need_dx=False, trained=[False, False, True])
    assert none is None and same[:2] == [None, None]
    assert_identical("db of update 2", same[2][1], factors[2][1])


def test_without_results_only_the_cache_is_computed():
    """What a backward needs that recomputes its forward: h."""
    update = Update(0, RNG.standard_normal((4, 5)), RNG.standard_normal((7, 4)), 0.3)
    cache, full = ops.lora_forward(None, X, [update]), ops.lora_forward([DY.copy()], X, [update])
    assert_identical("h", cache.h[0], full.h[0])


def test_embedding_reads_rows_and_its_gradient_counts_every_use():
    w, tokens = RNG.standard_normal((6, 5)), np.array([[3, 0, 3], [5, 3, 0]])
    assert_identical("row of token 3", ops.embedding_forward(tokens, w)[1, 1], w[3])
    dx = RNG.standard_normal((2, 3, 5))
    expected, magnitude = np.zeros((2, 8, 5))
    np.add.at(expected, tokens, dx)
    np.add.at(magnitude, tokens, np.abs(dx))
    assert_within("dw", ops.embedding_backward(dx, tokens, 8), expected, rounding(3) * magnitude)  # up to 3 uses


@pytest.mark.parametrize("tokens, named", [([1, 6, 9], "token 6"), ([2, -1, 7], "token -1")])
def test_a_token_outside_the_vocabulary_is_named(tokens, named):
    with pytest.raises(InputError, match=f"{named} .* 0 .. 5"):
        ops.embedding_forward(np.array(tokens), np.ones((6, 2)))


@pytest.mark.parametrize(
    "call, remedy",
    [
        (lambda: ops.linear_forward(np.ones((2, 3)), np.ones((5, 4))), r"w must be \(out, 3\)"),
        (
            lambda: ops.lora_forward(
                [np.ones((2, 7))], np.ones((2, 3)), [Update(0, np.ones((4, 3)), np.ones((7, 5)), 1.0)]
            ),
            "same rank",
        ),
        (
            lambda: ops.lora_forward(
                [np.ones((2, 7))], np.ones((2, 3)), [Update(0, np.ones((4, 5)), np.ones((7, 4)), 1.0)]
            ),
            r"must be \(out, 3\)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_remedy(call, remedy):
    with pytest.raises(InputError, match=remedy):
        call()
