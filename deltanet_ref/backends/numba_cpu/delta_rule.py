"""The gated delta rule on the CPU: a task is a sequence and a key head, and carries the state from chunk to chunk.

Mathematics: docs/derivations/chunked-wy.md, section "Without U and W". The triangular system is solved for its
right-hand side directly, so T, U and W are never formed; backward recomputes P, A and all decays. Value heads with the
same key head share Q K^T and K K^T.

Two products that share their right factor are computed as one, with the left factors stacked in one array: Q above K,
dO above X. Results that are added to several times are accumulated in a small array of their own: rows of the arguments
are a power of two apart and evict one another from the cache. The result does not depend on where a sequence is cut,
but the cost does: forward takes PART tokens at a time, which halves the triangles, and keeps the state every chunk_size
tokens; backward takes chunk_size tokens at a time.
"""
import math
from typing import NamedTuple

import numpy as np

from deltanet_ref.backends.numba_cpu.arrays import row, same_float
from deltanet_ref.backends.numba_cpu.blas import gemm, solve, solve_transposed
from deltanet_ref.backends.numba_cpu.compiler import inlined, kernel
from deltanet_ref.backends.numba_cpu.elementary import exp
from deltanet_ref.ops.gated_delta_rule.arguments import Arguments, arguments, incoming_gradients
from deltanet_ref.ops.gated_delta_rule.chunk import chunk_counts

PART = 32                     # tokens; compared with 64, products take 15 % less time (d 128)


class DeltaRuleCache(NamedTuple):
    """Kept by gated_delta_rule_forward; everything else of a chunk is recomputed."""
    args: Arguments
    chunk_size: int
    V_new: np.ndarray         # (B L, H_v, d_v)
    S: np.ndarray             # (chunks of all sequences, H_v, d_k, d_v) the state entering each chunk


def gated_delta_rule_forward(q, k, v, *, g, beta, S0=None, scale=None, head_order="grouped", cu_seqlens=None,
                             chunk_size=64):
    """o, S_end, cache: arguments, returns and errors as ops.gated_delta_rule.chunk_forward; float32 or float64."""
    same_float(q, k, v, g, beta, S0)
    args = arguments(q, k, v, g=g, beta=beta, S0=S0, scale=scale, head_order=head_order, cu_seqlens=cu_seqlens)
    chunks = first_chunks(args.cu_seqlens, chunk_size)
    o, V_new, S_end = np.empty(args.v.shape, args.v.dtype), np.empty(args.v.shape, args.v.dtype), args.S0.copy()
    S = np.empty((chunks[-1], *args.S0.shape[1:]), args.v.dtype)
    _forward(_tasks(args), args.q, args.k, args.v, args.g, args.beta, args.scale, args.cu_seqlens, chunks,
             args.key_head, chunk_size, o, V_new, S, S_end)
    return o.reshape(*args.batch, *o.shape[1:]), S_end, DeltaRuleCache(args, chunk_size, V_new, S)


def gated_delta_rule_backward(do, dS_end, cache):
    """dq, dk, dv, dg, dbeta, dS0: as ops.gated_delta_rule.chunk_backward."""
    args, chunk_size, V_new, S = cache
    do, dS_end = incoming_gradients(do, dS_end, args)
    dq, dk, dv, dg, dbeta = (np.empty(x.shape, x.dtype) for x in (args.q, args.k, args.v, args.g, args.beta))
    dS0 = dS_end.copy()
    _backward(_tasks(args), do, args.q, args.k, args.v, args.g, args.beta, args.scale,
              args.cu_seqlens, first_chunks(args.cu_seqlens, chunk_size), args.key_head, chunk_size, V_new, S,
              dq, dk, dv, dg, dbeta, dS0)
    return *(x.reshape(*args.batch, *x.shape[1:]) for x in (dq, dk, dv, dg, dbeta)), dS0


