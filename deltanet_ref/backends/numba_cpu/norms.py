"""L2 norm, RMS norm and gated RMS norm, one pass over each row. Mathematics: docs/derivations/norms.md.

Weight gradients are summed over fixed blocks of rows, then over the blocks in order, whatever the number of threads.
"""
import math

import numpy as np

from deltanet_ref import ops
from deltanet_ref.backends.numba_cpu.arrays import blocks_of, heads, row, rows_of, same_float
from deltanet_ref.backends.numba_cpu.compiler import inlined, kernel
from deltanet_ref.backends.numba_cpu.elementary import sigmoid, silu_derivative
from deltanet_ref.ops.l2_norm import L2NormCache
from deltanet_ref.ops.rms_norm import GatedRMSNormCache, RMSNormCache


def l2_norm_forward(x, eps=1e-6):
    """y = x / sqrt(sum(x^2) + eps), cache: as ops.l2_norm_forward."""
    same_float(x)
    y, r = np.empty(x.shape, x.dtype), np.empty((*x.shape[:-1], 1), x.dtype)
    _l2_norm(blocks_of(x), heads(x), eps, heads(y), heads(r))
    return y, L2NormCache(y, r)


def l2_norm_backward(dy, cache):
    """dx = r (dy - y (y . dy)): as ops.l2_norm_backward."""
    y, r = cache
    same_float(dy, y)
    dx = np.empty(y.shape, y.dtype)
    _l2_norm_backward(blocks_of(y), heads(dy), heads(y), heads(r), heads(dx))
    return dx


def rms_norm_forward(x, w, eps):
    """y = x / sqrt(mean(x^2) + eps) * w, cache: as ops.rms_norm_forward."""
    same_float(x, w)
    if w.shape != x.shape[-1:]:
        return ops.rms_norm_forward(x, w, eps)                             # refuses with the remedy
    y, r = np.empty(x.shape, x.dtype), np.empty((*x.shape[:-1], 1), x.dtype)
    _rms_norm(blocks_of(x), heads(x), w, eps, heads(y), heads(r))
    return y, RMSNormCache(x, r, w)


def rms_norm_backward(dy, cache, need_dw=True):
    """dx, dw (None without need_dw): as ops.rms_norm_backward."""
    x, r, w = cache
    same_float(dy, x)
    dx, dw = np.empty(x.shape, x.dtype), _partial_dw(x, need_dw)
    _rms_norm_backward(blocks_of(x), heads(dy), heads(x), heads(r), w, need_dw, heads(dx), dw)
    return dx, dw.sum(0) if need_dw else None


def gated_rms_norm_forward(x, z, w, eps):
    """y = rms_norm(x) * w * SiLU(z), cache: as ops.gated_rms_norm_forward."""
    same_float(x, z, w)
    if z.shape != x.shape or w.shape != x.shape[-1:]:
        return ops.gated_rms_norm_forward(x, z, w, eps)                    # refuses with the remedy
    y, r = np.empty(x.shape, x.dtype), np.empty((*x.shape[:-1], 1), x.dtype)
    _gated_rms_norm(blocks_of(x), heads(x), heads(z), w, eps, heads(y), heads(r))
    return y, GatedRMSNormCache(x, z, r, w)


def gated_rms_norm_backward(dy, cache, need_dw=True):
    """dx, dz, dw (None without need_dw): as ops.gated_rms_norm_backward."""
    x, z, r, w = cache
    same_float(dy, x)
    dx, dz, dw = np.empty(x.shape, x.dtype), np.empty(x.shape, x.dtype), _partial_dw(x, need_dw)
    _gated_rms_norm_backward(blocks_of(x), heads(dy), heads(x), heads(z), heads(r), w, need_dw, heads(dx), heads(dz),
                             dw)
    return dx, dz, dw.sum(0) if need_dw else None


def _partial_dw(x, need_dw):
    """Zeros for the sum of each block over its rows, (blocks, d); no blocks without need_dw."""
    return np.zeros((blocks_of(x) if need_dw else 0, x.shape[-1]), x.dtype)


@kernel("r3 f w3 w3")
def _l2_norm(first, last, x, eps, y, r):
    for i in rows_of(x, first, last):
        t, h = i // x.shape[1], i % x.shape[1]
        x_i, y_i = row(x, t, h), row(y, t, h)
        r_i = inverse_length(x_i, eps)
        r[t, h, 0] = r_i
        for m in range(len(x_i)):
            y_i[m] = x_i[m] * r_i


