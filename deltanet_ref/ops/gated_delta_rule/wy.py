"""Inside a chunk: Gamma -> A -> T -> U, W. Derivation: docs/derivations/chunked-wy.md.

The C writes u_1..u_C of a chunk depend on one another through k_i . k_j. As a triangular system they are solved once,
for any state S that enters the chunk: (I + A) V_new = beta V - beta exp(gc) K S, hence V_new = U - W S.

Source: the WY form of products of Householder-like factors (Bischof and Van Loan 1987), for the delta rule
Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule"; with gates "Gated Delta Networks", sec. 3.3.
"""
from typing import NamedTuple

import numpy as np


class WY(NamedTuple):
    """A chunk's triangular system, solved. Leading axes (...,) are chunks and heads."""
    gc: np.ndarray            # (..., C) log decay summed from the chunk's start; float64 when real
    Gamma: np.ndarray         # (..., C, C) decay from token j to token i >= j; zero above the diagonal
    A: np.ndarray             # (..., C, C) strictly lower
    T: np.ndarray             # (..., C, C) (I + A)^-1, unit lower
    U: np.ndarray             # (..., C, d_v) T (beta V)
    W: np.ndarray             # (..., C, d_k) T (beta exp(gc) K)


def wy_forward(k, v, g, beta):
    """k (..., C, d_k), v (..., C, d_v), g, beta (..., C) -> WY [wy.1..5]."""
    gc = np.cumsum(g, -1, dtype=np.result_type(g, np.float64))             # 1  float64, for the differences below
    Gamma = decay_triangle(gc, k.dtype)                                    # 2  Gamma_ij = exp(gc_i - gc_j), i >= j
    A = np.tril(beta[..., None] * (k @ _t(k)) * Gamma, -1)                 # 3  A_ij = beta_i k_i.k_j Gamma_ij for i > j
    T = unit_lower_inverse(A)                                              # 4  T = (I + A)^-1
    U = T @ (beta[..., None] * v)                                          # 5  U = T (beta V)
    W = T @ (beta[..., None] * decay_from_start(gc, k.dtype) * k)          #    W = T (beta exp(gc) K)
    return WY(gc, Gamma, A, T, U, W)


def wy_backward(dU, dW, k, v, beta, wy):
    """Gradients of wy_forward [wy.6..9]: dk, dv, dbeta and, for the gates, pair and row of log_decay_backward."""
    # 5  U = T (beta V), W = T (beta exp(gc) K)
    dX_U = _t(wy.T) @ dU                                                   # of beta V
    dX_W = _t(wy.T) @ dW                                                   # of beta exp(gc) K
    decay = decay_from_start(wy.gc, k.dtype)
    dv = beta[..., None] * dX_U
    dk = beta[..., None] * decay * dX_W
    dbeta = (dX_U * v).sum(-1) + (dX_W * decay * k).sum(-1)
    row = (dk * k).sum(-1)
    # 4  T = (I + A)^-1: dA = -T^T dT T^T, with dT = dU (beta V)^T + dW (beta exp(gc) K)^T
    dA = -np.tril(dX_U @ _t(wy.U) + dX_W @ _t(wy.W), -1)
    # 3  A_ij = beta_i (k_i . k_j) Gamma_ij
    dA_Gamma = dA * wy.Gamma
    dbeta += (dA_Gamma * (k @ _t(k))).sum(-1)
    dGram = beta[..., None] * dA_Gamma
    dk += (dGram + _t(dGram)) @ k
    # 2  Gamma_ij = exp(gc_i - gc_j): as the product Gamma dGamma
    pair = dA * wy.A
    return dk, dv, dbeta, pair, row


def decay_triangle(gc, dtype):
    """Gamma_ij = exp(gc_i - gc_j) for i >= j, else 0. (..., C) -> (..., C, C).

    The difference is formed before the exponential: exp(gc_i) exp(-gc_j) overflows at strong decay.
    """
    C = gc.shape[-1]
    exponent = np.where(np.tri(C, dtype=bool), gc[..., :, None] - gc[..., None, :], -np.inf)
    return np.exp(exponent.astype(dtype))


def log_decay_backward(pair, row, tail, whole):
    """dg from the gradients of the chunk's decay factors [chunk.12].

    pair   (..., C, C) Gamma_ij dGamma_ij, strictly lower   contains g_t for j < t <= i
    row    (..., C)    exp(gc_i) times its gradient         contains g_t for t <= i
    tail   (..., C)    exp(gc_C - gc_j) times its gradient  contains g_t for t > j
    whole  (...,)      exp(gc_C) times its gradient         contains every g_t
    returns dg (..., C). No difference of large sums is formed: every summand of dg_t contains exp(g_t).
    """
    crossing = np.tril(_reverse_cumsum(pair, -2), -1).sum(-1)              # sum over i >= t > j
    before = np.zeros_like(tail)
    before[..., 1:] = np.cumsum(tail[..., :-1], -1)                        # sum over j < t
    return crossing + _reverse_cumsum(row, -1) + before + whole[..., None]


def unit_lower_inverse(A):
    """(I + A)^-1 for strictly lower A (..., C, C), by recursive halving [wy.4]:

        [[I + A_11, 0], [A_21, I + A_22]]^-1 = [[T_11, 0], [-T_22 A_21 T_11, T_22]]
    """
    C = A.shape[-1]
    if C <= 2:
        return np.eye(C, dtype=A.dtype) - A                                # A A = 0
    h = C // 2
    T = np.zeros_like(A)
    T[..., :h, :h] = T_11 = unit_lower_inverse(A[..., :h, :h])
    T[..., h:, h:] = T_22 = unit_lower_inverse(A[..., h:, h:])
    T[..., h:, :h] = -T_22 @ (A[..., h:, :h] @ T_11)
    return T


def decay_from_start(gc, dtype):
    """exp(gc_i), the decay from the chunk's start to token i: (..., C) -> (..., C, 1)."""
    return np.exp(gc).astype(dtype)[..., None]


def _reverse_cumsum(x, axis):
    """y_t = sum of x_i over i >= t."""
    return np.flip(np.cumsum(np.flip(x, axis), axis), axis)


def _t(x):
    return x.swapaxes(-1, -2)