def gated_delta_rule_step(q, k, v, *, g, beta, S, scale=None, head_order="grouped"):
    """One token of each sequence: o, S, as ops.gated_delta_rule.recurrent_step."""
    same_float(q, k, v, g, beta, S)
    args = arguments(q[:, None], k[:, None], v[:, None], g=g[:, None], beta=beta[:, None], S0=S, scale=scale,
                     head_order=head_order, cu_seqlens=None)
    o, S_new = np.empty(args.v.shape, args.v.dtype), np.empty(args.S0.shape, args.S0.dtype)
    _step(args.g.size, args.q, args.k, args.v, args.g, args.beta, args.scale, args.key_head, args.S0, o, S_new)
    return o, S_new


def _tasks(args):
    """Sequences times key heads. Consecutive tasks belong to different sequences, which balances the load: lengths
    vary, heads do not."""
    return (len(args.cu_seqlens) - 1) * args.k.shape[1]


def first_chunks(cu_seqlens, C):
    """Index of the first chunk of each sequence, and the number of all chunks: (N_seq + 1,)."""
    return np.concatenate([[0], np.cumsum(chunk_counts(cu_seqlens, C))])


@kernel("r3 r3 r3 r2 r2 f i1 i1 i1 i w3 w3 w4 w4")
def _forward(first, last, q, k, v, g, beta, scale, cu_seqlens, chunks, key_head, C, o, V_new, S_enter, S_end):
    """Each task: sequence n, key head h_k and its value heads. S_end holds the current state, S0 at first."""
    d_k, d_v, most = k.shape[2], v.shape[2], min(C, PART)
    QK, QK_K = np.empty((2 * most, d_k), q.dtype), np.empty((2 * most, most), q.dtype)
    QK_S, K_tail = np.empty((2 * most, d_v), q.dtype), np.empty((most, d_k), q.dtype)
    P, A, Gamma = np.empty((most, most), q.dtype), np.empty((most, most), q.dtype), np.empty((most, most), q.dtype)
    gc, decay, tail = np.empty(most, np.float64), np.empty(most, q.dtype), np.empty(most, q.dtype)
    one, zero = q.dtype.type(1), q.dtype.type(0)
    sequences = len(cu_seqlens) - 1
    for task in range(first, last):
        n, h_k = task % sequences, task // sequences
        for chunk in range(chunks[n], chunks[n + 1]):
            begin = cu_seqlens[n] + (chunk - chunks[n]) * C
            end = min(begin + C, cu_seqlens[n + 1])
            for start in range(begin, end, most):
                c = min(most, end - start)
                _stack_q_k(scale, q[start:start + c, h_k], k[start:start + c, h_k], QK)
                K = QK[c:2 * c]
                gemm(one, QK[:2 * c], K.T, zero, QK_K[:2 * c, :c])
                for h in range(v.shape[1]):
                    if key_head[h] != h_k:
                        continue
                    S, R, O = S_end[n, h], V_new[start:start + c, h], o[start:start + c, h]
                    if start == begin:
                        _copy(S, S_enter[chunk, h])
                    _decays(g, start, c, h, gc, decay, tail)
                    _triangles(QK_K, beta, start, c, h, gc, P, A, Gamma)
                    gemm(one, QK[:2 * c], S, zero, QK_S[:2 * c])
                    # R = beta (V - exp(gc) K S)                                                           [chunk.13]
                    for i in range(c):
                        R_i, v_i, K_S_i = row(R, i), row(v, start + i, h), row(QK_S, c + i)
                        b = beta[start + i, h]
                        for m in range(d_v):
                            R_i[m] = b * (v_i[m] - decay[i] * K_S_i[m])
                    # (I + A) V_new = R                                                                    [chunk.14]
                    solve(A[:c, :c], R)
                    # o = scale exp(gc) Q S + P V_new, scale being in Q and P                              [chunk.4]
                    _scale_rows(decay, QK_S[:c], O)
                    gemm(one, P[:c, :c], R, one, O)
                    # S' = exp(gc_C) S + (exp(gc_C - gc) K)^T V_new                                        [chunk.2]
                    _scale_rows(tail, K, K_tail)
                    gemm(one, K_tail[:c].T, R, decay[c - 1], S)


