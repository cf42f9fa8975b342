"""Across chunks: V_new, o, and S carried from chunk to chunk. Derivation: docs/derivations/chunked-wy.md.

The same result as recurrent.py, with matrix products in place of the loop over tokens: the work inside the chunks is
done for all of them at once, and only the state S is carried from chunk to chunk.
"""
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.ops.gated_delta_rule.arguments import Arguments, arguments, gradient_shapes, incoming_gradients
from deltanet_ref.ops.gated_delta_rule.wy import WY, decay_from_start, log_decay_backward, wy_backward, wy_forward


class Chunks(NamedTuple):
    """How packed sequences are split: every sequence starts its own chunk, and its last chunk may be short.

    A short chunk is padded with rows of zeros: beta = 0 writes nothing and g = 0 decays nothing.
    """
    token: np.ndarray         # (M, C) index of the token in each slot; 0 in the padding
    filled: np.ndarray        # (M, C) bool
    steps: list               # steps[n] = (chunk, sequence): the n-th chunks of all sequences that have one


class ChunkCache(NamedTuple):
    """Kept by chunk_forward; M chunks in all. Recomputed in backward: Q K^T, and the decays from gc."""
    args: Arguments
    chunks: Chunks
    wy: WY                    # gc (M, H_v, C), Gamma, A, T (M, H_v, C, C), U (M, H_v, C, d_v), W (M, H_v, C, d_k)
    V_new: np.ndarray         # (M, H_v, C, d_v) the errors u_t of the recurrence
    S: np.ndarray             # (M, H_v, d_k, d_v) the state entering each chunk


def chunk_forward(q, k, v, *, g, beta, S0=None, scale=None, head_order="grouped", cu_seqlens=None, chunk_size=64):
    """o and S_end of the gated delta rule in chunks [chunk.1..5]; arguments and returns as recurrent_forward.

    chunk_size  C >= 1; L need not be a multiple of it
    """
    args = arguments(q, k, v, g=g, beta=beta, S0=S0, scale=scale, head_order=head_order, cu_seqlens=cu_seqlens)
    chunks = cut(args.cu_seqlens, chunk_size)
    Q, K = (gather(x[:, args.key_head], chunks) for x in (args.q, args.k))
    V, G, Beta = (gather(x, chunks) for x in (args.v, args.g, args.beta))
    wy = wy_forward(K, V, G, Beta)                                         # 1  U, W
    K_tail, decay_whole = _decays(K, wy.gc)
    S = np.empty((len(V), *args.S0.shape[1:]), V.dtype)
    V_new = np.empty_like(wy.U)
    S_now = args.S0.copy()
    for chunk, sequence in chunks.steps:
        S[chunk] = S_now[sequence]
        V_new[chunk] = wy.U[chunk] - wy.W[chunk] @ S[chunk]                # 2  V_new = U - W S
        S_now[sequence] = decay_whole[chunk] * S[chunk] + _t(K_tail[chunk]) @ V_new[chunk]
        #                                                                    3  S' = exp(gc_C) S + K_tail^T V_new
    P = (Q @ _t(K)) * wy.Gamma                                             # 4  P = Q K^T * Gamma
    o = args.scale * ((decay_from_start(wy.gc, Q.dtype) * Q) @ S + P @ V_new)
    #                                                                        5  o = scale [exp(gc) Q S + P V_new]
    o = scatter(o, chunks, len(args.v))
    return o.reshape(*args.batch, *o.shape[1:]), S_now, ChunkCache(args, chunks, wy, V_new, S)


