"""L2 norm, RMS norm and gated RMS norm: rows in registers. Mathematics: docs/derivations/norms.md.

Kernels: kernels/rms_norm.cu, kernels/l2_norm.cu.
"""

from typing import Any, NamedTuple

import numpy as np

from deltanet_ref.backends.cuda.layout import PARTS, THREADS, blocks, column_sums, real, row_macros, rows, wide
from deltanet_ref.errors import InputError


class L2NormCache(NamedTuple):
    """Kept by l2_norm_forward; backward does not need x."""

    y: Any  # (..., d)
    r: Any  # (..., 1) float32, the factor 1 / sqrt(sum x^2 + eps)


class RMSNormCache(NamedTuple):
    """Kept by rms_norm_forward; the normalised rows n = x r are recomputed."""

    x: Any  # (..., d)
    r: Any  # (..., 1) float32, the factor 1 / sqrt(mean x^2 + eps)
    w: Any  # (d,) float32


class GatedRMSNormCache(NamedTuple):
    """Kept by gated_rms_norm_forward; n = x r and SiLU(z) are recomputed."""

    x: Any  # (..., d)
    z: Any  # (..., d)
    r: Any  # (..., 1) float32
    w: Any  # (d,) float32


def l2_norm_forward(device, x, eps=1e-6):
    """y = x / sqrt(sum(x^2) + eps), cache: as ops.l2_norm_forward."""
    y, r = _results(device, x, real(device, x))
    x = rows(device, x)
    _launch(device, "l2_norm", "l2_norm_forward", [x], [y], [*x.arguments, eps, x.count, x.d, y, r])
    return y, L2NormCache(y, r)


def l2_norm_backward(device, dy, cache):
    """dx = r (dy - y (y . dy)): as ops.l2_norm_backward."""
    y, r = cache
    dx = device.empty(y.shape, real(device, dy, y))
    dy = rows(device, dy)
    _launch(device, "l2_norm", "l2_norm_backward", [dy], [y, dx], [*dy.arguments, y, r, dy.count, dy.d, dx])
    return dx


def rms_norm_forward(device, x, w, eps):
    """y = x / sqrt(mean(x^2) + eps) * w, cache: as ops.rms_norm_forward; w and r are float32."""
    w = _weight(device, x, w)
    y, r = _results(device, x, real(device, x))
    cache = RMSNormCache(x, r, w)
    x = rows(device, x)
    _launch(device, "rms_norm", "rms_norm_forward", [x], [w, y], [*x.arguments, w, eps, x.count, x.d, y, r])
    return y, cache


def rms_norm_backward(device, dy, cache, need_dw=True):
    """dx, dw (float32, None without need_dw): as ops.rms_norm_backward."""
    x, r, w = cache
    dx = device.empty(x.shape, real(device, dy, x))
    dy, x = device.contiguous(dy), rows(device, x)
    arguments = [dy, *x.arguments, r, w, x.count, x.d, dx]
    dw = _backward(device, "rms_norm_backward", [x], [dy, w, dx], arguments, need_dw)
    return dx, dw


def gated_rms_norm_forward(device, x, z, w, eps):
    """y = rms_norm(x) * w * SiLU(z), cache: as ops.gated_rms_norm_forward; w and r are float32."""
    if z.shape != x.shape:
        raise InputError(f"the gate z has shape {z.shape}; it must be that of x, {x.shape}")
    w = _weight(device, x, w)
    y, r = _results(device, x, real(device, x, z))
    cache = GatedRMSNormCache(x, z, r, w)
    x, z = rows(device, x), rows(device, z)
    arguments = [*x.arguments, *z.arguments, w, eps, x.count, x.d, y, r]
    _launch(device, "rms_norm", "gated_rms_norm_forward", [x, z], [w, y], arguments)
    return y, cache


def gated_rms_norm_backward(device, dy, cache, need_dw=True):
    """dx, dz, dw (float32, None without need_dw): as ops.gated_rms_norm_backward."""
    x, z, r, w = cache
    dx, dz = (device.empty(x.shape, real(device, dy, x, z)) for _ in "xz")
    dy, x, z = device.contiguous(dy), rows(device, x), rows(device, z)
    arguments = [dy, *x.arguments, *z.arguments, r, w, x.count, x.d, dx, dz]
    dw = _backward(device, "gated_rms_norm_backward", [x, z], [dy, w, dx, dz], arguments, need_dw)
    return dx, dz, dw


def _weight(device, x, w):
    if w.shape != x.shape[-1:]:
        raise InputError(
            f"the norm's weight has shape {w.shape}; it must be ({x.shape[-1]},), one value per feature of x"
        )
    wide(device, w)
    return device.contiguous(w)


def _results(device, x, dtype):
    """y shaped as x, and r (..., 1) float32."""
    return device.empty(x.shape, dtype), device.empty((*x.shape[:-1], 1), np.float32)


def _launch(device, file, name, strided, arrays, arguments):
    """Launch a kernel with one block for each of its groups of rows. strided: its Rows; arrays: the other arrays that
    are read or written in wide accesses."""
    macros = _macros(strided, arrays)
    grid = blocks(strided[0].count, THREADS // macros["LANES"])
    device.launch(device.kernel(file, name, **macros), grid, THREADS, *arguments)


def _backward(device, name, strided, arrays, arguments, need_dw):
    """Launch a backward kernel of RMS norms; returns dw, or None without need_dw."""
    if not need_dw:
        return _launch(device, "rms_norm", name, strided, arrays, [*arguments, None])
    count, d = strided[0].count, strided[0].d
    if not count:
        return device.zeros(d, np.float32)
    macros = _macros(strided, arrays)
    groups = THREADS // macros["LANES"]
    kernel = device.kernel("rms_norm", name, shared=4 * groups * d if groups > 1 else 0, **macros)
    parts = device.empty((min(blocks(count, groups), PARTS), d), np.float32)
    device.launch(kernel, len(parts), THREADS, *arguments, parts)
    return column_sums(device, parts)


def _macros(strided, arrays):
    first = strided[0]
    strides = [stride for x in strided for stride in (x.token_stride, x.head_stride)]
    return row_macros(first.memory.dtype, first.d, strides, *(x.memory for x in strided), *arrays)