@kernel("r3 r3 r3 r3 r2 r2 f i1 i1 i1 i r3 r4 w3 w3 w3 w2 w2 w4")
def _backward(first, last, do, q, k, v, g, beta, scale, cu_seqlens, chunks, key_head, C, V_new, S_enter,
              dq, dk, dv, dg, dbeta, dS0):
    """Each task: sequence n, key head h_k and its value heads. dS0 holds the gradient of the current state, dS_end at
    first."""
    d_k, d_v = k.shape[2], v.shape[2]
    QK, QK_decayed = np.empty((2 * C, d_k), q.dtype), np.empty((2 * C, d_k), q.dtype)
    dOX, dOX_S = np.empty((2 * C, d_v), q.dtype), np.empty((2 * C, d_k), q.dtype)
    QK_K, dOX_V = np.empty((2 * C, C), q.dtype), np.empty((2 * C, C), q.dtype)
    P, A, Gamma = np.empty((C, C), q.dtype), np.empty((C, C), q.dtype), np.empty((C, C), q.dtype)
    dQK, V_tail = np.empty((2 * C, d_k), q.dtype), np.empty((C, d_v), q.dtype)
    gc, decay, tail = np.empty(C, np.float64), np.empty(C, q.dtype), np.empty(C, q.dtype)
    from_row, from_tail, below = np.empty(C), np.empty(C), np.empty(C, q.dtype)
    one, zero = q.dtype.type(1), q.dtype.type(0)
    sequences = len(cu_seqlens) - 1
    for task in range(first, last):
        n, h_k = task % sequences, task // sequences
        for chunk in range(chunks[n + 1] - 1, chunks[n] - 1, -1):
            start = cu_seqlens[n] + (chunk - chunks[n]) * C
            c = min(C, cu_seqlens[n + 1] - start)
            _stack_q_k(scale, q[start:start + c, h_k], k[start:start + c, h_k], QK)
            Q, K, X, dQ, dK = QK[:c], QK[c:2 * c], dOX[c:2 * c], dQK[:c], dQK[c:2 * c]
            gemm(one, QK[:2 * c], K.T, zero, QK_K[:2 * c, :c])
            dQK[:] = 0
            for h in range(v.shape[1]):
                if key_head[h] != h_k:
                    continue
                S, dS, V = S_enter[chunk, h], dS0[n, h], V_new[start:start + c, h]
                _copy(do[start:start + c, h], dOX)
                _decays(g, start, c, h, gc, decay, tail)
                _triangles(QK_K, beta, start, c, h, gc, P, A, Gamma)
                # dV_new = (exp(gc_C - gc) K) dS' + P^T dO                                                 [chunk.15]
                gemm(one, K, dS, zero, X)
                for i in range(c):
                    X_i, V_i, V_tail_i = row(X, i), row(V, i), row(V_tail, i)
                    total = zero
                    for m in range(d_v):
                        X_i[m] *= tail[i]
                        V_tail_i[m] = tail[i] * V_i[m]
                        total += X_i[m] * V_i[m]
                    from_tail[i] = total
                gemm(one, P[:c, :c].T, dOX[:c], one, X)
                # (I + A)^T X = dV_new                                                                     [chunk.16]
                solve_transposed(A[:c, :c], X)
                # dv = beta X, and the part of dbeta that does not go through A
                gemm(one, dOX[:2 * c], S.T, zero, dOX_S[:2 * c])
                for i in range(c):
                    X_i, v_i, dv_i = row(X, i), row(v, start + i, h), row(dv, start + i, h)
                    b, direct = beta[start + i, h], zero
                    for m in range(d_v):
                        dv_i[m] = b * X_i[m]
                        direct += X_i[m] * v_i[m]
                    # scale exp(gc) Q, -beta exp(gc) K and the gradients through them
                    Q_i, K_i, dQ_i, dK_i = row(Q, i), row(K, i), row(dQ, i), row(dK, i)
                    dO_S_i, X_S_i = row(dOX_S, i), row(dOX_S, c + i)
                    Q_decayed_i, K_decayed_i = row(QK_decayed, i), row(QK_decayed, c + i)
                    into_q, into_k, through_S, through_o = decay[i], -b * decay[i], zero, zero
                    for m in range(d_k):           # two loops: LLVM does not vectorise one with all the arrays
                        through_o += dO_S_i[m] * Q_i[m]
                        dQ_i[m] += scale * into_q * dO_S_i[m]
                        Q_decayed_i[m] = into_q * Q_i[m]
                    for m in range(d_k):
                        through_S += X_S_i[m] * K_i[m]
                        dK_i[m] += into_k * X_S_i[m]
                        K_decayed_i[m] = into_k * K_i[m]
                    from_row[i] = into_q * through_o + into_k * through_S
                    dbeta[start + i, h] = direct - decay[i] * through_S
                # dP = dO V_new^T, dA = -X V_new^T, then the gradients of Q K^T and K K^T through them
                gemm(one, dOX[:2 * c], V.T, zero, dOX_V[:2 * c, :c])
                whole = decay[c - 1] * _inner(S, dS)
                _pairs(P, QK_K, Gamma, beta, start, c, h, dOX_V, below, dbeta, dg)
                gemm(scale, dOX_V[:c, :c], K, one, dQ)
                gemm(one, dOX_V[:2 * c, :c].T, QK[:2 * c], one, dK)
                gemm(one, V_tail[:c], dS.T, one, dK)
                _log_decay(from_row, from_tail, whole, start, c, h, dg)
                # dS = exp(gc_C) dS' + (scale exp(gc) Q)^T dO - (beta exp(gc) K)^T X                       [chunk.17]
                gemm(one, QK_decayed[:2 * c].T, dOX[:2 * c], decay[c - 1], dS)
            _copy(dQ, dq[start:start + c, h_k])
            _copy(dK, dk[start:start + c, h_k])