def chunk_backward(do, dS_end, cache):
    """Gradients of chunk_forward [chunk.6..12]; arguments and returns as recurrent_backward."""
    args, chunks, wy, V_new, S = cache
    do, dS_end = incoming_gradients(do, dS_end, args)
    Q, K = (gather(x[:, args.key_head], chunks) for x in (args.q, args.k))
    V, Beta, dO = (gather(x, chunks) for x in (args.v, args.beta, args.scale * do))
    K_tail, decay_whole = _decays(K, wy.gc)
    decay = decay_from_start(wy.gc, Q.dtype)
    QK = Q @ _t(K)
    # 5  o = scale [exp(gc) Q S + P V_new]
    dQ_decayed = dO @ _t(S)
    dP = np.tril(dO @ _t(V_new))
    dQ = decay * dQ_decayed
    row = (dQ * Q).sum(-1)
    dV_new = _t(QK * wy.Gamma) @ dO
    dS_read = _t(decay * Q) @ dO
    # 4  P = Q K^T * Gamma
    dQK = dP * wy.Gamma
    dQ += dQK @ K
    dK = _t(dQK) @ Q
    pair = np.tril(dQK * QK, -1)
    # 3, 2  from the last chunk to the first
    dS_after = np.empty_like(S)
    dS = dS_end.copy()
    for chunk, sequence in reversed(chunks.steps):
        dS_after[chunk] = dS[sequence]
        dV_new[chunk] += K_tail[chunk] @ dS_after[chunk]                   # 3  S' = exp(gc_C) S + K_tail^T V_new
        dS[sequence] = decay_whole[chunk] * dS_after[chunk] + dS_read[chunk] - _t(wy.W[chunk]) @ dV_new[chunk]
        #                                                                    2  V_new = U - W S
    dK_tail = V_new @ _t(dS_after)
    tail = (dK_tail * K_tail).sum(-1)
    dK += np.exp(wy.gc[..., -1:] - wy.gc).astype(K.dtype)[..., None] * dK_tail
    whole = (decay_whole * S * dS_after).sum((-2, -1))
    # 1  U, W
    dK_wy, dV, dBeta, pair_wy, row_wy = wy_backward(dV_new, -dV_new @ _t(S), K, V, Beta, wy)
    dG = log_decay_backward(pair + pair_wy, row + row_wy, tail, whole)
    by_token = (scatter(x, chunks, len(args.v)) for x in (dQ, dK + dK_wy, dV, dG, dBeta))
    return *gradient_shapes(*by_token, args), dS


def cut(cu_seqlens, C):
    """Split the sequences that start at cu_seqlens[:-1] into Chunks of C tokens."""
    counts, lengths = chunk_counts(cu_seqlens, C), np.diff(cu_seqlens)
    sequence = np.repeat(np.arange(len(lengths)), counts)
    n = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    place = n[:, None] * C + np.arange(C)                                  # position within the sequence
    filled = place < lengths[sequence, None]
    token = np.where(filled, cu_seqlens[sequence, None] + place, 0)
    steps = [(np.flatnonzero(n == i), sequence[n == i]) for i in range(counts.max())]
    return Chunks(token, filled, steps)


def chunk_counts(cu_seqlens, chunk_size):
    """The number of chunks of each sequence, (N_seq,). Raises InputError unless chunk_size is an int >= 1."""
    if not isinstance(chunk_size, (int, np.integer)) or chunk_size < 1:
        raise InputError(f"chunk_size must be an integer of at least 1; it is {chunk_size!r}")
    return -(-np.diff(cu_seqlens) // chunk_size)


def gather(x, chunks):
    """Flat tokens to chunks, heads first: (T, H, d) -> (M, H, C, d), (T, H) -> (M, H, C)."""
    y = x[chunks.token]
    y[~chunks.filled] = 0
    return np.ascontiguousarray(y.swapaxes(1, 2))


def scatter(y, chunks, T):
    """Chunks back to flat tokens: (M, H, C, ...) -> (T, H, ...)."""
    x = np.empty((T, y.shape[1], *y.shape[3:]), y.dtype)
    x[chunks.token[chunks.filled]] = y.swapaxes(1, 2)[chunks.filled]
    return x


def _decays(K, gc):
    """exp(gc_C - gc) K (M, H, C, d_k), the keys decayed to the end of the chunk; exp(gc_C) (M, H, 1, 1)."""
    to_end = np.exp(gc[..., -1:] - gc).astype(K.dtype)[..., None]
    return to_end * K, np.exp(gc[..., -1:, None]).astype(K.dtype)


def _t(x):
    return x.swapaxes(-1, -2)
