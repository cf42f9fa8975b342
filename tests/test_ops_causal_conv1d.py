"""The causal convolution against scipy's linear filter, and its memory: state, splits, packed sequences."""

import numpy as np
import pytest
from scipy.signal import lfilter, lfiltic
from scipy.special import expit

from deltanet_ref import ops
from deltanet_ref.errors import InputError
from tests.tolerances import assert_identical, assert_within, rounding

RNG = np.random.default_rng(4)
K = 4
W = RNG.standard_normal((7, K))
# Sums of up to 2 x 9 products of normal numbers (below 4 here) and of SiLU or its derivative (below 1.1): on both sides
SUMS = rounding(2 * 18) * 18 * 4 * 4 * 1.1
CU = np.array([0, 1, 3, 3, 6, 11])  # lengths 1, 2, 0, 3, 5 for a kernel of 4


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
        assert_within(f"y of channel {channel}", y[b, :, channel], expected, SUMS)
    assert_identical("state_end", state_end, np.concatenate([state, x], 1)[:, -(K - 1) :])


def test_no_state_is_a_state_of_zeros():
    x = RNG.standard_normal((2, 5, 7))
    without, with_zeros = (ops.causal_conv1d_forward(x, W, state=s)[:2] for s in (None, np.zeros((2, K - 1, 7))))
    for name, a, b in zip(("y", "state_end"), without, with_zeros, strict=True):
        assert_identical(name, a, b)


@pytest.mark.parametrize("split", range(10))
def test_every_split_with_the_state_carried_equals_one_run_forward_and_backward(split):
    x, state, dy = RNG.standard_normal((2, 9, 7)), RNG.standard_normal((2, K - 1, 7)), RNG.standard_normal((2, 9, 7))
    dstate_end = RNG.standard_normal((2, K - 1, 7))
    y, state_end, cache = ops.causal_conv1d_forward(x, W, state=state)
    dx, dw, dstate = ops.causal_conv1d_backward(dy, dstate_end, cache)

    y_1, middle, cache_1 = ops.causal_conv1d_forward(x[:, :split], W, state=state)
    y_2, end, cache_2 = ops.causal_conv1d_forward(x[:, split:], W, state=middle)
    assert_identical("y", np.concatenate([y_1, y_2], 1), y)
    assert_identical("state_end", end, state_end)
    dx_2, dw_2, dmiddle = ops.causal_conv1d_backward(dy[:, split:], dstate_end, cache_2)
    dx_1, dw_1, dstart = ops.causal_conv1d_backward(dy[:, :split], dmiddle, cache_1)
    # the same sums, over taps or over 2 x 9 tokens, in another order
    assert_within("dx", np.concatenate([dx_1, dx_2], 1), dx, SUMS)
    assert_within("dw", dw_1 + dw_2, dw, SUMS)
    assert_within("dstate", dstart, dstate, SUMS)


def packed_run(x, state, dy, dstate_end):
    y, state_end, cache = ops.causal_conv1d_forward(x, W, state=state, cu_seqlens=CU)
    return y, state_end, *ops.causal_conv1d_backward(dy, dstate_end, cache)


def test_packed_sequences_equal_separate_runs_bit_for_bit():
    x, dy = RNG.standard_normal((2, 1, 11, 7))
    state, dstate_end = RNG.standard_normal((2, 5, K - 1, 7))
    y, state_end, dx, dw, dstate = packed_run(x, state, dy, dstate_end)
    dw_sum = np.zeros_like(W)
    for n, (start, stop) in enumerate(zip(CU, CU[1:])):
        y_n, end_n, cache = ops.causal_conv1d_forward(x[:, start:stop], W, state=state[n : n + 1])
        dx_n, dw_n, dstate_n = ops.causal_conv1d_backward(dy[:, start:stop], dstate_end[n : n + 1], cache)
        dw_sum += dw_n
        for name, alone, packed in (
            ("y", y_n, y[:, start:stop]),
            ("state_end", end_n[0], state_end[n]),
            ("dx", dx_n, dx[:, start:stop]),
            ("dstate", dstate_n[0], dstate[n]),
        ):
            assert_identical(f"{name} of sequence {n}", packed, alone)
    assert_identical("dw", dw, dw_sum)


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
    for name, result, index in (
        ("y", 0, (0, elsewhere)),
        ("state_end", 1, others),
        ("dx", 2, (0, elsewhere)),
        ("dstate", 4, others),
    ):
        assert_identical(f"{name} of the others", after[result][index], before[result][index])
    assert not np.array_equal(before[0][0, tokens], after[0][0, tokens])


def test_without_dstate_end_it_is_zero_and_without_need_dw_no_dw():
    x, state, dy = RNG.standard_normal((2, 5, 7)), RNG.standard_normal((2, K - 1, 7)), RNG.standard_normal((2, 5, 7))
    _, _, cache = ops.causal_conv1d_forward(x, W, state=state)
    dx, _, dstate = ops.causal_conv1d_backward(dy, np.zeros_like(state), cache)
    found = ops.causal_conv1d_backward(dy, None, cache, need_dw=False)
    assert found[1] is None
    assert_identical("dx", found[0], dx)
    assert_identical("dstate", found[2], dstate)


@pytest.mark.parametrize(
    "options, remedy",
    [
        ({"w": np.ones((3, K))}, r"w must be \(ch, K\) = \(7, 4\)"),
        ({"state": np.ones((1, K, 7))}, r"\(N_seq, K-1, ch\) = \(1, 3, 7\)"),
        ({"state": np.ones((1, 3, 7)), "cu_seqlens": CU}, r"\(5, 3, 7\)"),
        ({"cu_seqlens": np.array([0, 4, 10])}, "L = 11"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_remedy(options, remedy):
    with pytest.raises(InputError, match=remedy):
        ops.causal_conv1d_forward(np.ones((1, 11, 7)), options.pop("w", W), **options)
