"""The chunked delta rule written out chunk by chunk, every intermediate of notation.py by its name, with its gradient.

It serves the oracle twice: in float64 it gives the intermediates that the vectors carry, and in float32 (or with every
operand of a matrix product rounded to bfloat16) the noise that an honest kernel of that precision makes. Where
ops/gated_delta_rule is clever this file is not: plain cumulative sums in the working precision, dg from the difference
of sums, a solved triangle. The two agree to 1e-12 in float64, which the test suite checks.
"""
import numpy as np

from deltanet_ref.notation import value_to_key_head

FORWARD = ("gc", "A", "T", "U", "W", "S", "V_new")
BACKWARD = ("dV_new", "dS", "dW", "dU", "dT", "dA", "dgc")
INTERMEDIATES = FORWARD + BACKWARD


def chunk_by_chunk(x, *, chunk=64, operand=lambda x: x):
    """Everything that one pass forward and backward computes.

    x        q, k, v, g, beta, S0, scale, do, dS_end of a dense case in one float dtype; head_order when it is tiled
    operand  applied to both operands of every matrix product: the rounding of a tensor core
    returns  name -> array: o, S_end, dq, dk, dv, dg, dbeta, dS0, and the intermediates token by token:
             gc, dgc (B, L, H_v); A, T, dA, dT (B, L, H_v, C), row i of its chunk's matrix; U, V_new, dU, dV_new
             (B, L, H_v, d_v); W, dW (B, L, H_v, d_k); S, dS (B, N, H_v, d_k, d_v), the state entering each chunk
    """
    B, L, H_v, d_v = x["v"].shape
    heads = value_to_key_head(x["k"].shape[2], H_v, x.get("head_order", "grouped"))
    q, k = x["q"][:, :, heads], x["k"][:, :, heads]
    dtype = x["v"].dtype
    N = -(-L // chunk)

    def dot(a, b):
        return operand(a) @ operand(b)

    def rows(*shape):
        return np.zeros((B, L, H_v, *shape), dtype)

    def states():
        return np.zeros((B, N, H_v, q.shape[3], d_v), dtype)

    out = {"gc": rows(), "A": rows(chunk), "T": rows(chunk), "U": rows(d_v), "W": rows(q.shape[3]), "V_new": rows(d_v),
           "S": states(), "o": rows(d_v), "dV_new": rows(d_v), "dS": states(), "dW": rows(q.shape[3]), "dU": rows(d_v),
           "dT": rows(chunk), "dA": rows(chunk), "dgc": rows(), "dq": np.zeros_like(q), "dk": np.zeros_like(k),
           "dv": rows(d_v), "dg": rows(), "dbeta": rows()}
    kept = []
    S = x["S0"]
    for n in range(N):
        t = slice(n * chunk, min((n + 1) * chunk, L))
        Q, K, V, g, beta = (a[:, t].swapaxes(1, 2) for a in (q, k, x["v"], x["g"], x["beta"]))   # (B, H_v, C, .)
        b, C = beta[..., None], g.shape[2]
        gc = np.cumsum(g, -1, dtype=dtype)
        Gamma = np.exp(np.where(np.tri(C, dtype=bool), gc[..., :, None] - gc[..., None, :], -np.inf).astype(dtype))
        gram = dot(K, _t(K))
        A = np.tril(b * gram * Gamma, -1)
        T = _solved(A)
        decay, tail = np.exp(gc)[..., None], np.exp(gc[..., -1:] - gc)[..., None]
        whole = np.exp(gc[..., -1])[..., None, None]
        U, W = dot(T, b * V), dot(T, b * decay * K)
        V_new = U - dot(W, S)
        QK = dot(Q, _t(K))
        P = QK * Gamma
        o = x["scale"] * (dot(decay * Q, S) + dot(P, V_new))
        kept.append((t, Q, K, V, b, gc, Gamma, gram, A, T, decay, tail, whole, U, W, V_new, QK, P, S))
        _put(out, t, gc=gc, A=A, T=T, U=U, W=W, V_new=V_new, o=o)
        out["S"][:, n] = S
        S = whole * S + dot(_t(tail * K), V_new)
    out["S_end"] = S
    dS = x["dS_end"]
    for n in reversed(range(N)):
        t, Q, K, V, b, gc, Gamma, gram, A, T, decay, tail, whole, U, W, V_new, QK, P, S = kept[n]
        do = np.asarray(x["scale"] * x["do"][:, t].swapaxes(1, 2), dtype)
        # S' = whole S + (tail K)^T V_new;  o = scale [decay Q S + P V_new]
        dV_new = dot(_t(P), do) + dot(tail * K, dS)
        d_tail_K, d_whole = dot(V_new, _t(dS)), _sum_in_series(whole * S * dS)
        dP = np.tril(dot(do, _t(V_new)))
        d_decay_Q = dot(do, _t(S))
        dQ = decay * d_decay_Q + dot(dP * Gamma, K)
        dK = dot(_t(dP * Gamma), Q) + tail * d_tail_K
        # V_new = U - W S
        dU, dW = dV_new, -dot(dV_new, _t(S))
        dS = whole * dS + dot(_t(decay * Q), do) - dot(_t(W), dV_new)
        # U = T (b V), W = T (b decay K)
        dT = np.tril(dot(dU, _t(b * V)) + dot(dW, _t(b * decay * K)))
        d_bV, d_bK = dot(_t(T), dU), dot(_t(T), dW)
        dV = b * d_bV
        dK = dK + b * decay * d_bK
        # T = (I + A)^-1, A = strict_lower(b gram Gamma)
        dA = -np.tril(dot(_t(T), dot(dT, _t(T))), -1)
        dgram = b * dA * Gamma
        dK = dK + dot(dgram + _t(dgram), K)
        dbeta = (d_bV * V).sum(-1) + (d_bK * decay * K).sum(-1) + (dA * gram * Gamma).sum(-1)
        pair = dP * P + dA * A                                             # Gamma dGamma
        d_tail = (d_tail_K * tail * K).sum(-1)
        dgc = pair.sum(-1) - pair.sum(-2) + (decay * d_decay_Q * Q).sum(-1) + (d_bK * b * decay * K).sum(-1) - d_tail
        dgc[..., -1] += d_tail.sum(-1) + d_whole
        dg = np.flip(np.cumsum(np.flip(dgc, -1), -1, dtype=dtype), -1)
        _put(out, t, dV_new=dV_new, dW=dW, dU=dU, dT=dT, dA=dA, dgc=dgc, dq=dQ, dk=dK, dv=dV, dg=dg, dbeta=dbeta)
        out["dS"][:, n] = dS
    out["dS0"] = dS
    for name in ("dq", "dk"):
        per_value_head = out[name]
        out[name] = np.zeros(x["k"].shape, dtype)
        for h, key_head in enumerate(heads):
            out[name][:, :, key_head] += per_value_head[:, :, h]
    return out


def _put(out, t, **values):
    """Rows of a chunk (B, H_v, C, ...) into the arrays (B, L, H_v, ...); a short chunk's matrices fill its columns."""
    for name, value in values.items():
        rows = value.swapaxes(1, 2)
        out[name][:, t][(..., slice(0, rows.shape[3])) if rows.ndim == 4 else ...] = rows


def _solved(A):
    """(I + A)^-1, row by row: T_i = e_i - A_i T, which needs only the rows above."""
    T = np.zeros_like(A)
    for i in range(A.shape[-1]):
        T[..., i, :] = -(A[..., i, None, :i] @ T[..., :i, :])[..., 0, :]
        T[..., i, i] = 1
    return T


def _sum_in_series(x):
    """Sum over the last two axes, one after the other as a simple kernel does; NumPy's own sum is more exact."""
    return np.cumsum(x.reshape(*x.shape[:-2], -1), -1)[..., -1]


def _t(x):
    return x.swapaxes(-1, -2)
