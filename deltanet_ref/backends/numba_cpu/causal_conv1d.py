"""Causal convolution and SiLU in one pass: a task computes TILE channels at all tokens of all sequences.

Mathematics: docs/derivations/causal-conv.md. Backward recomputes the convolution. A task owns its channels, so weight
gradients need no sum over tasks.
"""
from typing import NamedTuple

import numpy as np

from deltanet_ref import ops
from deltanet_ref.backends.numba_cpu.arrays import heads, row, same_float
from deltanet_ref.backends.numba_cpu.compiler import inlined, kernel
from deltanet_ref.backends.numba_cpu.elementary import sigmoid, silu_derivative
from deltanet_ref.ops.sequences import sequence_boundaries

TILE = 512                    # channels of a task: its data of one token stays in the first-level cache


class CausalConv1dCache(NamedTuple):
    """Kept by causal_conv1d_forward; the convolution before SiLU is recomputed."""
    x: np.ndarray             # (B, L, ch)
    w: np.ndarray             # (ch, K)
    state: np.ndarray         # (N_seq, K-1, ch)
    cu_seqlens: np.ndarray    # (N_seq + 1,), also for a dense batch


def causal_conv1d_forward(x, w, *, state=None, cu_seqlens=None):
    """y, state_end, cache: arguments, returns and errors as ops.causal_conv1d_forward."""
    same_float(x, w, state)
    boundaries = sequence_boundaries(*x.shape[:2], cu_seqlens)
    shape = (len(boundaries) - 1, w.shape[1] - 1, x.shape[2])
    if len(w) != x.shape[2] or state is not None and state.shape != shape:
        return ops.causal_conv1d_forward(x, w, state=state, cu_seqlens=cu_seqlens)         # refuses with the remedy
    state = np.zeros(shape, x.dtype) if state is None else state
    y, state_end = np.empty(x.shape, x.dtype), np.empty(shape, x.dtype)
    _forward(_tiles(x), _tokens(x), _taps(w), state, boundaries, _tokens(y), state_end)
    return y, state_end, CausalConv1dCache(x, w, state, boundaries)


def causal_conv1d_backward(dy, dstate_end, cache, need_dw=True):
    """dx, dw (None without need_dw), dstate: as ops.causal_conv1d_backward."""
    x, w, state, boundaries = cache
    same_float(dy, x, dstate_end)
    dx, dtaps, dstate = np.zeros(x.shape, x.dtype), np.zeros(w.shape[::-1], x.dtype), np.zeros(state.shape, x.dtype)
    dstate_end = np.zeros(state.shape, x.dtype) if dstate_end is None else dstate_end
    _backward(_tiles(x), _tokens(dy), dstate_end, _tokens(x), _taps(w), state, boundaries, need_dw, _tokens(dx), dtaps,
              dstate)
    return dx, np.ascontiguousarray(dtaps.T) if need_dw else None, dstate


def _tiles(x):
    return -(-x.shape[2] // TILE)


def _tokens(x):
    """(B, L, ch) as (B L, 1, ch)."""
    return heads(x[:, :, None])


def _taps(w):
    """(ch, K) as (K, ch): the weights of one tap next to one another."""
    return np.ascontiguousarray(w.T)


@kernel("r3 r2 r3 i1 w3 w3")
def _forward(first, last, x, taps, state, cu_seqlens, y, state_end):
    for tile in range(first, last):
        low, high = tile * TILE, min(tile * TILE + TILE, x.shape[2])
        for n in range(len(state)):
            start, end = cu_seqlens[n], cu_seqlens[n + 1]
            for t in range(start, end):
                convolve_silu(x, taps[:, low:high], state, n, start, t, low, row(y, t, 0)[low:high])
            keep_inputs(x, state, n, start, end, low, high, state_end)


@kernel("r3 r3 r3 r2 r3 i1 i w3 w2 w3")
def _backward(first, last, dy, dstate_end, x, taps, state, cu_seqlens, need_dw, dx, dtaps, dstate):
    """Each token of the convolution adds to the gradients of the inputs that it read, in dx and dstate, and to dtaps;
    all three are zero at first."""
    K, buffer = len(taps), np.empty(TILE, x.dtype)
    for tile in range(first, last):
        low, high = tile * TILE, min(tile * TILE + TILE, x.shape[2])
        dc = buffer[:high - low]
        for n in range(len(state)):
            start, end = cu_seqlens[n], cu_seqlens[n + 1]
            for t in range(start, end):
                dy_t = row(dy, t, 0)[low:high]
                _convolve(x, taps[:, low:high], state, n, start, t, low, dc)
                for m in range(len(dc)):
                    dc[m] = dy_t[m] * silu_derivative(dc[m], sigmoid(dc[m]))
                for i in range(K):
                    tap, dseen = row(taps, i)[low:high], _at(dx, dstate, n, start, t - (K - 1) + i)[low:high]
                    for m in range(len(dc)):
                        dseen[m] += tap[m] * dc[m]
                    if need_dw:
                        dtap, seen = row(dtaps, i)[low:high], _at(x, state, n, start, t - (K - 1) + i)[low:high]
                        for m in range(len(dc)):
                            dtap[m] += seen[m] * dc[m]
            for i in range(K - 1):
                dseen, dkept = _at(dx, dstate, n, start, end - (K - 1) + i)[low:high], row(dstate_end, n, i)[low:high]
                for m in range(len(dseen)):
                    dseen[m] += dkept[m]


@inlined
def convolve_silu(x, taps, state, n, start, t, low, y):
    """y = SiLU of the convolution at token t of sequence n, which starts at `start`, for channels low, low + 1, ...

    x (T, 1, ch), state (N, K-1, ch); y (c,) and taps (K, c) with those channels only
    """
    _convolve(x, taps, state, n, start, t, low, y)
    for m in range(len(y)):
        y[m] *= sigmoid(y[m])


@inlined
def keep_inputs(x, state, n, start, end, low, high, state_end):
    """state_end = the last K-1 inputs of sequence n, tokens start .. end - 1, for channels low .. high - 1."""
    K = state.shape[1] + 1
    for i in range(K - 1):
        seen, kept = _at(x, state, n, start, end - (K - 1) + i)[low:high], row(state_end, n, i)[low:high]
        for m in range(len(kept)):
            kept[m] = seen[m]


@inlined
def _convolve(x, taps, state, n, start, t, low, c):
    """c = sum over i of w_i x_{t - (K-1) + i}."""
    K = len(taps)
    for i in range(K):
        tap, seen = row(taps, i), _at(x, state, n, start, t - (K - 1) + i)[low:low + len(c)]
        if i == 0:
            for m in range(len(c)):
                c[m] = tap[m] * seen[m]
        else:
            for m in range(len(c)):
                c[m] += tap[m] * seen[m]


@inlined
def _at(x, state, n, start, t):
    """The row of token t, from the state of sequence n if t lies before its start."""
    return row(x, t, 0) if t >= start else row(state, n, state.shape[1] + t - start)
