"""Causal depthwise convolution, then SiLU, with carried state. Derivation: docs/derivations/causal-conv.md."""
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.ops.elementwise import silu, silu_derivative
from deltanet_ref.ops.sequences import sequence_boundaries


class CausalConv1dCache(NamedTuple):
    """Kept by causal_conv1d_forward; SiLU's derivative is recomputed from c."""
    x: np.ndarray             # (B, L, ch)
    w: np.ndarray             # (ch, K)
    state: np.ndarray         # (N_seq, K-1, ch) the inputs before each sequence; N_seq is B when nothing is packed
    c: np.ndarray             # (B, L, ch) the convolution before SiLU
    cu_seqlens: np.ndarray    # (N_seq + 1,) or None


def causal_conv1d_forward(x, w, *, state=None, cu_seqlens=None):
    """y_t = SiLU(sum over i of w_i x_{t - (K-1) + i}), channel by channel [conv.1..3].

    x           (B, L, ch)
    w           (ch, K); w[:, K-1] multiplies the current token
    state       (N_seq, K-1, ch) the last K-1 inputs before each sequence, oldest first; None for zeros
    cu_seqlens  (N_seq + 1,) start of each packed sequence, with B = 1; N_seq is B without it
    returns     y (B, L, ch), state_end shaped as state, cache
    raises      InputError for shapes that do not fit
    """
    B, L, channels = x.shape
    K = w.shape[1]
    if len(w) != channels:
        raise InputError(f"the kernel w is {w.shape} and x {x.shape}; w must be (ch, K) = ({channels}, {K})")
    N_seq = len(sequence_boundaries(B, L, cu_seqlens)) - 1
    if state is None:
        state = np.zeros((N_seq, K - 1, channels), x.dtype)
    elif state.shape != (N_seq, K - 1, channels):
        raise InputError(f"state has shape {state.shape}; it must be (N_seq, K-1, ch) = {(N_seq, K - 1, channels)}")
    c, state_end = np.empty_like(x), np.empty_like(state)
    for seq, row, span in _sequences(cu_seqlens, L):
        padded = np.concatenate([state[seq], x[row, span]], 1)             # 1  the sequence after its state
        c[row, span] = _correlate(padded, w)                               # 2  c_t = sum_i w_i padded_{t+i}
        state_end[seq] = padded[:, padded.shape[1] - (K - 1):]             #    the last K-1 inputs
    y = silu(c)                                                            # 3  y = SiLU(c)
    return y, state_end, CausalConv1dCache(x, w, state, c, cu_seqlens)


def causal_conv1d_backward(dy, dstate_end, cache, need_dw=True):
    """Gradients of causal_conv1d_forward [conv.4..7].

    dy (B, L, ch), dstate_end (N_seq, K-1, ch) or None for zeros
    returns dx (B, L, ch), dw (ch, K) or None without need_dw, dstate (N_seq, K-1, ch)
    """
    x, w, state, c, cu_seqlens = cache
    L, K = x.shape[1], w.shape[1]
    # 3  y = SiLU(c)
    dc = silu_derivative(c)
    dc *= dy
    dx, dstate, dw = np.empty_like(x), np.empty_like(state), np.zeros_like(w)
    for seq, row, span in _sequences(cu_seqlens, L):
        # 2  c_t = sum_i w_i padded_{t+i}; state_end = the last K-1 of padded
        dpadded = _correlate_backward_input(dc[row, span], w)
        if dstate_end is not None:
            dpadded[:, dpadded.shape[1] - (K - 1):] += dstate_end[seq]
        if need_dw:
            dw += _correlate_backward_weight(dc[row, span], np.concatenate([state[seq], x[row, span]], 1))
        # 1  padded = state, then the sequence
        dstate[seq], dx[row, span] = dpadded[:, :K - 1], dpadded[:, K - 1:]
    return dx, dw if need_dw else None, dstate


def _sequences(cu_seqlens, L):
    """(index into states, row of the batch, tokens) of each sequence; a dense batch is one entry with all its rows."""
    if cu_seqlens is None:
        return [(slice(None), slice(None), slice(0, L))]
    return [(slice(n, n + 1), slice(0, 1), slice(start, stop))
            for n, (start, stop) in enumerate(zip(cu_seqlens, cu_seqlens[1:]))]


def _correlate(padded, w):
    """c_t = sum_i w_i padded_{t+i}. padded (b, K-1+l, ch), w (ch, K) -> c (b, l, ch)."""
    K = w.shape[1]
    length = padded.shape[1] - (K - 1)
    taps = np.ascontiguousarray(w.T)
    c = padded[:, :length] * taps[0]
    product = np.empty_like(c)
    for i in range(1, K):
        c += np.multiply(padded[:, i:i + length], taps[i], out=product)
    return c


def _correlate_backward_input(dc, w):
    """dpadded_{t+i} += w_i dc_t. dc (b, l, ch), w (ch, K) -> dpadded (b, K-1+l, ch)."""
    b, length, channels = dc.shape
    K = w.shape[1]
    taps = np.ascontiguousarray(w.T)
    dpadded = np.zeros((b, K - 1 + length, channels), dc.dtype)
    product = np.empty_like(dc)
    for i in range(K):
        dpadded[:, i:i + length] += np.multiply(dc, taps[i], out=product)
    return dpadded


def _correlate_backward_weight(dc, padded):
    """dw_i = sum over rows and t of dc_t padded_{t+i}. dc (b, l, ch), padded (b, K-1+l, ch) -> dw (ch, K)."""
    length = dc.shape[1]
    K = padded.shape[1] - length + 1
    return np.stack([np.einsum("blc,blc->c", dc, padded[:, i:i + length]) for i in range(K)], 1)
