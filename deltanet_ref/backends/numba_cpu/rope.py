"""Partial rotary embedding, one pass. Mathematics: docs/derivations/rope.md."""
import numpy as np

from deltanet_ref import ops
from deltanet_ref.backends.numba_cpu.arrays import blocks_of, heads, row, rows_of, same_float
from deltanet_ref.backends.numba_cpu.compiler import kernel


def rope_forward(x, cos, sin):
    """y: as ops.rope_forward."""
    same_float(x, cos, sin)
    if len(cos) != x.shape[1] or 2 * cos.shape[1] > x.shape[3]:
        return ops.rope_forward(x, cos, sin)                               # refuses with the remedy
    y = np.empty(x.shape, x.dtype)
    _rope(blocks_of(x), heads(x), cos, sin, heads(y))
    return y


def rope_backward(dy, cos, sin):
    """dx: as ops.rope_backward, the rotation by the opposite angle."""
    return rope_forward(dy, cos, -sin)


@kernel("r3 r2 r2 w3")
def _rope(first, last, x, cos, sin, y):
    L, half = cos.shape
    for i in rows_of(x, first, last):
        t, h = i // x.shape[1], i % x.shape[1]
        x_i, y_i, cos_t, sin_t = row(x, t, h), row(y, t, h), row(cos, t % L), row(sin, t % L)
        a, b, rest = x_i[:half], x_i[half:2 * half], x_i[2 * half:]
        new_a, new_b, new_rest = y_i[:half], y_i[half:2 * half], y_i[2 * half:]
        for j in range(half):                      # a loop for each half: LLVM does not vectorise one for both
            new_a[j] = a[j] * cos_t[j] - b[j] * sin_t[j]
        for j in range(half):
            new_b[j] = b[j] * cos_t[j] + a[j] * sin_t[j]
        for j in range(len(rest)):
            new_rest[j] = rest[j]
