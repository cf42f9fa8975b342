"""The log decay g and the write strength beta. Derivation: docs/derivations/gates.md.

Source: Gu and Dao 2023, "Mamba", sec. 3.6 (softplus step size); Yang et al. 2024, "Gated Delta Networks", sec. 3.1.
"""
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.ops.elementwise import sigmoid, softplus


class DecayGateCache(NamedTuple):
    """Kept by decay_gate_forward; complex128 in place of float64 when the arguments are complex."""
    x: np.ndarray             # (B, L, H_v) a + dt_bias, float64
    A: np.ndarray             # (H_v,) exp(A_log), float64
    softplus: np.ndarray      # (B, L, H_v) softplus(x), float64
    beta: np.ndarray          # (B, L, H_v)


def decay_gate_forward(a, b, A_log, dt_bias):
    """g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b) [gate.6..8].

    a, b (B, L, H_v), A_log, dt_bias (H_v,) -> g, beta (B, L, H_v) in the dtype of a, cache.
    g is computed in float64 and rounded once. Raises InputError when shapes do not fit.
    """
    heads = a.shape[-1:]
    if A_log.shape != heads or dt_bias.shape != heads or b.shape != a.shape:
        raise InputError(f"a {a.shape}, b {b.shape}, A_log {A_log.shape}, dt_bias {dt_bias.shape} do not fit: "
                         "a and b are (B, L, H_v), A_log and dt_bias (H_v,), per value head")
    wide = np.result_type(a, np.float64)
    x = a.astype(wide) + dt_bias                                           # 1  x = a + dt_bias
    A = np.exp(A_log.astype(wide))                                         # 2  g = -A softplus(x), A = exp(A_log)
    step = softplus(x)
    g = (-A * step).astype(a.dtype)
    beta = sigmoid(b)                                                      # 3  beta = sigmoid(b)
    return g, beta, DecayGateCache(x, A, step, beta)


def decay_gate_backward(dg, dbeta, cache, need_dw=True):
    """Gradients of decay_gate_forward [gate.9..12].

    dg, dbeta (B, L, H_v) -> da, db (B, L, H_v), dA_log, ddt_bias (H_v,), the last two None without need_dw.
    """
    x, A, step, beta = cache
    # 3  beta = sigmoid(b)
    db = dbeta * beta * (1 - beta)
    # 2  g = -A softplus(x)
    dx = -A * sigmoid(x) * dg
    # 1  x = a + dt_bias
    da = dx.astype(dg.dtype)
    if not need_dw:
        return da, db, None, None
    over_tokens = tuple(range(dg.ndim - 1))
    dA_log = (-A * (step * dg).sum(over_tokens)).astype(dg.dtype)
    ddt_bias = dx.sum(over_tokens).astype(dg.dtype)
    return da, db, dA_log, ddt_bias
