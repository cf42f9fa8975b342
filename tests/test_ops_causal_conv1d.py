"""The causal convolution against scipy's linear filter, and its memory: state, splits, packed sequences."""
import numpy as np
import pytest
from scipy.signal import lfilter, lfiltic
from scipy.special import expit

from deltanet_ref import ops
from deltanet_ref.errors import InputError

RNG = np.random.default_rng(4)
K = 4
W = RNG.standard_normal((7, K))
CU = np.array([0, 1, 3, 3, 6, 11])                         # lengths 1, 2, 0, 3, 5 for a kernel of 4


def filtered(x, w, state):
    """scipy's FIR filter of one channel with the K-1 earlier inputs as initial condition, then SiLU."""
    taps = w[::-1]
    c, _ = lfilter(taps, 1, x, zi=lfiltic(taps, 1, [], state[::-1]))
    return c * expit(c)


@pytest.mark.parametrize("L", [1, 2, 3, 4, 5, 19])
def test_conv_is_a_linear_filter_of_each_channel_started_from_the_state(L):
    x, state = RNG.standard_normal((2, L, 7)), RNG.standard_normal((2, K - 1, 7))
    y, state_end, _ = ops.causal_conv1d_forward(x, W, state=state)
    for b, channel in np.ndindex(2, 7):
        expected = filtered(x[b, :, channel], W[channel], state[b, :, channel])
        np.testing.assert_allclose(y[b, :, channel], expected, rtol=1e-11, atol=1e-13)
    assert np.array_equal(state_end, np.concatenate([state, x], 1)[:, -(K - 1):])


def test_no_state_is_a_state_of_zeros():
    x = RNG.standard_normal((2, 5, 7))
    without, with_zeros = (ops.causal_conv1d_forward(x, W, state=s)[:2] for s in (None, np.zeros((2, K - 1, 7))))
    assert all(np.array_equal(a, b) for a, b in zip(without, with_zeros))


@pytest.mark.parametrize("split", range(10))
def test_every_split_with_the_state_carried_equals_one_run_forward_and_backward(split):
    x, state, dy = RNG.standard_normal((2, 9, 7)), RNG.standard_normal((2, K - 1, 7)), RNG.standard_normal((2, 9, 7))
    dstate_end = RNG.standard_normal((2, K - 1, 7))
    y, state_end, cache = ops.causal_conv1d_forward(x, W, state=state)
    dx, dw, dstate = ops.causal_conv1d_backward(dy, dstate_end, cache)

    y_1, middle, cache_1 = ops.causal_conv1d_forward(x[:, :split], W, state=state)
    y_2, end, cache_2 = ops.causal_conv1d_forward(x[:, split:], W, state=middle)
    assert np.array_equal(np.concatenate([y_1, y_2], 1), y) and np.array_equal(end, state_end)
    dx_2, dw_2, dmiddle = ops.causal_conv1d_backward(dy[:, split:], dstate_end, cache_2)
    dx_1, dw_1, dstart = ops.causal_conv1d_backward(dy[:, :split], dmiddle, cache_1)
    # the sums over taps are the same numbers in another order
    np.testing.assert_allclose(np.concatenate([dx_1, dx_2], 1), dx, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(dw_1 + dw_2, dw, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(dstart, dstate, rtol=1e-12, atol=1e-14)


def packed_run(x, state, dy, dstate_end):
    y, state_end, cache = ops.causal_conv1d_forward(x, W, state=state, cu_seqlens=CU)
    return y, state_end, *ops.causal_conv1d_backward(dy, dstate_end, cache)


def test_packed_sequences_equal_separate_runs_bit_for_bit():
    x, dy = RNG.standard_normal((2, 1, 11, 7))
    state, dstate_end = RNG.standard_normal((2, 5, K - 1, 7))
    y, state_end, dx, dw, dstate = packed_run(x, state, dy, dstate_end)
    dw_sum = np.zeros_like(W)
    for n, (start, stop) in enumerate(zip(CU, CU[1:])):
        y_n, end_n, cache = ops.causal_conv1d_forward(x[:, start:stop], W, state=state[n:n + 1])
        dx_n, dw_n, dstate_n = ops.causal_conv1d_backward(dy[:, start:stop], dstate_end[n:n + 1], cache)
        dw_sum += dw_n
        assert np.array_equal(y_n, y[:, start:stop]) and np.array_equal(end_n[0], state_end[n])
        assert np.array_equal(dx_n, dx[:, start:stop]) and np.array_equal(dstate_n[0], dstate[n])
    assert np.array_equal(dw_sum, dw)


@pytest.mark.parametrize("moved", [n for n in range(5) if CU[n] < CU[n + 1]])
def test_a_packed_sequence_does_not_touch_the_others(moved):
    x, dy = RNG.standard_normal((2, 1, 11, 7))
    state, dstate_end = RNG.standard_normal((2, 5, K - 1, 7))
    before = packed_run(x, state, dy, dstate_end)
    tokens = slice(CU[moved], CU[moved + 1])
    for array, index in ((x, (0, tokens)), (dy, (0, tokens)), (state, moved), (dstate_end, moved)):
        array[index] += 1
    after = packed_run(x, state, dy, dstate_end)
    others = np.arange(5) != moved
    elsewhere = np.ones(11, bool)
    elsewhere[tokens] = False
    for result, index in ((0, (0, elsewhere)), (1, others), (2, (0, elsewhere)), (4, others)):
        assert np.array_equal(before[result][index], after[result][index])
    assert not np.array_equal(before[0][0, tokens], after[0][0, tokens])


def test_without_dstate_end_it_is_zero_and_without_need_dw_no_dw():
    x, state, dy = RNG.standard_normal((2, 5, 7)), RNG.standard_normal((2, K - 1, 7)), RNG.standard_normal((2, 5, 7))
    _, _, cache = ops.causal_conv1d_forward(x, W, state=state)
    dx, _, dstate = ops.causal_conv1d_backward(dy, np.zeros_like(state), cache)
    found = ops.causal_conv1d_backward(dy, None, cache, need_dw=False)
    assert found[1] is None
    assert np.array_equal(found[0], dx) and np.array_equal(found[2], dstate)


@pytest.mark.parametrize("options, remedy", [
    ({"w": np.ones((3, K))}, r"w must be \(ch, K\) = \(7, 4\)"),
    ({"state": np.ones((1, K, 7))}, r"\(N_seq, K-1, ch\) = \(1, 3, 7\)"),
    ({"state": np.ones((1, 3, 7)), "cu_seqlens": CU}, r"\(5, 3, 7\)"),
    ({"cu_seqlens": np.array([0, 4, 10])}, "L = 11"),
])
def test_shapes_that_do_not_fit_are_refused_with_the_remedy(options, remedy):
    with pytest.raises(InputError, match=remedy):
        ops.causal_conv1d_forward(np.ones((1, 11, 7)), options.pop("w", W), **options)
