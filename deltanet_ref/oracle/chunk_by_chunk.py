"""The chunked delta rule, every intermediate of notation.py by its name, with its gradient.

The oracle uses it twice: in float64 it gives the intermediates that the vectors hold, and in float32 (or with every
operand of a matrix product rounded to bfloat16) the noise that a correct kernel of that precision makes. Where
ops/gated_delta_rule is clever these equations are plain: cumulative sums in the working precision, dg from a difference
of sums, a triangle solved row by row. The test suite holds the two together to 1e-12 in float64. Known mistakes of
chunked kernels replace single equations (mutants/).
"""
import numpy as np

from deltanet_ref.oracle.steps import steps
from deltanet_ref.oracle.walk import DeltaForm, by_token, unrounded, walk

FORWARD = ("gc", "A", "T", "U", "W", "S", "V_new")
BACKWARD = ("dV_new", "dS", "dW", "dU", "dT", "dA", "dgc")
INTERMEDIATES = FORWARD + BACKWARD


def chunk_by_chunk(x, *, chunk: int = 64, operand=unrounded) -> dict[str, np.ndarray]:
    """Everything that one pass forward and backward computes.

    x        q, k, v, g, beta, S0, scale, do, dS_end of a case in one float dtype; head_order when it is tiled,
             cu_seqlens when it is packed
    operand  applied to both operands of every matrix product: the rounding of a tensor core
    returns  name -> array: o, S_end, dq, dk, dv, dg, dbeta, dS0, and the intermediates token by token:
             gc, dgc (B, L, H_v); A, T, dA, dT (B, L, H_v, C), row i of its chunk's matrix; U, V_new, dU, dV_new
             (B, L, H_v, d_v); W, dW (B, L, H_v, d_k); S, dS (B, N, H_v, d_k, d_v), the state entering each chunk
    """
    out, chunks = walk(CHUNKED, x | {"operand": operand}, {}, True, chunk)
    for values in chunks:
        values |= {name: _columns(values[name], chunk) for name in ("A", "T", "dA", "dT")}
    for name in INTERMEDIATES:
        out[name] = (np.stack([values[name] for values in chunks], 1) if name in ("S", "dS")
                     else by_token(chunks, name, x))
    return out


def decays(gc):
    """exp(gc_i - gc_j) for i >= j, else 0: (..., C) -> (..., C, C)."""
    return np.exp(np.where(np.tri(gc.shape[-1], dtype=bool), gc[..., :, None] - gc[..., None, :], -np.inf))


def inverse(A):
    """(I + A)^-1 of a strictly lower A, row by row: T_i = e_i - A_i T, which needs only the rows above."""
    T = np.zeros_like(A)
    for i in range(A.shape[-1]):
        T[..., i, :] = -(A[..., i, None, :i] @ T[..., :i, :])[..., 0, :]
        T[..., i, i] = 1
    return T


def t(x):
    """The transposed matrices."""
    return x.swapaxes(-1, -2)


def _sum_in_series(x):
    """Sum over the last two axes, one after the other as a simple kernel does; NumPy's own sum is more exact."""
    return np.cumsum(x.reshape(*x.shape[:-2], -1), -1)[..., -1]


def _with_last(x, last):
    """x (..., C) with `last` (...,) added to its last entry."""
    x[..., -1] += last
    return x


def _columns(matrix, chunk):
    """The matrices of a short chunk with columns of zeros up to a full one."""
    return np.pad(matrix, [(0, 0)] * (matrix.ndim - 1) + [(0, chunk - matrix.shape[-1])])


