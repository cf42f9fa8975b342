"""L2 normalisation of rows. Derivation: docs/derivations/norms.md."""
from typing import NamedTuple

import numpy as np


class L2NormCache(NamedTuple):
    """Kept by l2_norm_forward; backward does not need x."""
    y: np.ndarray             # (..., d)
    r: np.ndarray             # (..., 1) the factor 1 / sqrt(sum x^2 + eps)


def l2_norm_forward(x, eps=1e-6):
    """y = x / sqrt(sum(x^2) + eps) over the last axis [norm.1..2]; eps on the SUM.

    x (..., d) -> y (..., d), cache. A zero row gives a zero row.
    """
    r = np.einsum("...d,...d->...", x, x)[..., None]                       # 1  r = (sum x^2 + eps)^-1/2
    r += eps
    np.divide(1, np.sqrt(r, out=r), out=r)
    y = x * r                                                              # 2  y = x r
    return y, L2NormCache(y, r)


def l2_norm_backward(dy, cache):
    """dx = r (dy - y (y . dy)) [norm.4]. dy (..., d) -> dx (..., d); dy / sqrt(eps) at a zero row."""
    y, r = cache
    dx = y * -np.einsum("...d,...d->...", y, dy)[..., None]
    dx += dy
    dx *= r
    return dx
