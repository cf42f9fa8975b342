"""The low-rank update of a linear map. Derivation: docs/derivations/linear-and-lora.md.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3.
"""
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.ops.linear import linear_backward_input, linear_backward_weight, linear_forward


class LoraCache(NamedTuple):
    """Kept by lora_forward; nothing is recomputed."""
    x: np.ndarray             # (..., in)
    a: np.ndarray             # (r, in)
    b: np.ndarray             # (out, r)
    h: np.ndarray             # (..., r) scale x a^T
    scale: float


def lora_forward(x, a, b, scale):
    """y = scale (x a^T) b^T, the update alone [lora.1..2]; the caller adds the base product.

    x (..., in), a (r, in), b (out, r), scale a number -> y (..., out), cache. Raises InputError when sizes differ.
    """
    if a.shape[0] != b.shape[1]:
        raise InputError(f"a is {a.shape} and b {b.shape}; they must be (r, in) and (out, r) with the same rank r")
    h = linear_forward(x, a)                                               # 1  h = scale x a^T
    h *= scale
    y = linear_forward(h, b)                                               # 2  y = h b^T
    return y, LoraCache(x, a, b, h, scale)


def lora_backward(dy, cache):
    """Gradients of lora_forward [lora.3..6]. dy (..., out) -> dx (..., in), da (r, in), db (out, r)."""
    x, a, b, h, scale = cache
    # 2  y = h b^T
    db = linear_backward_weight(dy, h)
    dh = linear_backward_input(dy, b)
    # 1  h = scale x a^T
    dh *= scale
    da = linear_backward_weight(dh, x)
    dx = linear_backward_input(dh, a)
    return dx, da, db
