"""Partial rotary embedding, one pass. Mathematics: docs/derivations/rope.md. Kernels: kernels/rope.cu."""

import numpy as np

from deltanet_ref.backends.cuda.layout import THREADS, blocks, real, rows, vector, wide
from deltanet_ref.errors import InputError
from deltanet_ref.ops.rope import frequencies


def rope_tables(device, positions, rotary_dim, theta, sections=None, dtype=np.float32):
    """cos, sin (L, rotary_dim / 2): as ops.rope_tables, from float64 angles. They are float32 for any dtype of
    activations."""
    if np.dtype(dtype) not in (np.dtype(np.float32), device.bf16):
        raise InputError(f"the cuda backend rotates float32 and bfloat16, not {np.dtype(dtype)}")
    positions = np.asarray(positions)
    frequency, axis = frequencies(positions.shape, rotary_dim, theta, sections)
    L, half = positions.shape[-1], rotary_dim // 2
    cos, sin = (device.empty((L, half), np.float32) for _ in range(2))
    kernel = device.kernel("rope", "rope_tables", REAL=np.float32, VECTOR=1)
    turns, axis = device.upload(frequency / (2 * np.pi), np.float64), device.upload(axis, np.int32)
    positions = device.upload(positions, np.float64)
    device.launch(kernel, blocks(L * half, THREADS), THREADS, positions, L, turns, axis, half, cos, sin)
    return cos, sin


def rope_forward(device, x, cos, sin):
    """y: as ops.rope_forward; cos and sin are float32."""
    return _rotate(device, x, cos, sin, 1.0)


def rope_backward(device, dy, cos, sin):
    """dx: as ops.rope_backward, the rotation by the opposite angle."""
    return _rotate(device, dy, cos, sin, -1.0)


def _rotate(device, x, cos, sin, direction):
    L, half = cos.shape
    if L != x.shape[1] or 2 * half > x.shape[3]:
        raise InputError(f"the rotary tables are {cos.shape} and x {x.shape}; they must be (L, R/2) with R <= d")
    wide(device, cos, sin)
    cos, sin = map(device.contiguous, (cos, sin))
    y = device.empty(x.shape, real(device, x))
    x = rows(device, x)
    width = vector(y.dtype, [x.d, half, x.token_stride, x.head_stride], x.memory, cos, sin, y)
    kernel = device.kernel("rope", "rope", REAL=y.dtype, VECTOR=width)
    grid = blocks(x.count * (x.d - half) // width, THREADS)
    device.launch(kernel, grid, THREADS, *x.arguments, cos, sin, direction, L, half, x.count, x.d, y)
    return y
