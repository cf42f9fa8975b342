"""SiLU(gate) times up. Derivation: docs/derivations/swiglu.md. Source: Shazeer 2020, "GLU Variants", eq. 5."""
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.ops.elementwise import sigmoid, silu


class SwigluCache(NamedTuple):
    """Kept by swiglu_forward; sigmoid(gate) is recomputed."""
    gate: np.ndarray          # (..., F)
    up: np.ndarray            # (..., F)


def swiglu_forward(gate, up):
    """y = SiLU(gate) * up [swiglu.1]. gate, up (..., F) -> y (..., F), cache. Raises InputError when shapes differ."""
    if gate.shape != up.shape:
        raise InputError(f"gate has shape {gate.shape} and up {up.shape}; they must be the same")
    y = silu(gate)
    y *= up
    return y, SwigluCache(gate, up)


def swiglu_backward(dy, cache):
    """Gradients of swiglu_forward [swiglu.2..3]. dy (..., F) -> dgate, dup (..., F)."""
    gate, up = cache
    s = sigmoid(gate)
    silu_gate = gate * s
    dgate = 1 - s
    dgate *= silu_gate
    dgate += s                                                             # SiLU' = s + SiLU (1 - s)
    dgate *= up
    dgate *= dy
    silu_gate *= dy
    return dgate, silu_gate
