"""Causal grouped-query attention in tiles of scores, with an online softmax; nothing of size L x M is stored.

Mathematics: docs/derivations/attention.md; the running maximum: Milakov and Gimelshein 2018, "Online normalizer
calculation for softmax". A tile holds the scores of KEYS keys with all query heads of one key head at some tokens. Its
rows are keys, so that the maximum and the sum over keys are element-wise operations on rows.

The backward's dk and dv depend on the number of threads in their last bits: where sequences times key heads are fewer
than threads, the tokens of a task are divided among several, and their dk and dv are added.
"""
import numpy as np

from deltanet_ref.backends.numba_cpu import threads
from deltanet_ref.backends.numba_cpu.arrays import heads, row, same_float
from deltanet_ref.backends.numba_cpu.blas import gemm
from deltanet_ref.backends.numba_cpu.compiler import inlined, kernel
from deltanet_ref.backends.numba_cpu.elementary import exp
from deltanet_ref.ops.sequences import sequence_boundaries
from deltanet_ref.ops.softmax_attention import SoftmaxAttentionCache, _check_shapes

KEYS = 128                    # rows of a tile
QUERIES = 128                 # columns of a tile: tokens times the heads of a group (one token, if the group is larger)


def softmax_attention_forward(q, k, v, *, scale=None, cu_seqlens=None):
    """o, cache: arguments, returns and errors as ops.softmax_attention_forward."""
    same_float(q, k, v)
    _check_shapes(q, k, v, cu_seqlens)
    B, L, H, d = q.shape
    scale = d ** -0.5 if scale is None else float(scale)
    o = np.empty((B, L, H, v.shape[3]), q.dtype)
    peak, total = np.empty((B, L, H), q.dtype), np.empty((B, L, H), q.dtype)
    query_bounds, key_bounds = _boundaries(q, k, cu_seqlens)
    tokens = _tokens_of_a_tile(q, k)
    tiles = np.concatenate([[0], np.cumsum(-(-np.diff(query_bounds) // tokens))])      # before each sequence; in all
    _forward(tiles[-1] * k.shape[2], heads(q), heads(k), heads(v), scale, query_bounds, key_bounds, tokens, tiles,
             heads(o), peak.reshape(B * L, H), total.reshape(B * L, H))
    return o, SoftmaxAttentionCache(q, k, v, o, peak, total, scale, cu_seqlens)


def softmax_attention_backward(do, cache):
    """dq, dk, dv: as ops.softmax_attention_backward."""
    q, k, v, o, peak, total, scale, cu_seqlens = cache
    same_float(do, q)
    query_bounds, key_bounds = _boundaries(q, k, cu_seqlens)
    # A task is a sequence, a key head and one of `parts` shares of its tokens
    parts = -(-threads.number_of_threads // ((len(key_bounds) - 1) * k.shape[2]))
    dq = np.empty(q.shape, q.dtype)
    dk, dv = np.zeros((parts, *heads(k).shape), q.dtype), np.zeros((parts, *heads(v).shape), q.dtype)
    _backward((len(key_bounds) - 1) * k.shape[2] * parts, heads(do), heads(q), heads(k), heads(v), heads(o),
              peak.reshape(-1, q.shape[2]), total.reshape(-1, q.shape[2]), scale, query_bounds, key_bounds,
              _tokens_of_a_tile(q, k), heads(dq), dk, dv)
    return dq, *((x[0] if parts == 1 else x.sum(0)).reshape(y.shape) for x, y in ((dk, k), (dv, v)))


def _boundaries(q, k, cu_seqlens):
    """Where each sequence starts among all queries and among all keys, with their totals last."""
    queries = sequence_boundaries(*q.shape[:2], cu_seqlens)
    return queries, queries if q.shape[1] == k.shape[1] else sequence_boundaries(*k.shape[:2], None)


def _tokens_of_a_tile(q, k):
    return max(1, QUERIES * k.shape[2] // q.shape[2])


@kernel("r3 r3 r3 f i1 i1 i i1 w3 w2 w2")
def _forward(first, last, q, k, v, scale, query_bounds, key_bounds, tokens, tiles, o, peak, total):
    for task in range(first, last):
        tile, h = task // k.shape[1], task % k.shape[1]
        n = np.searchsorted(tiles, tile, "right") - 1
        start = query_bounds[n] + (tile - tiles[n]) * tokens
        stop = min(start + tokens, query_bounds[n + 1])
        past = key_bounds[n + 1] - query_bounds[n + 1]                     # token t is key past + t
        _forward_tile(q[start:stop], k[key_bounds[n]:past + stop], v[key_bounds[n]:past + stop], scale, h,
                      o[start:stop], peak[start:stop], total[start:stop])


@inlined
def _forward_tile(q, k, v, scale, h, o, peak, total):
    """Key head h with its query heads; the tokens of q are the last ones of k."""
    group = q.shape[1] // k.shape[1]
    R, d_v = len(q) * group, v.shape[2]
    Q, O, s = np.empty((R, q.shape[2]), q.dtype), np.empty((R, d_v), q.dtype), np.empty((KEYS, R), q.dtype)
    top, before, sums = np.full(R, -np.inf, q.dtype), np.empty(R, q.dtype), np.zeros(R, q.dtype)
    one, zero = q.dtype.type(1), q.dtype.type(0)
    _gather(q, h * group, group, Q)
    for start in range(0, len(k), KEYS):
        m = min(KEYS, len(k) - start)
        _scores(scale, Q, k, h, start, m, group, s)                        # 1  s_ji = scale q_i . k_j
        before[:] = top                                                    # 2  top_i = max_j s_ji over the keys so far
        for j in range(m):
            s_j = row(s, j)
            for i in range(R):
                top[i] = s_j[i] if s_j[i] > top[i] else top[i]
        for i in range(R):                                                 #    rescale the sums so far to the new top
            before[i] = exp(before[i] - top[i])
            sums[i] *= before[i]
        for j in range(m):                                                 # 3  e_ji = exp(s_ji - top_i)
            s_j = row(s, j)
            for i in range(R):
                s_j[i] = exp(s_j[i] - top[i])
                sums[i] += s_j[i]
        if start > 0:
            for i in range(R):
                O_i = row(O, i)
                for c in range(d_v):
                    O_i[c] *= before[i]
        gemm(one, s[:m].T, v[start:start + m, h], one if start > 0 else zero, O)           # 4  O_i = sum_j e_ji v_j
    for i in range(R):
        t, head = i // group, h * group + i % group
        O_i, o_i = row(O, i), row(o, t, head)
        for c in range(d_v):
            o_i[c] = O_i[c] / sums[i]
        peak[t, head], total[t, head] = top[i], sums[i]


@kernel("r3 r3 r3 r3 r3 r2 r2 f i1 i1 i w3 w4 w4")
def _backward(first, last, do, q, k, v, o, peak, total, scale, query_bounds, key_bounds, tokens, dq, dk, dv):
    parts, H_kv = len(dk), k.shape[1]
    for task in range(first, last):
        n, h, part = task // (H_kv * parts), task // parts % H_kv, task % parts
        past = key_bounds[n + 1] - query_bounds[n + 1]
        for start in range(query_bounds[n] + part * tokens, query_bounds[n + 1], parts * tokens):
            stop = min(start + tokens, query_bounds[n + 1])
            keys = slice(key_bounds[n], past + stop)
            _backward_tile(do[start:stop], q[start:stop], k[keys], v[keys], o[start:stop], peak[start:stop],
                           total[start:stop], scale, h, dq[start:stop], dk[part, keys], dv[part, keys])


@inlined
def _backward_tile(do, q, k, v, o, peak, total, scale, h, dq, dk, dv):
    """Key head h with its query heads; the tokens of q are the last ones of k. Adds to dk and dv."""
    group = q.shape[1] // k.shape[1]
    R, d, d_v = len(q) * group, q.shape[2], v.shape[2]
    Q, dQ, dO = np.empty((R, d), q.dtype), np.zeros((R, d), q.dtype), np.empty((R, d_v), q.dtype)
    P, dS, mean = np.empty((KEYS, R), q.dtype), np.empty((KEYS, R), q.dtype), np.empty(R, q.dtype)
    top, weight = np.empty(R, q.dtype), np.empty(R, q.dtype)
    one, zero = q.dtype.type(1), q.dtype.type(0)
    _gather(q, h * group, group, Q)
    _gather(do, h * group, group, dO)
    for i in range(R):
        t, head = i // group, h * group + i % group
        top[i], weight[i] = peak[t, head], one / total[t, head]
        dO_i, o_i, along = row(dO, i), row(o, t, head), zero
        for c in range(d_v):
            along += dO_i[c] * o_i[c]
        mean[i] = along                                                    # sum_j P_ij dP_ij = do_i . o_i
    for start in range(0, len(k), KEYS):
        m = min(KEYS, len(k) - start)
        K, V, dK, dV = k[start:start + m, h], v[start:start + m, h], dk[start:start + m, h], dv[start:start + m, h]
        _scores(scale, Q, k, h, start, m, group, P)
        gemm(one, V, dO.T, zero, dS[:m])                                   # dP_ij = do_i . v_j
        for j in range(m):
            P_j, dS_j = row(P, j), row(dS, j)
            for i in range(R):
                P_j[i] = exp(P_j[i] - top[i]) * weight[i]
                dS_j[i] = P_j[i] * (dS_j[i] - mean[i]) * scale
        # 4  o_i = sum_j P_ij v_j
        gemm(one, P[:m], dO, one, dV)
        # 1  s_ij = scale q_i . k_j
        gemm(one, dS[:m].T, K, one, dQ)
        gemm(one, dS[:m], Q, one, dK)
    for i in range(R):
        dq_i, dQ_i = row(dq, i // group, h * group + i % group), row(dQ, i)
        for c in range(d):
            dq_i[c] = dQ_i[c]


@inlined
def _scores(scale, Q, k, h, start, m, group, s):
    """s_ji = scale q_i . k_j for m keys from `start` on; -inf where key j comes after the token of row i."""
    R = len(Q)
    gemm(scale, k[start:start + m, h], Q.T, Q.dtype.type(0), s[:m])
    first = len(k) - R // group                                            # the first token's own key
    for j in range(m):
        s[j, :min(max(start + j - first, 0) * group, R)] = -np.inf


@inlined
def _gather(x, first_head, group, X):
    """Rows of X: the heads of the group at the first token, then at the second, ..."""
    for i in range(len(X)):
        x_i, X_i = row(x, i // group, first_head + i % group), row(X, i)
        for c in range(len(X_i)):
            X_i[c] = x_i[c]