@kernel("r3 r3 r3 w3")
def _l2_norm_backward(first, last, dy, y, r, dx):
    for i in rows_of(y, first, last):
        t, h = i // y.shape[1], i % y.shape[1]
        dy_i, y_i, dx_i, r_i = row(dy, t, h), row(y, t, h), row(dx, t, h), r[t, h, 0]
        along = y.dtype.type(0)                                        # y . dy
        for m in range(len(y_i)):
            along += y_i[m] * dy_i[m]
        for m in range(len(y_i)):
            dx_i[m] = r_i * (dy_i[m] - y_i[m] * along)


@kernel("r3 r1 f w3 w3")
def _rms_norm(first, last, x, w, eps, y, r):
    for i in rows_of(x, first, last):
        t, h = i // x.shape[1], i % x.shape[1]
        x_i, y_i, w_ = row(x, t, h), row(y, t, h), row(w)
        r_i = inverse_rms(x_i, eps)
        r[t, h, 0] = r_i
        for m in range(len(x_i)):
            y_i[m] = x_i[m] * r_i * w_[m]


@kernel("r3 r3 r3 r1 i w3 w2")
def _rms_norm_backward(first, last, dy, x, r, w, need_dw, dx, dw):
    for block in range(first, last):
        w_, dw_ = row(w), row(dw, block)
        for i in rows_of(x, block, block + 1):
            t, h = i // x.shape[1], i % x.shape[1]
            dy_i, x_i, dx_i, r_i = row(dy, t, h), row(x, t, h), row(dx, t, h), r[t, h, 0]
            if need_dw:
                for m in range(len(x_i)):
                    dw_[m] += dy_i[m] * x_i[m] * r_i
            for m in range(len(x_i)):
                dx_i[m] = dy_i[m] * w_[m]
            _normalised_backward(x_i, r_i, dx_i)


@kernel("r3 r3 r1 f w3 w3")
def _gated_rms_norm(first, last, x, z, w, eps, y, r):
    for i in rows_of(x, first, last):
        t, h = i // x.shape[1], i % x.shape[1]
        x_i, z_i, y_i, w_ = row(x, t, h), row(z, t, h), row(y, t, h), row(w)
        r_i = inverse_rms(x_i, eps)
        r[t, h, 0] = r_i
        gated_row(x_i, r_i, w_, z_i, y_i)


@kernel("r3 r3 r3 r3 r1 i w3 w3 w2")
def _gated_rms_norm_backward(first, last, dy, x, z, r, w, need_dw, dx, dz, dw):
    for block in range(first, last):
        w_, dw_ = row(w), row(dw, block)
        for i in rows_of(x, block, block + 1):
            t, h = i // x.shape[1], i % x.shape[1]
            dy_i, x_i, z_i, dx_i, dz_i = row(dy, t, h), row(x, t, h), row(z, t, h), row(dx, t, h), row(dz, t, h)
            r_i = r[t, h, 0]
            for m in range(len(x_i)):
                s, n = sigmoid(z_i[m]), x_i[m] * r_i
                dz_i[m] = dy_i[m] * n * w_[m] * silu_derivative(z_i[m], s)
                dx_i[m] = dy_i[m] * s * z_i[m]
            if need_dw:
                for m in range(len(x_i)):
                    dw_[m] += dx_i[m] * x_i[m] * r_i
            for m in range(len(x_i)):
                dx_i[m] *= w_[m]
            _normalised_backward(x_i, r_i, dx_i)


@inlined
def inverse_length(x, eps):
    """1 / sqrt(sum(x^2) + eps)."""
    return x.dtype.type(1 / math.sqrt(_squares(x) + eps))


@inlined
def inverse_rms(x, eps):
    """1 / sqrt(mean(x^2) + eps)."""
    return x.dtype.type(1 / math.sqrt(_squares(x) / len(x) + eps))


@inlined
def gated_row(x, r, w, z, y):
    """y = x r w SiLU(z)."""
    for m in range(len(x)):
        y[m] = x[m] * r * w[m] * z[m] * sigmoid(z[m])


@inlined
def _squares(x):
    total = x.dtype.type(0)
    for m in range(len(x)):
        total += x[m] * x[m]
    return total


@inlined
def _normalised_backward(x, r, dx):
    """dx holds dn, and is replaced by r (dn - n mean(n dn)) with n = x r [norm.7]."""
    total = x.dtype.type(0)
    for m in range(len(x)):
        total += x[m] * dx[m]
    along = r * r * total / x.dtype.type(len(x))
    for m in range(len(x)):
        dx[m] = r * (dx[m] - x[m] * along)
