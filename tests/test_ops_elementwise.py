"""Sigmoid, SiLU, softplus and the decay gate against mpmath."""

import mpmath
import numpy as np
import pytest

from deltanet_ref import ops
from deltanet_ref.errors import InputError
from tests.tolerances import assert_identical, assert_within, rounding

POINTS = np.array([-1e4, -700, -200, -88.5, -40, -3.3, -1e-9, 0, 1e-9, 0.7, 17, 40, 88.5, 200, 700, 1e4])

EXACT = {
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "silu_derivative": lambda x: (1 + mpmath.exp(-x) + x * mpmath.exp(-x)) / (1 + mpmath.exp(-x)) ** 2,
    "softplus": lambda x: mpmath.log(1 + mpmath.exp(x)),
}


def exact(f, points):
    with mpmath.workdps(9000):  # exp(1e4) + 1 needs 4343 digits
        return np.array([float(f(mpmath.mpf(float(x)))) for x in points])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", EXACT)
def test_elementwise_functions_are_exact_over_the_whole_range(name, dtype):
    points = POINTS.astype(dtype)
    value = getattr(ops, name)(points)
    # A few roundings; in SiLU' the rounding of 1 - s counts x times, up to where exp(-x) = eps (x = 17 or 36).
    # Near the smallest normal number (exp(-88) in float32) a zero is as good.
    ulps = 20 if name == "silu_derivative" else 4
    eps, tiny = np.finfo(dtype).eps, 100 * np.finfo(dtype).tiny
    expected = exact(EXACT[name], points)
    assert_within(name, value, expected, ulps * eps * np.abs(expected) + tiny)


@pytest.mark.parametrize(
    "name, derivative",
    [("sigmoid", lambda x: ops.sigmoid(x) * ops.sigmoid(-x)), ("silu", ops.silu_derivative), ("softplus", ops.sigmoid)],
)
def test_complex_step_through_the_complex_branch_gives_the_derivative(name, derivative):
    f = getattr(ops, name)
    points = POINTS[abs(POINTS) < 600]
    stepped = f(points + 1e-30j)
    # both sides round a few times, and what is below the step (squared, for the value) is lost; in SiLU' the rounding
    # of 1 - s counts |x| times, as long as exp(-x) is not below eps: x = 36
    assert_within(f"{name}, value", stepped.real, f(points), rounding(2 * 4) * np.abs(f(points)) + 1e-60)
    expected = derivative(points)
    limit = rounding(2 * (4 + 36)) * np.abs(expected) + 1e-30
    assert_within(f"{name}, derivative", stepped.imag / 1e-30, expected, limit)


def test_complex_arguments_give_the_analytic_functions():
    z = np.array([-2.1 + 0.9j, -0.3 - 1.2j, 0.4 + 0.7j, 3.2 - 0.5j])
    # |z| < 4: exp(z) is off by |z| eps; then a few roundings on either side
    for name, expected in (("sigmoid", 1 / (1 + np.exp(-z))), ("softplus", np.log(1 + np.exp(z)))):
        assert_within(name, getattr(ops, name)(z), expected, rounding(2 * (4 + 4)) * np.abs(expected))


def test_g_is_minus_exp_A_log_times_softplus_to_the_last_digits_of_float32():
    a = np.array([[[-200, -20, -1e-3, 5, 200]]], np.float32)
    A_log = np.array([20, 2.7, -3, 0.1, 25], np.float32)
    dt_bias = np.array([0.3, -4.1, 1e-4, 0.77, -9], np.float32)
    g, beta, _ = ops.decay_gate_forward(a, a, A_log, dt_bias)
    expected = [
        float(-mpmath.exp(float(A)) * mpmath.log1p(mpmath.exp(mpmath.mpf(float(x)) + float(bias))))
        for x, A, bias in zip(a[0, 0], A_log, dt_bias)
    ]
    assert_within("g", g[0, 0], expected, rounding(1, np.float32) * np.abs(expected) + 1e-45)  # one rounding
    assert_within("beta", beta, ops.sigmoid(a), rounding(4, np.float32) * ops.sigmoid(a))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_decay_gate_stays_finite_at_saturated_gates(dtype):
    a = np.array([[[-200, 200, 0]]], dtype)
    A_log = np.array([60, 60, -60], dtype)
    g, beta, cache = ops.decay_gate_forward(a, a, A_log, np.zeros(3, dtype))
    results = [g, beta, *ops.decay_gate_backward(np.ones_like(g), np.ones_like(g), cache)]
    assert all(np.isfinite(x).all() for x in results)
    assert (g <= 0).all() and g[0, 0, 1] < -1e28


def test_decay_gate_parameter_gradients_are_summed_in_float64():
    # 4096 terms that cancel but for the last: a float32 running sum would keep its rounding errors
    dg = np.ones((1, 4097, 1), np.float32)
    dg[0, 1:-1:2] = -1
    a = np.full((1, 4097, 1), 7, np.float32)
    a[0, -1] = -7
    zero = np.zeros(1, np.float32)
    _, _, cache = ops.decay_gate_forward(a, a, zero, zero)
    _, _, dA_log, ddt_bias = ops.decay_gate_backward(dg, np.zeros_like(dg), cache)
    # each of the 4096 is rounded to float32 alike, and they cancel; what is left is rounded a few times
    assert_within("dA_log", dA_log[0], -np.logaddexp(0, -7.0), rounding(8, np.float32) * np.logaddexp(0, -7.0))
    assert_within("ddt_bias", ddt_bias[0], -1 / (1 + np.exp(7.0)), rounding(8, np.float32) / (1 + np.exp(7.0)))


def test_gate_parameters_are_left_out_when_not_asked_for():
    a = np.ones((1, 2, 3))
    _, _, cache = ops.decay_gate_forward(a, a, np.ones(3), np.ones(3))
    full, lean = (ops.decay_gate_backward(a, a, cache, need_dw=need) for need in (True, False))
    assert lean[2] is None and lean[3] is None
    assert_identical("da", full[0], lean[0])
    assert_identical("db", full[1], lean[1])


def test_swiglu_is_silu_of_the_gate_times_up_and_its_gradient_too():
    gate, up, dy = np.random.default_rng(0).standard_normal((3, 2, 5))
    y, cache = ops.swiglu_forward(gate, up)
    dgate, dup = ops.swiglu_backward(dy, cache)
    slope = exact(EXACT["silu_derivative"], gate.ravel()).reshape(2, 5)
    # sigmoid and two products on both sides, |gate| < 4; SiLU' = s + s (1 - s) gate may cancel
    for name, value, expected, size in (
        ("y", y, gate * up / (1 + np.exp(-gate)), gate * up),
        ("dup", dup, dy * gate / (1 + np.exp(-gate)), dy * gate),
        ("dgate", dgate, dy * up * slope, dy * up * (1 + np.abs(gate))),
    ):
        assert_within(name, value, expected, rounding(2 * (4 + 4)) * np.abs(size))


@pytest.mark.parametrize(
    "call, remedy",
    [
        (lambda: ops.swiglu_forward(np.ones((2, 3)), np.ones((2, 4))), "must be the same"),
        (
            lambda: ops.decay_gate_forward(np.ones((1, 2, 6)), np.ones((1, 2, 6)), np.ones(3), np.ones(6)),
            "per value head",
        ),
        (
            lambda: ops.decay_gate_forward(np.ones((1, 2, 6)), np.ones((1, 2, 3)), np.ones(6), np.ones(6)),
            "per value head",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_remedy(call, remedy):
    with pytest.raises(InputError, match=remedy):
        call()