@kernel("r3 r3 r3 r2 r2 f i1 r4 w3 w4")
def _step(first, last, q, k, v, g, beta, scale, key_head, S, o, S_new):
    for task in range(first, last):
        n, h = task // v.shape[1], task % v.shape[1]
        token(row(q, n, key_head[h]), row(k, n, key_head[h]), row(v, n, h), exp(g[n, h]), beta[n, h], scale, S[n, h],
              row(o, n, h), S_new[n, h])


@inlined
def token(q, k, v, decay, beta, scale, S, o, S_new):
    """[delta.1..4] in two passes over S (d_k, d_v): k S and q S, then S_new and o = scale (decay q S + (q k) u)."""
    u, qk = np.zeros(len(v), v.dtype), v.dtype.type(0)
    o[:] = 0
    for i in range(len(k)):
        S_i = row(S, i)
        qk += q[i] * k[i]
        for m in range(len(v)):                    # a loop for each sum: LLVM does not vectorise both in one
            u[m] += k[i] * S_i[m]
        for m in range(len(v)):
            o[m] += q[i] * S_i[m]
    for m in range(len(v)):
        u[m] = beta * (v[m] - decay * u[m])
        o[m] = scale * (decay * o[m] + qk * u[m])
    for i in range(len(k)):
        S_i, S_new_i = row(S, i), row(S_new, i)
        for m in range(len(v)):
            S_new_i[m] = decay * S_i[m] + k[i] * u[m]


@inlined
def _decays(g, start, c, h, gc, decay, tail):
    """gc, the cumulative log decay in float64; decay = exp(gc), tail = exp(gc_C - gc)."""
    total = 0.0
    for i in range(c):
        total += g[start + i, h]
        gc[i] = total
    for i in range(c):
        decay[i], tail[i] = math.exp(gc[i]), math.exp(total - gc[i])