CHUNKED = DeltaForm(
    forward=steps(
        S=lambda carried: carried,
        b=lambda Beta: Beta[..., None],
        gc=lambda G: np.cumsum(G, -1, dtype=G.dtype),
        gc_end=lambda gc: gc[..., -1:],
        Gamma=lambda gc: decays(gc),
        gram=lambda dot, K: dot(K, t(K)),
        A=lambda b, gram, Gamma: np.tril(b * gram * Gamma, -1),
        T=lambda A: inverse(A),
        decay=lambda gc: np.exp(gc)[..., None],                 # from the chunk's start to each token
        tail=lambda gc, gc_end: np.exp(gc_end - gc)[..., None], # from each token to the chunk's end
        whole=lambda gc_end: np.exp(gc_end)[..., None],
        U=lambda dot, T, b, V: dot(T, b * V),
        W=lambda dot, T, b, decay, K: dot(T, b * decay * K),
        V_new=lambda dot, U, W, S: U - dot(W, S),
        QK=lambda dot, Q, K: dot(Q, t(K)),
        P=lambda QK, Gamma: QK * Gamma,
        Out=lambda dot, scale, decay, Q, S, P, V_new: scale * (dot(decay * Q, S) + dot(P, V_new)),
        S_next=lambda dot, whole, S, tail, K, V_new: whole * S + dot(t(tail * K), V_new),
    ),
    backward=steps(
        Gamma_back=lambda Gamma: Gamma,
        gc_end_back=lambda gc_end: gc_end,
        tail_back=lambda gc, gc_end_back: np.exp(gc_end_back - gc)[..., None],
        whole_back=lambda gc_end_back: np.exp(gc_end_back)[..., None],
        # S_next = whole S + (tail K)^T V_new;  Out = scale [decay Q S + P V_new]
        dV_new_P=lambda dot_back, P, dO: dot_back(t(P), dO),
        dV_new_S=lambda dot_back, tail_back, K, dS_next: dot_back(tail_back * K, dS_next),
        dV_new=lambda dV_new_P, dV_new_S: dV_new_P + dV_new_S,
        d_tail_K=lambda dot_back, V_new, dS_next: dot_back(V_new, t(dS_next)),
        d_whole=lambda whole_back, S, dS_next: _sum_in_series(whole_back * S * dS_next),
        dP=lambda dot_back, dO, V_new: np.tril(dot_back(dO, t(V_new))),
        dQK=lambda dP, Gamma_back: dP * Gamma_back,
        d_decay_Q=lambda dot_back, dO, S: dot_back(dO, t(S)),
        dQ_S=lambda decay, d_decay_Q: decay * d_decay_Q,
        dQ_P=lambda dot_back, dQK, K: dot_back(dQK, K),
        dQ=lambda dQ_S, dQ_P: dQ_S + dQ_P,
        dK_P=lambda dot_back, dQK, Q: dot_back(t(dQK), Q),
        dK_S=lambda tail_back, d_tail_K: tail_back * d_tail_K,
        # V_new = U - W S
        dU=lambda dV_new: dV_new,
        dW=lambda dot_back, dV_new, S: -dot_back(dV_new, t(S)),
        dS_kept=lambda whole_back, dS_next: whole_back * dS_next,
        dS_read=lambda dot_back, decay, Q, dO: dot_back(t(decay * Q), dO),
        dS_erased=lambda dot_back, W, dV_new: dot_back(t(W), dV_new),
        dS=lambda dS_kept, dS_read, dS_erased: dS_kept + dS_read - dS_erased,
        # U = T (b V), W = T (b decay K)
        dT_U=lambda dot_back, dU, b, V: dot_back(dU, t(b * V)),
        dT_W=lambda dot_back, dW, b, decay, K: dot_back(dW, t(b * decay * K)),
        dT=lambda dT_U, dT_W: np.tril(dT_U + dT_W),
        d_bV=lambda dot_back, T, dU: dot_back(t(T), dU),
        d_bK=lambda dot_back, T, dW: dot_back(t(T), dW),
        dV=lambda b, d_bV: b * d_bV,
        dK_W=lambda b, decay, d_bK: b * decay * d_bK,
        # T = (I + A)^-1, A = strict_lower(b gram Gamma)
        dA=lambda dot_back, T, dT: -np.tril(dot_back(t(T), dot_back(dT, t(T))), -1),
        dgram=lambda b, dA, Gamma_back: b * dA * Gamma_back,
        dK_A=lambda dot_back, dgram, K: dot_back(dgram + t(dgram), K),
        dK=lambda dK_P, dK_S, dK_W, dK_A: dK_P + dK_S + dK_W + dK_A,
        dBeta_V=lambda d_bV, V: (d_bV * V).sum(-1),
        dBeta_W=lambda d_bK, decay, K: (d_bK * decay * K).sum(-1),
        dBeta_A=lambda dA, gram, Gamma_back: (dA * gram * Gamma_back).sum(-1),
        dBeta=lambda dBeta_V, dBeta_W, dBeta_A: dBeta_V + dBeta_W + dBeta_A,
        # Gamma_ij, decay, tail and whole are exponentials of gc
        pair_P=lambda dP, QK, Gamma_back: dP * (QK * Gamma_back),
        pair_A=lambda dA, A: dA * A,
        pair=lambda pair_P, pair_A: pair_P + pair_A,
        row_Q=lambda decay, d_decay_Q, Q: (decay * d_decay_Q * Q).sum(-1),
        row_W=lambda d_bK, b, decay, K: (d_bK * b * decay * K).sum(-1),
        d_tail=lambda d_tail_K, tail_back, K: (d_tail_K * tail_back * K).sum(-1),
        dgc=lambda pair, row_Q, row_W, d_tail, d_whole: _with_last(
            pair.sum(-1) - pair.sum(-2) + row_Q + row_W - d_tail, d_tail.sum(-1) + d_whole),
        dG=lambda dgc: np.flip(np.cumsum(np.flip(dgc, -1), -1, dtype=dgc.dtype), -1),
    ))
