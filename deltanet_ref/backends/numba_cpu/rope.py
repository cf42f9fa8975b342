"""Partial rotary embedding, one pass. Mathematics: docs/derivations/rope.md."""
import numpy as np

from deltanet_ref import ops
from deltanet_ref.backends.numba_cpu.kernel import blocks_of, heads, kernel, row, rows_of, same_float


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
        for j in range(half):
            a, b = x_i[j], x_i[half + j]
            y_i[j] = a * cos_t[j] - b * sin_t[j]
            y_i[half + j] = b * cos_t[j] + a * sin_t[j]
        for j in range(2 * half, len(x_i)):
            y_i[j] = x_i[j]
