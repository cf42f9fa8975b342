"""Linear, LoRA and embedding against the dense formulas that they abbreviate."""
import numpy as np
import pytest

from deltanet_ref import ops
from deltanet_ref.errors import InputError
from deltanet_ref.ops.lora_linear import Update

RNG = np.random.default_rng(1)
X, W, DY = RNG.standard_normal((2, 3, 5)), RNG.standard_normal((7, 5)), RNG.standard_normal((2, 3, 7))


def test_linear_is_the_sum_over_features_of_every_row():
    y = ops.linear_forward(X, W)
    for b, t, o in np.ndindex(y.shape):
        np.testing.assert_allclose(y[b, t, o], sum(X[b, t, i] * W[o, i] for i in range(5)), rtol=1e-13)


def test_linear_weight_gradient_is_the_sum_of_outer_products():
    expected = sum(np.outer(DY[b, t], X[b, t]) for b in range(2) for t in range(3))
    np.testing.assert_allclose(ops.linear_backward_weight(DY, X), expected, rtol=1e-13)


def test_lora_is_the_linear_map_of_scale_b_a_and_its_gradients_are_the_dense_ones_projected():
    a, b, scale = RNG.standard_normal((4, 5)), RNG.standard_normal((7, 4)), 0.3
    y = np.zeros_like(DY)
    cache = ops.lora_forward([y], X, [Update(0, a, b, scale)])
    np.testing.assert_allclose(y, ops.linear_forward(X, scale * b @ a), rtol=1e-12)
    dx, [(da, db)] = ops.lora_backward([DY], cache)
    dw = ops.linear_backward_weight(DY, X)
    np.testing.assert_allclose(dx, ops.linear_backward_input(DY, scale * b @ a), rtol=1e-12)
    np.testing.assert_allclose(da, scale * b.T @ dw, rtol=1e-12)
    np.testing.assert_allclose(db, scale * dw @ a.T, rtol=1e-12)


def test_lora_with_b_zero_changes_nothing_and_moves_only_b():
    a, b = RNG.standard_normal((4, 5)), np.zeros((7, 4))
    y = DY.copy()
    dx, [(da, db)] = ops.lora_backward([DY], ops.lora_forward([y], X, [Update(0, a, b, 0.3)]))
    assert np.array_equal(y, DY) and not dx.any() and not da.any() and db.any()


def test_updates_of_several_maps_of_one_input_are_those_of_each_alone():
    """Two maps, one with two updates of other ranks: results, dx, and the gradients of the factors that are trained."""
    outs, plan = (7, 4), ((0, 3, 0.3), (1, 2, -1.5), (1, 4, 0.7))
    updates = [Update(m, RNG.standard_normal((r, 5)), RNG.standard_normal((outs[m], r)), s) for m, r, s in plan]
    bases, dys = ([RNG.standard_normal((2, 3, out)) for out in outs] for _ in range(2))
    ys = [base.copy() for base in bases]
    cache = ops.lora_forward(ys, X, updates)
    weights = [sum(u.scale * u.b @ u.a for u in updates if u.map == m) for m in range(2)]
    for y, base, w in zip(ys, bases, weights, strict=True):
        np.testing.assert_allclose(y, base + ops.linear_forward(X, w), rtol=1e-12)
    dx, factors = ops.lora_backward(dys, cache, trained=[True, False, True])
    np.testing.assert_allclose(dx, sum(map(ops.linear_backward_input, dys, weights)), rtol=1e-12)
    assert factors[1] is None
    for u, (da, db) in ((updates[i], factors[i]) for i in (0, 2)):
        dw = ops.linear_backward_weight(dys[u.map], X)
        np.testing.assert_allclose(da, u.scale * u.b.T @ dw, rtol=1e-12)
        np.testing.assert_allclose(db, u.scale * dw @ u.a.T, rtol=1e-12)
    none, same = ops.lora_backward(dys, cache, need_dx=False, trained=[False, False, True])
    assert none is None and same[:2] == [None, None] and np.array_equal(same[2][1], factors[2][1])


def test_without_results_only_the_cache_is_computed():
    """What a backward needs that recomputes its forward: h."""
    update = Update(0, RNG.standard_normal((4, 5)), RNG.standard_normal((7, 4)), 0.3)
    cache, full = ops.lora_forward(None, X, [update]), ops.lora_forward([DY.copy()], X, [update])
    assert np.array_equal(cache.h[0], full.h[0])


def test_embedding_reads_rows_and_its_gradient_counts_every_use():
    w, tokens = RNG.standard_normal((6, 5)), np.array([[3, 0, 3], [5, 3, 0]])
    assert np.array_equal(ops.embedding_forward(tokens, w)[1, 1], w[3])
    dx = RNG.standard_normal((2, 3, 5))
    expected = np.zeros((8, 5))
    np.add.at(expected, tokens, dx)
    np.testing.assert_allclose(ops.embedding_backward(dx, tokens, 8), expected, rtol=1e-14)


@pytest.mark.parametrize("tokens, named", [([1, 6, 9], "token 6"), ([2, -1, 7], "token -1")])
def test_a_token_outside_the_vocabulary_is_named(tokens, named):
    with pytest.raises(InputError, match=f"{named} .* 0 .. 5"):
        ops.embedding_forward(np.array(tokens), np.ones((6, 2)))


@pytest.mark.parametrize("call, remedy", [
    (lambda: ops.linear_forward(np.ones((2, 3)), np.ones((5, 4))), r"w must be \(out, 3\)"),
    (lambda: ops.lora_forward([np.ones((2, 7))], np.ones((2, 3)), [Update(0, np.ones((4, 3)), np.ones((7, 5)), 1.0)]),
     "same rank"),
    (lambda: ops.lora_forward([np.ones((2, 7))], np.ones((2, 3)), [Update(0, np.ones((4, 5)), np.ones((7, 4)), 1.0)]),
     r"must be \(out, 3\)"),
])
def test_shapes_that_do_not_fit_are_refused_with_the_remedy(call, remedy):
    with pytest.raises(InputError, match=remedy):
        call()