@inlined
def _stack_q_k(scale, Q, K, QK):
    """QK = scale Q above K."""
    for i in range(len(Q)):
        Q_i, K_i, QK_i, QK_below = row(Q, i), row(K, i), row(QK, i), row(QK, len(Q) + i)
        for m in range(len(Q_i)):
            QK_i[m] = scale * Q_i[m]
        for m in range(len(K_i)):
            QK_below[m] = K_i[m]


@inlined
def _triangles(QK_K, beta, start, c, h, gc, P, A, Gamma):
    """Gamma, P = Q K^T * Gamma and, below the diagonal, A = beta K K^T * Gamma; P is zero above it [wy.2..3]."""
    for i in range(c):
        b, QK_i, KK_i = beta[start + i, h], row(QK_K, i), row(QK_K, c + i)
        P_i, A_i, Gamma_i = row(P, i), row(A, i), row(Gamma, i)
        for j in range(i):
            Gamma_i[j] = exp(P.dtype.type(gc[i] - gc[j]))
            P_i[j] = QK_i[j] * Gamma_i[j]
            A_i[j] = b * KK_i[j] * Gamma_i[j]
        P_i[i] = QK_i[i]
        P_i[i + 1:c] = 0


@inlined
def _pairs(P, QK_K, Gamma, beta, start, c, h, dOX_V, below, dbeta, dg):
    """Replace dO V^T and X V^T by the gradients of (Q K^T without scale) and of K K^T, the latter made symmetric
    [chunk.7, wy.9]. Adds the part of dbeta through A; dg_t = sum over i >= t > j of dA_ij A_ij + dP_ij P_ij
    [chunk.12]."""
    below[:c] = 0                                                          # for each j: sum of its pairs in rows >= i
    for i in range(c - 1, -1, -1):
        P_i, KK_i, Gamma_i, dP_i, dA_i = row(P, i), row(QK_K, c + i), row(Gamma, i), row(dOX_V, i), row(dOX_V, c + i)
        b, through_A, crossing = beta[start + i, h], P.dtype.type(0), P.dtype.type(0)
        for j in range(i):
            dA_Gamma = -dA_i[j] * Gamma_i[j]                               # dA = -X V^T
            through_A += dA_Gamma * KK_i[j]
            below[j] += b * dA_Gamma * KK_i[j] + dP_i[j] * P_i[j]
            crossing += below[j]
            dA_i[j] = b * dA_Gamma
            dP_i[j] *= Gamma_i[j]
        dbeta[start + i, h] += through_A
        dg[start + i, h] = crossing
        dA_i[i] = 0
        dP_i[i + 1:c] = 0
    for i in range(c):
        for j in range(i):
            dOX_V[c + j, i] = dOX_V[c + i, j]


@inlined
def _log_decay(from_row, from_tail, whole, start, c, h, dg):
    """dg_t += sum of rows from t on + sum of tails before t + whole [chunk.12]."""
    before, below = 0.0, 0.0
    for i in range(c):
        dg[start + i, h] += whole + before
        before += from_tail[i]
    for i in range(c - 1, -1, -1):
        below += from_row[i]
        dg[start + i, h] += below


@inlined
def _scale_rows(factor, x, y):
    """y_i = factor_i x_i for each row of x."""
    for i in range(len(x)):
        x_i, y_i = row(x, i), row(y, i)
        for m in range(len(x_i)):
            y_i[m] = factor[i] * x_i[m]


@inlined
def _inner(x, y):
    """Sum of x * y over two matrices, accumulated in float64.

    In float32 this sum of d_k d_v products had most of the error of dg: 2 to 3 noise floors, up to 6 (ops: 1 to 2).
    """
    total = 0.0
    for i in range(len(x)):
        x_i, y_i = row(x, i), row(y, i)
        for m in range(len(x_i)):
            total += np.float64(x_i[m]) * np.float64(y_i[m])
    return total


@inlined
def _copy(x, y):
    for i in range(len(x)):
        x_i, y_i = row(x, i), row(y, i)
        for m in range(len(x_i)):
            y_i[m] = x_i[m]
