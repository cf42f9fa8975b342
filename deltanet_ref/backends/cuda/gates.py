"""Element-wise gates, one pass each: the decay gate, SwiGLU, the sigmoid gate of attention.

Mathematics: docs/derivations/gates.md, swiglu.md, attention.md. Backward recomputes everything from the inputs.
Kernels: kernels/decay_gate.cu, swiglu.cu, sigmoid_gate.cu.
"""

from typing import Any, NamedTuple

import numpy as np

from deltanet_ref.backends.cuda.layout import THREADS, blocks, column_sums, real, rows, vector, wide
from deltanet_ref.errors import InputError

PARTS = 256  # blocks of the decay gate
TOKENS = 16  # tokens of each of its blocks, at least


class DecayGateCache(NamedTuple):
    """Kept by decay_gate_forward."""

    a: Any  # (B, L, H_v)
    b: Any  # (B, L, H_v)
    A_log: Any  # (H_v,) float32
    dt_bias: Any  # (H_v,) float32


class SigmoidGateCache(NamedTuple):
    """Kept by sigmoid_gate_forward; sigmoid(gate) is recomputed."""

    o: Any  # (..., d)
    gate: Any  # (..., d)


class SwigluCache(NamedTuple):
    """Kept by swiglu_forward; sigmoid(gate) is recomputed."""

    gate: Any  # (..., F)
    up: Any  # (..., F)


# ---- decay gate


def decay_gate_forward(device, a, b, A_log, dt_bias):
    """g, beta (float32), cache: as ops.decay_gate_forward, g computed in float32; A_log and dt_bias are float32."""
    if b.shape != a.shape or A_log.shape != a.shape[-1:] or dt_bias.shape != a.shape[-1:]:
        raise InputError(
            f"a {a.shape}, b {b.shape}, A_log {A_log.shape}, dt_bias {dt_bias.shape} do not fit: "
            "a and b are (B, L, H_v), A_log and dt_bias (H_v,), per value head"
        )
    dtype = real(device, a, b)
    wide(device, A_log, dt_bias)
    a, b, A_log, dt_bias = map(device.contiguous, (a, b, A_log, dt_bias))
    g, beta = (device.empty(a.shape, np.float32) for _ in "gb")
    T, heads, tokens, grid = _decay_gate_blocks(a)
    kernel = device.kernel("decay_gate", "decay_gate_forward", REAL=dtype)
    device.launch(kernel, grid, THREADS, a, b, A_log, dt_bias, T, heads, tokens, g, beta)
    return g, beta, DecayGateCache(a, b, A_log, dt_bias)


def decay_gate_backward(device, dg, dbeta, cache, need_dw=True):
    """da, db, dA_log, ddt_bias, the last two float32, None without need_dw: as ops.decay_gate_backward."""
    a, b, A_log, dt_bias = cache
    wide(device, dg, dbeta)
    dg, dbeta = map(device.contiguous, (dg, dbeta))
    da, db = (device.empty(a.shape, a.dtype) for _ in "ab")
    T, heads, tokens, grid = _decay_gate_blocks(a)
    parts = device.empty((grid[0], 2, heads), np.float32) if need_dw else None
    kernel = device.kernel("decay_gate", "decay_gate_backward", REAL=a.dtype)
    device.launch(kernel, grid, THREADS, dg, dbeta, a, b, A_log, dt_bias, T, heads, tokens, da, db, parts)
    if not need_dw:
        return da, db, None, None
    dA_log, ddt_bias = column_sums(device, parts)
    return da, db, dA_log, ddt_bias


def _decay_gate_blocks(a):
    """Tokens, heads, tokens of a block, and the grid (blocks of tokens, blocks of heads)."""
    heads = a.shape[-1]
    T = a.size // heads
    tokens = max(TOKENS, blocks(T, PARTS))
    return T, heads, tokens, (blocks(T, tokens), blocks(heads, THREADS))


# ---- sigmoid gate


def sigmoid_gate_forward(device, o, gate):
    """y = o * sigmoid(gate), cache: as ops.sigmoid_gate_forward."""
    if gate.shape != o.shape:
        raise InputError(f"o has shape {o.shape} and its gate {gate.shape}; they must be the same")
    y = device.empty(o.shape, real(device, o, gate))
    cache = SigmoidGateCache(o, gate)
    _sigmoid_gate(device, "sigmoid_gate_forward", cache, [device.contiguous(o)], [y])
    return y, cache


def sigmoid_gate_backward(device, dy, cache):
    """do, dgate: as ops.sigmoid_gate_backward."""
    o, gate = cache
    do, dgate = (device.empty(o.shape, real(device, dy, o, gate)) for _ in "og")
    _sigmoid_gate(device, "sigmoid_gate_backward", cache, [device.contiguous(dy), device.contiguous(o)], [do, dgate])
    return do, dgate


def _sigmoid_gate(device, name, cache, inputs, results):
    o, gate = cache.o, rows(device, cache.gate)
    width = vector(o.dtype, [gate.d, gate.token_stride, gate.head_stride], gate.memory, *inputs, *results)
    kernel = device.kernel("sigmoid_gate", name, REAL=o.dtype, VECTOR=width)
    grid = blocks(o.size, THREADS * width)
    device.launch(kernel, grid, THREADS, *inputs, *gate.arguments, gate.d, np.int64(o.size), *results)


# ---- SwiGLU


def swiglu_forward(device, gate, up):
    """y = SiLU(gate) * up, cache: as ops.swiglu_forward."""
    if gate.shape != up.shape:
        raise InputError(f"gate has shape {gate.shape} and up {up.shape}; they must be the same")
    y = device.empty(gate.shape, real(device, gate, up))
    cache = SwigluCache(*map(device.contiguous, (gate, up)))
    _swiglu(device, "swiglu_forward", [*cache], [y])
    return y, cache


def swiglu_backward(device, dy, cache):
    """dgate, dup: as ops.swiglu_backward."""
    dgate, dup = (device.empty(cache.gate.shape, real(device, dy, *cache)) for _ in "gu")
    _swiglu(device, "swiglu_backward", [device.contiguous(dy), *cache], [dgate, dup])
    return dgate, dup


def _swiglu(device, name, inputs, results):
    size, dtype = results[0].size, results[0].dtype
    width = vector(dtype, [size], *inputs, *results)
    kernel = device.kernel("swiglu", name, REAL=dtype, VECTOR=width)
    device.launch(kernel, blocks(size, THREADS * width), THREADS, *inputs, np.int64(size), *results)
