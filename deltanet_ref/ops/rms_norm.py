"""RMS norm with a weight, plain and gated by SiLU(z). Derivation: docs/derivations/norms.md.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.
"""
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.ops.elementwise import sigmoid, silu


class RMSNormCache(NamedTuple):
    """Kept by rms_norm_forward; the normalised rows n = x r are recomputed."""
    x: np.ndarray             # (..., d)
    r: np.ndarray             # (..., 1) the factor 1 / sqrt(mean x^2 + eps)
    w: np.ndarray             # (d,)


class GatedRMSNormCache(NamedTuple):
    """Kept by gated_rms_norm_forward; n = x r and SiLU(z) are recomputed."""
    x: np.ndarray             # (..., d)
    z: np.ndarray             # (..., d)
    r: np.ndarray             # (..., 1)
    w: np.ndarray             # (d,)


def rms_norm_forward(x, w, eps):
    """y = x / sqrt(mean(x^2) + eps) * w over the last axis [norm.5..6].

    x (..., d), w (d,); a checkpoint that stores w needs 1 + w here -> y (..., d), cache.
    Raises InputError when w does not have the size of a row.
    """
    r = _inverse_rms(x, w, eps)                                            # 1  r = (mean x^2 + eps)^-1/2
    y = x * r                                                              # 2  y = x r w
    y *= w
    return y, RMSNormCache(x, r, w)


def rms_norm_backward(dy, cache, need_dw=True):
    """Gradients of rms_norm_forward [norm.7..8]. dy (..., d) -> dx (..., d), dw (d,) or None without need_dw."""
    x, r, w = cache
    # 2  y = x r w
    n = x * r
    dw = np.einsum("nd,nd->d", _rows(dy), _rows(n)) if need_dw else None
    dn = dy * w
    # 1  r = (mean x^2 + eps)^-1/2
    return _normalised_backward(dn, n, r), dw


def gated_rms_norm_forward(x, z, w, eps):
    """y = rms_norm(x) * w * SiLU(z) over the last axis [norm.9]: the norm first, then the gate.

    x, z (..., d), w (d,) -> y (..., d), cache. Raises InputError when shapes do not fit.
    """
    if z.shape != x.shape:
        raise InputError(f"the gate z has shape {z.shape}; it must be that of x, {x.shape}")
    r = _inverse_rms(x, w, eps)                                            # 1  r = (mean x^2 + eps)^-1/2
    y = silu(z)                                                            # 2  y = x r w SiLU(z)
    y *= x
    y *= r
    y *= w
    return y, GatedRMSNormCache(x, z, r, w)


def gated_rms_norm_backward(dy, cache, need_dw=True):
    """Gradients of gated_rms_norm_forward [norm.10..12]. dy (..., d) -> dx, dz (..., d), dw (d,) or None."""
    x, z, r, w = cache
    # 2  y = n w SiLU(z), n = x r
    n = x * r
    s = sigmoid(z)
    gate = s * z
    dz = 1 - s
    dz *= gate
    dz += s                                                                # SiLU' = s + SiLU (1 - s)
    dz *= dy
    dz *= n
    dz *= w
    dn = dy * gate
    dw = np.einsum("nd,nd->d", _rows(dn), _rows(n)) if need_dw else None
    dn *= w
    # 1  r = (mean x^2 + eps)^-1/2
    return _normalised_backward(dn, n, r), dz, dw


def _inverse_rms(x, w, eps):
    d = x.shape[-1]
    if w.shape != (d,):
        raise InputError(f"the norm's weight has shape {w.shape}; it must be ({d},), one value per feature of x")
    r = np.einsum("...d,...d->...", x, x)[..., None]
    r /= d
    r += eps
    return np.divide(1, np.sqrt(r, out=r), out=r)


def _normalised_backward(dn, n, r):
    """dx = r (dn - n mean(n dn)) [norm.7]; overwrites n."""
    mean = np.einsum("...d,...d->...", n, dn)[..., None] / n.shape[-1]
    n *= mean
    np.subtract(dn, n, out=n)
    n *= r
    return n


def _rows(x):
    return x.reshape(-1, x.shape[-1])
