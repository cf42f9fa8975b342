"""Causal convolution and SiLU in one pass over runs of tokens. Mathematics: docs/derivations/causal-conv.md.

Kernels: kernels/causal_conv1d.cu.
"""

from typing import Any, NamedTuple

import numpy as np

from deltanet_ref.backends.cuda.layout import blocks, column_sums, real, vector, wide
from deltanet_ref.errors import InputError
from deltanet_ref.ops.sequences import sequence_boundaries

THREADS = 128  # of a block
RUN, RUN_BACKWARD = 16, 32  # tokens of a thread: K - 1 more are read, in backward computed
PARTS = 64  # runs that sum dw, at most


class CausalConv1dCache(NamedTuple):
    """Kept by causal_conv1d_forward; the convolution before SiLU is recomputed."""

    x: Any  # (B, L, ch)
    w: Any  # (ch, K) float32
    state: Any  # (N_seq, K-1, ch), or None for zeros
    cu_seqlens: Any  # (N_seq + 1,) int32, also for a dense batch


def causal_conv1d_forward(device, x, w, *, state=None, cu_seqlens=None):
    """y, state_end, cache: arguments, returns and errors as ops.causal_conv1d_forward; w is float32."""
    (B, L, channels), (rows, K) = x.shape, w.shape
    if rows != channels:
        raise InputError(f"the kernel w is {w.shape} and x {x.shape}; w must be (ch, K) = ({channels}, {K})")
    boundaries = sequence_boundaries(B, L, cu_seqlens)
    shape = (len(boundaries) - 1, K - 1, channels)
    if state is not None and state.shape != shape:
        raise InputError(f"state has shape {state.shape}; it must be (N_seq, K-1, ch) = {shape}")
    dtype = real(device, x, state)
    wide(device, w)
    x, w, state = (None if a is None else device.contiguous(a) for a in (x, w, state))
    y, state_end = device.empty(x.shape, dtype), device.empty(shape, dtype)
    cache = CausalConv1dCache(x, w, state, device.upload(boundaries, np.int32))
    _launch(device, "causal_conv1d_forward", cache, RUN, [x, w, state], [y, state_end])
    return y, state_end, cache


def causal_conv1d_backward(device, dy, dstate_end, cache, need_dw=True):
    """dx, dw (float32, None without need_dw), dstate: as ops.causal_conv1d_backward."""
    x, w, state, cu_seqlens = cache
    dtype, T = real(device, dy, dstate_end, x), x.shape[0] * x.shape[1]
    dy, dstate_end = (None if a is None else device.contiguous(a) for a in (dy, dstate_end))
    dx = device.empty(x.shape, dtype)
    dstate = device.empty((len(cu_seqlens) - 1, w.shape[1] - 1, x.shape[2]), dtype)
    run = max(RUN_BACKWARD, blocks(T, PARTS)) if need_dw else RUN_BACKWARD
    parts = device.empty((blocks(T, run), *w.shape), np.float32) if need_dw else None
    _launch(device, "causal_conv1d_backward", cache, run, [dy, dstate_end, x, w, state], [dx, dstate, parts])
    return dx, column_sums(device, parts) if need_dw else None, dstate


def _launch(device, name, cache, run, inputs, results):
    x, w, _, cu_seqlens = cache
    (B, L, channels), K, count = x.shape, w.shape[1], len(cu_seqlens) - 1
    width = vector(x.dtype, [channels], *inputs, *results)
    runs = blocks(B * L, run)
    grid = blocks(channels, width * THREADS), runs + count
    kernel = device.kernel("causal_conv1d", name, REAL=x.dtype, VECTOR=width, TAPS=K)
    device.launch(kernel, grid, THREADS, *inputs, cu_seqlens, count, B * L, channels, run, runs, *results)
