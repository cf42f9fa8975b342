"""Causal grouped-query softmax attention and its sigmoid output gate. Derivation: docs/derivations/attention.md.

Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1; the backward with P recomputed from row statistics:
Dao et al. 2022, "FlashAttention", app. B.2.
"""
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.ops.elementwise import sigmoid
from deltanet_ref.ops.sequences import sequence_boundaries

ROWS = 128                    # query tokens at a time: the scores in memory are (ROWS, H / H_kv, M)


class SoftmaxAttentionCache(NamedTuple):
    """Kept by softmax_attention_forward; the probabilities P are recomputed, ROWS tokens at a time.

    The log-sum-exp of a row is kept in two parts: one number would lose the digits of P where scores are large.
    """
    q: np.ndarray             # (B, L, H, d)
    k: np.ndarray             # (B, M, H_kv, d)
    v: np.ndarray             # (B, M, H_kv, d_v)
    o: np.ndarray             # (B, L, H, d_v)
    peak: np.ndarray          # (B, L, H) the largest score of the row, real
    total: np.ndarray         # (B, L, H) sum over j of exp(score - peak)
    scale: float
    cu_seqlens: np.ndarray    # (N_seq + 1,) or None


class SigmoidGateCache(NamedTuple):
    """Kept by sigmoid_gate_forward; sigmoid(gate) is recomputed."""
    o: np.ndarray
    gate: np.ndarray


def softmax_attention_forward(q, k, v, *, scale=None, cu_seqlens=None):
    """o_i = sum over j <= i of P_ij v_j, P = softmax of the scores scale q_i . k_j over j [attn.1..4].

    q           (B, L, H, d)
    k           (B, M, H_kv, d), M >= L: the first M - L keys are the past, visible to every query
    v           (B, M, H_kv, d_v); query head h reads key head h // (H / H_kv)
    scale       factor of the scores; None means d ** -0.5
    cu_seqlens  (N_seq + 1,) start of each packed sequence, with B = 1 and no past
    returns     o (B, L, H, d_v), cache
    raises      InputError for shapes that do not fit
    """
    B, L, H, d = q.shape
    _check_shapes(q, k, v, cu_seqlens)
    scale = d ** -0.5 if scale is None else float(scale)
    o = np.empty((B, L, H, v.shape[3]), q.dtype)
    peak, total = np.empty((B, L, H), q.real.dtype), np.empty((B, L, H), q.dtype)
    for queries, keys in _blocks(q, k, cu_seqlens):
        s = _scores(q[queries], k[keys], scale)                            # 1  s_ij = scale q_i . k_j, -inf for j > i
        peak[queries] = s.real.max(-1)                                     # 2  peak_i = max_j s_ij
        s -= peak[queries][..., None]                                      # 3  e_ij = exp(s_ij - peak_i)
        np.exp(s, out=s)
        total[queries] = s.sum(-1)                                         #    total_i = sum_j e_ij
        o[queries] = _times(s, v[keys])                                    # 4  o_i = sum_j e_ij v_j / total_i
    o /= total[..., None]
    return o, SoftmaxAttentionCache(q, k, v, o, peak, total, scale, cu_seqlens)


def softmax_attention_backward(do, cache):
    """Gradients of softmax_attention_forward [attn.5..9].

    do (B, L, H, d_v) -> dq (B, L, H, d), dk (B, M, H_kv, d), dv (B, M, H_kv, d_v), the past's part included
    """
    q, k, v, o, peak, total, scale, cu_seqlens = cache
    dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
    mean = np.einsum("blhd,blhd->blh", do, o)                              # sum_j P_ij dP_ij = do_i . o_i
    for queries, keys in _blocks(q, k, cu_seqlens):
        P = _scores(q[queries], k[keys], scale)
        P -= peak[queries][..., None]
        np.exp(P, out=P)
        P /= total[queries][..., None]
        # 4  o_i = sum_j P_ij v_j
        dv[keys] += _transposed_times(P, do[queries])
        dP = _times(do[queries], v[keys].T)
        # 3..2  P = softmax of s, row by row
        dP -= mean[queries][..., None]
        dP *= P
        dP *= scale
        # 1  s_ij = scale q_i . k_j
        dq[queries] = _times(dP, k[keys])
        dk[keys] += _transposed_times(dP, q[queries])
    return dq, dk, dv


def sigmoid_gate_forward(o, gate):
    """y = o * sigmoid(gate) [attn.10]. o and gate of one shape -> y, cache. Raises InputError when shapes differ."""
    if o.shape != gate.shape:
        raise InputError(f"o has shape {o.shape} and its gate {gate.shape}; they must be the same")
    y = sigmoid(gate)
    y *= o
    return y, SigmoidGateCache(o, gate)


def sigmoid_gate_backward(dy, cache):
    """Gradients of sigmoid_gate_forward [attn.11]. dy -> do, dgate, all of the same shape."""
    o, gate = cache
    s = sigmoid(gate)
    do = dy * s
    dgate = 1 - s
    dgate *= do
    dgate *= o
    return do, dgate


def _check_shapes(q, k, v, cu_seqlens):
    B, L, H, d = q.shape
    M, H_kv = k.shape[1:3]
    if k.shape != (B, M, H_kv, d) or v.shape[:3] != k.shape[:3] or M < L:
        raise InputError(f"q {q.shape}, k {k.shape}, v {v.shape} do not fit: q is (B, L, H, d), k (B, M, H_kv, d), "
                         "v (B, M, H_kv, d_v) with M >= L, the past keys first")
    if H % H_kv:
        raise InputError(f"{H} query heads cannot share {H_kv} key heads: H must be a multiple of H_kv")
    if cu_seqlens is not None and M != L:
        raise InputError(f"packed sequences cannot have a past: k has {M} tokens and q {L}; pass one at a time")


def _blocks(q, k, cu_seqlens):
    """Indices (row of the batch, tokens, heads) of queries and of the keys that they see, block by block."""
    B, L, H, _ = q.shape
    M, H_kv = k.shape[1:3]
    group = H // H_kv
    bounds = [0, L] if cu_seqlens is None else sequence_boundaries(B, L, cu_seqlens)
    for first, end in zip(bounds, bounds[1:]):
        for start in range(first, end, ROWS):
            stop = min(start + ROWS, end)
            for b in range(B):
                for h in range(H_kv):
                    yield ((b, slice(start, stop), slice(h * group, (h + 1) * group)),
                           (b, slice(first, M - L + stop), h))


def _scores(q, k, scale):
    """scale q_i . k_j, and -inf where j comes after i. q (n, G, d), k (m, d), whose last n rows are the tokens of q."""
    n, m = len(q), len(k)
    s = _times(q * scale, k.T)
    np.copyto(s[..., m - n:], -np.inf, where=~np.tri(n, dtype=bool)[:, None])
    return s


def _times(x, w):
    """x w over the last axis of x, as one product. x (n, G, a), w (a, c) -> (n, G, c)."""
    n, group, a = x.shape
    return (x.reshape(n * group, a) @ w).reshape(n, group, -1)


def _transposed_times(x, y):
    """Sum of outer(x, y) over tokens and the heads of the group. x (n, G, a), y (n, G, c) -> (a, c)."""
    return x.reshape(-1, x.shape[2]).T @ y.reshape(-1, y.shape[2])
