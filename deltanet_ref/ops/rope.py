"""Partial rotary embedding with interleaved sections. Derivation: docs/derivations/rope.md.

Source: Su et al. 2021, "RoFormer", eq. 34; pairs (j, j + rotary_dim/2). The sections are those of Qwen3-VL.
"""
import numpy as np

from deltanet_ref.errors import InputError


def rope_tables(positions, rotary_dim, theta, sections=None, dtype=np.float32):
    """cos and sin of position * theta^(-2 j / rotary_dim) [rope.1..2]; angles in float64, results in dtype.

    positions   (L,) text, or (3, L) time, height, width of each token
    rotary_dim  features that are rotated, an even number
    sections    frequencies per axis (t, h, w); needed for (3, L). Frequency j follows h if j % 3 == 1 and
                j < 3 sections[1], w if j % 3 == 2 and j < 3 sections[2], else t
    returns     cos, sin (L, rotary_dim / 2)
    raises      InputError for an odd rotary_dim or positions of another shape
    """
    positions = np.asarray(positions, np.float64)
    frequency, axis = frequencies(positions.shape, rotary_dim, theta, sections)
    angle = positions.reshape(-1, positions.shape[-1])[axis].T * frequency
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


def frequencies(shape, rotary_dim, theta, sections):
    """theta^(-2 j / rotary_dim), float64, and the axis of positions of this shape that j follows, 0 .. 2; errors as
    above. Both (rotary_dim / 2,)."""
    if rotary_dim % 2:
        raise InputError(f"rotary_dim is {rotary_dim}; features are rotated in pairs, so it must be even")
    if len(shape) == 2 and (shape[0] != 3 or sections is None):
        raise InputError(f"positions have shape {shape}; they must be (L,), or (3, L) with sections")
    j = np.arange(rotary_dim // 2)
    axis = np.zeros_like(j)
    if len(shape) == 2:
        axis[(j % 3 == 1) & (j < 3 * sections[1])] = 1
        axis[(j % 3 == 2) & (j < 3 * sections[2])] = 2
    return theta ** (-2 * j / rotary_dim), axis


def rope_forward(x, cos, sin):
    """Rotate the pairs (x_j, x_{j + R/2}) of the first R features by the token's angle; the rest is unchanged [rope.3].

    x (B, L, H, d), cos, sin (L, R/2) -> y (B, L, H, d). Raises InputError when the tables do not fit.
    """
    half = cos.shape[1]
    if len(cos) != x.shape[1] or 2 * half > x.shape[3]:
        raise InputError(f"the rotary tables are {cos.shape} and x {x.shape}; they must be (L, R/2) with R <= d")
    cos, sin = cos[:, None], sin[:, None]                                  # over heads
    first, second = x[..., :half], x[..., half:2 * half]
    y = x.copy()
    y[..., :half] *= cos
    y[..., :half] -= second * sin
    y[..., half:2 * half] *= cos
    y[..., half:2 * half] += first * sin
    return y


def rope_backward(dy, cos, sin):
    """dx: the rotation by the opposite angle [rope.5]. dy (B, L, H, d), cos, sin (L, R/2) -> dx (B, L, H, d)."""
    return rope_forward(dy, cos, -sin)
