"""L2 norm and RMS norm, plain and gated, against their definitions row by row."""

import numpy as np
import pytest

from deltanet_ref import ops
from deltanet_ref.errors import InputError
from tests.tolerances import assert_identical, assert_within, rounding

RNG = np.random.default_rng(2)
X, Z, W = RNG.standard_normal((2, 3, 5)), RNG.standard_normal((2, 3, 5)), RNG.standard_normal(5)
A_ROW = rounding(2 * (5 + 5))  # a sum of 5 squares, the root, the quotient, the weight: on both sides


def test_l2_norm_divides_each_row_by_its_length_with_eps_on_the_sum():
    y, _ = ops.l2_norm_forward(X, eps=0.5)
    for row, normed in zip(X.reshape(-1, 5), y.reshape(-1, 5)):
        expected = row / np.sqrt(np.linalg.norm(row) ** 2 + 0.5)
        assert_within("y", normed, expected, A_ROW * np.abs(expected))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_l2_norm_of_a_zero_row_is_zero_with_slope_one_over_sqrt_eps(dtype):
    y, cache = ops.l2_norm_forward(np.zeros((1, 5), dtype), eps=1e-6)
    dy = X[0, :1].astype(dtype)
    assert not y.any()
    assert_within("dx", ops.l2_norm_backward(dy, cache), dy * 1e3, rounding(4, dtype) * np.abs(dy * 1e3))


def test_l2_norm_gradient_has_no_part_along_a_long_row():
    _, cache = ops.l2_norm_forward(1e6 * X)  # eps is nothing here
    dx = ops.l2_norm_backward(Z, cache)
    radial = (dx * X).sum(-1) / np.linalg.norm(X, axis=-1)
    # dx = (Z - y (y . Z)) / |X|: what is left along the row is the rounding of that difference
    limit = A_ROW * np.linalg.norm(Z, axis=-1) / np.linalg.norm(1e6 * X, axis=-1)
    assert_within("dx along the row", radial, np.zeros_like(radial), limit)


def test_rms_norm_divides_by_the_root_of_the_mean_square_and_multiplies_by_w_as_given():
    y, _ = ops.rms_norm_forward(X, W, 0.5)
    for row, normed in zip(X.reshape(-1, 5), y.reshape(-1, 5)):
        expected = row / np.sqrt(np.mean(row**2) + 0.5) * W
        assert_within("y", normed, expected, A_ROW * np.abs(expected))


def test_gated_rms_norm_norms_first_and_gates_afterwards():
    y, _ = ops.gated_rms_norm_forward(X, Z, W, 1e-6)
    expected = ops.rms_norm_forward(X, W, 1e-6)[0] * Z / (1 + np.exp(-Z))
    assert_within("y", y, expected, (A_ROW + rounding(2 * 8)) * np.abs(expected))  # and SiLU, |Z| < 4
    rescaled, _ = ops.gated_rms_norm_forward(1e3 * X, Z, W, 0)
    expected = ops.gated_rms_norm_forward(X, Z, W, 0)[0]
    assert_within("y of 1000 x", rescaled, expected, (A_ROW + rounding(2 * 8)) * np.abs(expected))


def test_norm_weights_are_left_out_when_not_asked_for():
    for (_, cache), backward in (
        (ops.rms_norm_forward(X, W, 1e-6), ops.rms_norm_backward),
        (ops.gated_rms_norm_forward(X, Z, W, 1e-6), ops.gated_rms_norm_backward),
    ):
        full, lean = backward(Z, cache), backward(Z, cache, need_dw=False)
        assert lean[-1] is None
        for position, (f, g) in enumerate(zip(full[:-1], lean[:-1])):
            assert_identical(f"{backward.__name__}, result {position}", g, f)


@pytest.mark.parametrize("eps", [1e-6, np.float64(1e-6)])
def test_an_eps_of_numpy_type_does_not_widen_float32(eps):
    x, w = X.astype(np.float32), W.astype(np.float32)
    assert ops.rms_norm_forward(x, w, eps)[0].dtype == np.float32
    assert ops.gated_rms_norm_forward(x, x, w, eps)[0].dtype == np.float32
    assert ops.l2_norm_forward(x, eps)[0].dtype == np.float32


@pytest.mark.parametrize(
    "call, remedy",
    [
        (lambda: ops.rms_norm_forward(X, np.ones(3), 1e-6), r"must be \(5,\)"),
        (lambda: ops.gated_rms_norm_forward(X, Z, np.ones(1), 1e-6), r"must be \(5,\)"),
        (lambda: ops.gated_rms_norm_forward(X, Z[:, :1], W, 1e-6), "must be that of x"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_remedy(call, remedy):
    with pytest.raises(InputError, match=remedy):
        call()
