"""Rotary embedding against multiplication of complex numbers and mpmath's angles."""

import mpmath
import numpy as np
import pytest

from deltanet_ref import ops
from deltanet_ref.errors import InputError
from tests.tolerances import assert_identical, assert_within, rounding

RNG = np.random.default_rng(3)
POSITIONS = np.array([0, 1, 2, 17, 5])
X = RNG.standard_normal((2, 5, 3, 11))
TABLES = ops.rope_tables(POSITIONS, 6, 1e4, dtype=np.float64)
TURN = rounding(17 + 6) * np.abs(X).max() * 2  # angles of up to 17 are rounded, then two products and a sum


def test_rope_multiplies_pairs_by_unit_complex_numbers_and_leaves_the_rest():
    y = ops.rope_forward(X, *TABLES)
    turned = (X[..., :3] + 1j * X[..., 3:6]) * np.exp(1j * POSITIONS[:, None, None] * 1e4 ** (-np.arange(3) / 3))
    assert_within("first of the pairs", y[..., :3], turned.real, TURN)
    assert_within("second of the pairs", y[..., 3:6], turned.imag, TURN)
    assert_identical("the rest", y[..., 6:], X[..., 6:])


def test_rope_backward_undoes_the_rotation():
    assert_within("x", ops.rope_backward(ops.rope_forward(X, *TABLES), *TABLES), X, 2 * TURN)


def test_rotated_products_depend_on_the_distance_only():
    q, k = RNG.standard_normal((2, 1, 1, 1, 6))

    def product(position_q, position_k):
        tables = [ops.rope_tables(np.array([p]), 6, 1e4, dtype=np.float64) for p in (position_q, position_k)]
        return (ops.rope_forward(q, *tables[0]) * ops.rope_forward(k, *tables[1])).sum()

    # 6 products, and angles of up to 1007 that are rounded
    limit = rounding(1007 + 12) * np.linalg.norm(q) * np.linalg.norm(k)
    assert_within("product", product(13, 6), product(1007, 1000), limit)
    assert abs(product(13, 6) - product(6, 13)) > 1e-3  # and on its sign


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_angles_at_far_positions_are_those_of_float64_arithmetic(dtype):
    position, theta = 250_001, 1e7
    cos, sin = ops.rope_tables(np.array([position]), 8, theta, dtype=dtype)
    assert cos.dtype == sin.dtype == dtype
    with mpmath.workdps(40):
        angles = [position * mpmath.mpf(theta) ** (-mpmath.mpf(2 * j) / 8) for j in range(4)]
        expected = [[float(f(angle)) for angle in angles] for f in (mpmath.cos, mpmath.sin)]
    # the angle, rounded to float64: 250001 eps = 6e-11; float32 angles would be off by 1e-2
    tolerance = position * np.finfo(np.float64).eps + np.finfo(dtype).eps
    assert_within("cos, sin", np.array([cos[0], sin[0]]), np.array(expected), tolerance)


@pytest.mark.parametrize(
    "sections, axes",
    [
        ((3, 2, 2), "thwthwt"),
        ((4, 3, 1), "thwthtth"),
        ((11, 11, 10), "thwthwthwthwthwthwthwthwthwthwth"),
        ((6, 1, 0), "thttttt"),
    ],
)
def test_sections_interleave_the_axes(sections, axes):
    positions = RNG.integers(0, 50, (3, 5))
    cos, sin = ops.rope_tables(positions, 2 * len(axes), 1e4, sections, np.float64)
    for j, axis in enumerate(axes):
        one_axis = ops.rope_tables(positions["thw".index(axis)], 2 * len(axes), 1e4, dtype=np.float64)
        assert_identical(f"cos of pair {j}", cos[:, j], one_axis[0][:, j])
        assert_identical(f"sin of pair {j}", sin[:, j], one_axis[1][:, j])


def test_text_positions_are_the_same_on_all_three_axes():
    text = ops.rope_tables(POSITIONS, 6, 1e4, (1, 1, 1), np.float64)
    on_all = ops.rope_tables(np.stack([POSITIONS] * 3), 6, 1e4, (1, 1, 1), np.float64)
    assert_identical("cos, sin", np.array(text), np.array(on_all))


@pytest.mark.parametrize(
    "call, remedy",
    [
        (lambda: ops.rope_tables(POSITIONS, 7, 1e4), "must be even"),
        (lambda: ops.rope_tables(np.ones((3, 5)), 6, 1e4), "with sections"),
        (lambda: ops.rope_tables(np.ones((2, 5)), 6, 1e4, (1, 1, 1)), r"must be \(L,\)"),
        (lambda: ops.rope_forward(X[:, :4], *TABLES), "do not fit|must be"),
        (lambda: ops.rope_forward(X[..., :5], *TABLES), "R <= d"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_remedy(call, remedy):
    with pytest.raises(InputError, match=remedy):
        call()
