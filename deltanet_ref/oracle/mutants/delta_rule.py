"""THE table of mistakes in the gated delta rule: number in catalogue.py, title, and two ways to make it.

`rule` changes the loop over tokens, `chunks` and `padded` the two chunked forms, `tokens` the first of them in chunks
of one token. The steps and their correct equations are in forms.py, chunk_by_chunk.py and walk.py.
"""
import numpy as np

from deltanet_ref.oracle.cases import bfloat16
from deltanet_ref.oracle.chunk_by_chunk import inverse, t
from deltanet_ref.oracle.mutants.forms import log_decay_gradient
from deltanet_ref.oracle.mutants.mutations import (
    Mistake,
    both_chunked,
    chunks,
    cut_to_bfloat16,
    each,
    float16,
    inverse_by_squaring,
    loop_and_chunks,
    padded,
    row_0_alone,
    row_0_for_all,
    rule,
    tf32,
    tokens,
    without,
)
from deltanet_ref.oracle.walk import product

GRADIENTS = ("dq", "dk", "dv", "dg", "dbeta", "dS0")


def as_vk(S):
    """The memory of S read as (d_v, d_k)."""
    return S.reshape(*S.shape[:2], S.shape[3], S.shape[2]).swapaxes(2, 3)


def of_vk(S):
    """The memory of a (d_v, d_k) state read as (d_k, d_v)."""
    return S.swapaxes(2, 3).reshape(S.shape)


def unit(x):
    """Rows divided by their length, with eps."""
    return x / np.sqrt((x ** 2).sum(-1, keepdims=True) + 1e-6)


def bare_unit(x):
    """Rows divided by their length, without eps."""
    return x / np.sqrt((x ** 2).sum(-1, keepdims=True))


def product_of_exps(gc):
    """exp(gc_i) exp(-gc_j), which overflows."""
    return np.tril(np.exp(gc)[..., :, None] * np.exp(-gc)[..., None, :])


def exp_then_mask(gc):
    """exp(gc_i - gc_j) above the diagonal too, masked by a product."""
    return np.exp(gc[..., :, None] - gc[..., None, :]) * np.tri(gc.shape[-1], dtype=gc.dtype)


def one_token_late(cu_seqlens):
    """Boundaries of packed sequences moved by one token."""
    return np.r_[0, cu_seqlens[1:-1] + 1, cu_seqlens[-1]]


def only_head(which, k, key_head):
    """In place of the sum over the value heads of a key head: one of them, which = 0 the first, -1 the last."""
    heads = [np.flatnonzero(key_head == key)[which] for key in range(k.shape[2])]
    return lambda rows: rows[:, :, heads]


def is_head(which, key_head):
    """(H_v, 1, 1): 1 for the first (which = 0) or last (-1) value head of each key head, else 0."""
    chosen = [np.flatnonzero(key_head == key)[which] for key in np.unique(key_head)]
    return np.isin(np.arange(len(key_head)), chosen)[:, None, None]


def after_the_first_gate(gc, K):
    """The decay from the first token of a chunk to each token, (..., C, 1)."""
    return np.exp(gc - gc[..., :1]).astype(K.dtype)[..., None]


def dS_without_first_gate(gc, K, Q, T, b, dO, dV_new, dS_next):
    """The gradient of the state entering a chunk, decayed from its first token instead of from its start."""
    late = after_the_first_gate(gc, K)
    return late[..., -1:, :] * dS_next + t(late * Q) @ dO - t(T @ (b * late * K)) @ dV_new


FORWARD = (
    Mistake(1, "the state carries on into the next sequence",
            *loop_and_chunks(S_first=lambda S0, previous: S0 if previous is None else previous)),
    Mistake(1, "the final state is added to the next initial state",
            *loop_and_chunks(S_first=lambda S0, previous: S0 if previous is None else S0 + previous)),
    Mistake(1, "sequences start one token late",
            *loop_and_chunks(cu_seqlens=lambda cu_seqlens: None if cu_seqlens is None else one_token_late(cu_seqlens))),

    Mistake(2, "value head h reads key head h % H_k",
            rule(head_order=lambda: "tiled"),
            chunks(key_head=lambda q, v: np.arange(v.shape[2]) % q.shape[2])),
    Mistake(2, "every value head reads the first key head",
            rule(key_head=lambda key_head: 0 * key_head),
            chunks(q_rows=lambda q, key_head: q[:, :, 0 * key_head], k_rows=lambda k, key_head: k[:, :, 0 * key_head])),
    Mistake(2, "q, but not k, of key head h % H_k",
            *loop_and_chunks(q_rows=lambda q, v: q[:, :, np.arange(v.shape[2]) % q.shape[2]])),

    Mistake(3, "S0 read as (d_v, d_k)", rule(each(as_vk, "S0")), chunks(S_first=lambda S0: as_vk(S0))),
    Mistake(3, "S0 stored as (d_v, d_k), read as (d_k, d_v)",
            rule(each(of_vk, "S0")), chunks(S_first=lambda S0: of_vk(S0))),
    Mistake(3, "S_end stored as (d_v, d_k)", *loop_and_chunks(each(of_vk, "S_end"))),
    Mistake(3, "S_end read as (d_v, d_k)", *loop_and_chunks(each(as_vk, "S_end"))),
    Mistake(3, "S0 read and S_end stored as (d_v, d_k)",
            rule(each(as_vk, "S0"), each(of_vk, "S_end")),
            chunks(each(of_vk, "S_end"), S_first=lambda S0: as_vk(S0))),
    Mistake(3, "S_end returned as (d_v, d_k)", *loop_and_chunks(S_end=lambda S_end: S_end.swapaxes(2, 3))),

    Mistake(4, "S0 ignored", rule(without("S0")), chunks(without("S_first"))),
    Mistake(4, "the state forgotten at every chunk", *both_chunked(S=lambda carried, n: carried * (n == 0))),
    Mistake(4, "the state reset to S0 at every chunk", *both_chunked(S=lambda S0: S0)),
    Mistake(4, "every row starts from the S0 of row 0", *loop_and_chunks(each(row_0_for_all, "S0"))),
    Mistake(4, "S0 of the next head",
            rule(S0=lambda S0: np.roll(S0, 1, 1)), chunks(S_first=lambda S0: np.roll(S0, 1, 1))),

    Mistake(5, "exp(gc_i) times exp(-gc_j)",
            *both_chunked(Gamma=lambda gc, K: product_of_exps(gc.astype(K.dtype))), by="size"),
    Mistake(5, "exp above the diagonal, masked by a product",
            *both_chunked(Gamma=lambda gc, K: exp_then_mask(gc.astype(K.dtype))), by="size"),
    Mistake(5, "exp(gc_C) divided by exp(gc_j)",
            *both_chunked(tail=lambda gc, K: np.exp(gc[..., -1:, None].astype(K.dtype))
                          / np.exp(gc.astype(K.dtype))[..., None]), by="size"),
    Mistake(5, "log decays clamped at -10",
            rule(g=lambda g: np.maximum(g, -10)), chunks(g=lambda g: np.where(g < -10, g.dtype.type(-10), g))),

    Mistake(7, "no scale", rule(scale=lambda: 1.0), chunks(Out=lambda Out, scale: Out / scale)),
    Mistake(7, "scale twice", rule(scale=lambda scale: scale ** 2), chunks(Out=lambda Out, scale: Out * scale)),
    Mistake(7, "scale fixed to d_k ** -0.5",
            rule(scale=lambda k: k.shape[-1] ** -0.5),
            chunks(Out=lambda Out, scale, Q: Out / scale * Q.shape[-1] ** -0.5)),
    Mistake(7, "scale fixed to d_v ** -0.5",
            rule(scale=lambda v: v.shape[-1] ** -0.5),
            chunks(Out=lambda Out, scale, V: Out / scale * V.shape[-1] ** -0.5)),
    Mistake(7, "scale only in the part of o that reads the state", *both_chunked(P=lambda P, scale: P / scale)),

    Mistake(8, "keys normalised inside", rule(each(unit, "k")), chunks(k_rows=lambda k_rows: unit(k_rows))),
    Mistake(8, "q and k normalised inside", rule(each(unit, "q", "k")), chunks(each(unit, "q_rows", "k_rows"))),
    Mistake(8, "keys normalised inside, 0 / 0 for a zero key",
            rule(each(bare_unit, "k")), chunks(each(bare_unit, "k_rows"))),

    Mistake(10, "A without Gamma", *both_chunked(A=lambda b, gram: np.tril(b * gram, -1))),
    Mistake(10, "A without beta", *both_chunked(A=lambda gram, Gamma: np.tril(gram * Gamma, -1))),
    Mistake(10, "A_ij with beta_j", *both_chunked(A=lambda b, gram, Gamma: np.tril(t(b) * gram * Gamma, -1))),
    Mistake(10, "A with its diagonal",
            *both_chunked(A=lambda b, gram, Gamma: np.tril(b * gram * Gamma),
                          T=lambda A: np.linalg.inv(np.eye(A.shape[-1], dtype=A.dtype) + A))),
    Mistake(10, "(I - A)^-1", *both_chunked(T=lambda A: inverse(-A))),
    Mistake(10, "no T", *both_chunked(T=lambda A: np.eye(A.shape[-1], dtype=A.dtype))),
    Mistake(10, "I - A instead of T", *both_chunked(T=lambda A: np.eye(A.shape[-1], dtype=A.dtype) - A)),
    Mistake(10, "U without beta", *both_chunked(U=lambda T, V: T @ V)),
    Mistake(10, "W without beta", *both_chunked(W=lambda T, decay, K: T @ (decay * K))),
    Mistake(10, "W without its decay", *both_chunked(W=lambda T, b, K: T @ (b * K))),
    Mistake(10, "V_new = U + W S", *both_chunked(V_new=lambda U, W, S: U + W @ S)),
    Mistake(10, "V_new = U", *both_chunked(V_new=lambda U: U)),
    Mistake(10, "scores with a 0/1 mask instead of Gamma", *both_chunked(P=lambda QK: np.tril(QK))),
    Mistake(10, "scores strictly below the diagonal", *both_chunked(P=lambda P: np.tril(P, -1))),
    Mistake(10, "scores without a mask", *both_chunked(P=lambda QK, Gamma: QK * np.maximum(Gamma, t(Gamma)))),

    Mistake(12, "g = 0 treated as no g, its memory uninitialised",
            rule(g=lambda g: g if g.any() else g - 100), chunks(g=lambda g: g if g.any() else g - g.dtype.type(0.7)),
            by="size"),

    Mistake(13, "o of a short chunk not written", *both_chunked(Out=lambda Out, full: Out * full)),
    Mistake(13, "o of a short chunk not written, NaN in its memory",
            *both_chunked(Out=lambda Out, full: Out if full else Out * np.nan)),
    Mistake(13, "the last gate of a short chunk read from its padding",
            *both_chunked(gc_end=lambda gc_end, full: gc_end * full)),
    Mistake(13, "a short chunk does not reach the state",
            *both_chunked(S_next=lambda S_next, S, full: S_next if full else S)),

    Mistake(15, "gates of row 0 for every row", *loop_and_chunks(each(row_0_for_all, "g", "beta"))),
    Mistake(15, "keys of row 0 for every row", rule(each(row_0_for_all, "k")), chunks(each(row_0_for_all, "k_rows"))),
    Mistake(15, "only row 0 is computed", *loop_and_chunks(each(row_0_alone, "o", "S_end"))),

    Mistake(17, "padding writes",
            rule(beta=lambda beta: np.where(beta == 0, beta.dtype.type(1), beta)),
            chunks(beta=lambda beta: np.where(beta == 0, beta.dtype.type(0.5), beta)), by="size"),
    Mistake(17, "padding decays",
            rule(g=lambda g, beta: np.where(beta == 0, g.dtype.type(-1), g)),
            chunks(g=lambda g, beta: np.where(beta == 0, g.dtype.type(-0.5), g)), by="size"),

    Mistake(18, "state in bfloat16 after every token",
            rule(each(bfloat16, "S_next")), tokens(each(bfloat16, "S_next")), by="size"),
    Mistake(18, "state in float16 after every token",
            rule(each(float16, "S_next")), tokens(each(float16, "S_next")), by="size"),
    Mistake(18, "state cut to bfloat16, not rounded, after every token",
            rule(each(cut_to_bfloat16, "S_next")), tokens(each(cut_to_bfloat16, "S_next")), by="size"),
    Mistake(18, "state in bfloat16 after every chunk", *both_chunked(each(bfloat16, "S_next")), by="size"),
    Mistake(18, "state in float16 after every chunk", *both_chunked(each(float16, "S_next")), by="size"),
    Mistake(18, "state in bfloat16 between chunks",
            *both_chunked(S=lambda carried, n: carried if n == 0 else bfloat16(carried)), by="size"),
    Mistake(18, "state in float16 between chunks",
            *both_chunked(S=lambda carried, n: carried if n == 0 else float16(carried)), by="size"),

    Mistake(19, "TF32 in every product",
            chunks(operand=lambda: tf32), rule(operand=lambda: tf32), by="size"),
    Mistake(19, "bfloat16 in every product",
            chunks(operand=lambda: bfloat16), rule(operand=lambda: bfloat16), by="size"),

    Mistake(20, "T by squaring", *both_chunked(T=lambda A: inverse_by_squaring(A, A.shape[-1])), by="size"),
    Mistake(20, "T by too few squarings", *both_chunked(T=lambda A: inverse_by_squaring(A, 8))),

    Mistake(27, "beta at most 1",
            rule(beta=lambda beta: np.minimum(beta, 1)), chunks(beta=lambda beta: beta - np.maximum(beta - 1, 0))),
    Mistake(27, "beta kept below 1",
            rule(beta=lambda beta: np.minimum(beta, beta.dtype.type(0.99))),
            chunks(beta=lambda beta: np.minimum(beta, beta.dtype.type(0.98))), by="size"),

    Mistake(28, "error measured before the decay",
            rule(error=lambda V, K, carried: V - K @ carried),
            chunks(A=lambda b, gram, gc, G: np.tril(
                       b * gram * np.exp(np.minimum((gc - G)[..., None] - gc[..., None, :], 0)), -1),
                   W=lambda T, b, gc, G, K: T @ (b * np.exp(gc - G)[..., None] * K))),
    Mistake(28, "output read before the write",
            rule(Out=lambda scale, Q, S_decayed: scale * (Q @ S_decayed)), chunks(P=lambda P: np.tril(P, -1))),
    Mistake(28, "output read before the decay",
            rule(Out=lambda scale, Q, carried: scale * (Q @ carried)), tokens(Out=lambda scale, Q, S: scale * (Q @ S))),
    Mistake(28, "decay after the write",
            rule(S_decayed=lambda carried: carried,
                 S_next=lambda G, carried, K, u: np.exp(G)[..., None] * (carried + t(K) @ u)),
            tokens(W=lambda T, b, K: T @ (b * K),
                   Out=lambda scale, decay, Q, S, P, V_new: scale * decay * (Q @ S + P @ V_new),
                   S_next=lambda whole, S, K, V_new: whole * (S + t(K) @ V_new))),

    Mistake(29, "the decay not carried to the next chunk",
            *both_chunked(S_next=lambda S, tail, K, V_new: S + t(tail * K) @ V_new)),
    Mistake(29, "the sum of log decays not reset at a chunk",
            *both_chunked(gc=lambda gc, g, start, at: gc + g[:, start:at].sum(1)[..., None])),
    Mistake(29, "o reads the state before the chunk without its decay",
            *both_chunked(Out=lambda scale, Q, S, P, V_new: scale * (Q @ S + P @ V_new))),
    Mistake(29, "what a chunk writes does not decay until its end",
            *both_chunked(S_next=lambda whole, S, K, V_new: whole * S + t(K) @ V_new)),
    Mistake(29, "the first gate of a chunk left out", *both_chunked(gc=lambda gc, G: gc - G[..., :1])),
    Mistake(29, "no decay at all", rule(without("g")), chunks(gc=lambda gc: 0 * gc)),

    Mistake(33, "g and beta swapped", *loop_and_chunks(g=lambda beta: beta, beta=lambda g: g)),

    Mistake(34, "beta rounded to bfloat16", *loop_and_chunks(each(bfloat16, "beta"))),
    Mistake(34, "g rounded to bfloat16", *loop_and_chunks(each(bfloat16, "g"))),
    Mistake(34, "beta rounded to float16", *loop_and_chunks(each(float16, "beta"))),
    Mistake(34, "g rounded to float16", *loop_and_chunks(each(float16, "g"))),
    Mistake(34, "exp(g) rounded to bfloat16",
            rule(S_decayed=lambda G, carried: bfloat16(np.exp(G))[..., None] * carried),
            tokens(gc=lambda gc: np.maximum(np.log(bfloat16(np.exp(gc))), -200))),
)

BACKWARD = (
    Mistake(1, "the gradient of the state carries on into the sequence before",
            *loop_and_chunks(dS_last=lambda dS_end, following: dS_end if following is None else dS_end + following)),

    Mistake(2, "one value head's gradient for its key head",
            rule(shared=lambda k, key_head: only_head(-1, k, key_head)),
            chunks(each(lambda d, key_head: d * is_head(-1, key_head), "dQ", "dK", also=("key_head",)))),
    Mistake(2, "the first value head's gradient for its key head",
            rule(shared=lambda k, key_head: only_head(0, k, key_head)),
            chunks(each(lambda d, key_head: d * is_head(0, key_head), "dQ", "dK", also=("key_head",)))),
    Mistake(2, "the mean over the value heads of a key head",
            rule(each(lambda d, k, v: d * k.shape[2] / v.shape[2], "dq", "dk", also=("k", "v"))),
            chunks(each(lambda d, k, V: d * k.shape[2] / V.shape[1], "dQ", "dK", also=("k", "V")))),

    Mistake(3, "dS_end read as (d_v, d_k)", rule(each(as_vk, "dS_end")), chunks(dS_last=lambda dS_end: as_vk(dS_end))),
    Mistake(3, "dS0 stored as (d_v, d_k)", rule(each(of_vk, "dS0")), chunks(dS_first=lambda dS: of_vk(dS))),

    Mistake(5, "exp(gc_i) times exp(-gc_j) in the backward",
            *both_chunked(Gamma_back=lambda gc, K: product_of_exps(gc.astype(K.dtype))), by="size"),

    Mistake(6, "dg divided by a decay that has vanished",
            *loop_and_chunks(dG=lambda dG, G: np.exp(G) * dG / np.exp(G)), by="size"),
    Mistake(6, "dg is the gradient of exp(g)",
            rule(dG=lambda dS_decayed, carried: (dS_decayed * carried).sum((-2, -1))[..., None]),
            chunks(dG=lambda dG, G: dG * np.exp(-G))),
    Mistake(6, "dg summed from what was rounded to bfloat16",
            chunks(each(bfloat16, "dgc")),
            padded(dG=lambda pair, row_Q, row_W, d_tail, d_whole: log_decay_gradient(
                *map(bfloat16, (pair, row_Q + row_W, d_tail, d_whole)))), by="size"),

    Mistake(7, "dq without scale", *loop_and_chunks(dQ=lambda dQ, scale: dQ / scale)),
    Mistake(7, "dq with scale twice", *loop_and_chunks(dQ=lambda dQ, scale: dQ * scale)),
    Mistake(7, "no scale except in dq",
            *loop_and_chunks(do_rows=lambda do: do, dQ=lambda dQ, scale: dQ * scale)),

    Mistake(10, "gradient of the scores without Gamma", *both_chunked(dQK=lambda dP: dP)),

    Mistake(11, "dS does not go through what a token erases",
            rule(dS_decayed=lambda dS_written: dS_written),
            rule(dS=lambda G, dS_written: np.exp(G)[..., None] * dS_written)),
    Mistake(11, "dS does not go through what a chunk erases", *both_chunked(without("dS_erased"))),
    Mistake(11, "dS misses what a chunk reads", *both_chunked(without("dS_read"))),
    Mistake(11, "dV_new without what later chunks read", *both_chunked(without("dV_new_S"))),
    Mistake(11, "dV_new without what the chunk reads", *both_chunked(without("dV_new_P"))),
    Mistake(11, "no dW", *both_chunked(without("dW"))),
    Mistake(11, "no dA", *both_chunked(without("dA"))),
    Mistake(11, "dA with the other sign", *both_chunked(dA=lambda dA: -dA)),
    Mistake(11, "dA without T on its left",
            chunks(dA=lambda dT, T: -np.tril(dT @ t(T), -1)),
            padded(dA=lambda dU, U, dW, W: -np.tril(dU @ t(U) + dW @ t(W), -1))),
    Mistake(11, "dA without T on either side",
            chunks(dA=lambda dT: -np.tril(dT, -1)),
            padded(dA=lambda dU, dW, b, V, decay, K: -np.tril(dU @ t(b * V) + dW @ t(b * decay * K), -1))),
    Mistake(11, "dA without what comes through U",
            chunks(without("dT_U")), padded(dA=lambda d_bK, W: -np.tril(d_bK @ t(W), -1))),
    Mistake(11, "dA without what comes through W",
            chunks(without("dT_W")), padded(dA=lambda d_bV, U: -np.tril(d_bV @ t(U), -1))),
    Mistake(11, "nothing through the scores", *both_chunked(without("dP"))),
    Mistake(11, "dk of one side of the Gram matrix", *both_chunked(dK_A=lambda dgram, K: dgram @ K)),
    Mistake(11, "dk without what it erases",
            rule(without("dK_erase")), chunks(without("dK_W"), dK_A=lambda dgram, K: t(dgram) @ K)),
    Mistake(11, "dk without what it writes",
            rule(without("dK_write")), chunks(without("dK_P", "dK_S"), dK_A=lambda dgram, K: dgram @ K)),
    Mistake(11, "dk without what reaches the end of the chunk", *both_chunked(without("dK_S"))),
    Mistake(11, "dk without the scores", *both_chunked(without("dK_P"))),
    Mistake(11, "dk without W", *both_chunked(without("dK_W"))),
    Mistake(11, "dq without the state", *both_chunked(dQ=lambda dQ_P: dQ_P)),
    Mistake(11, "dq without the scores", *both_chunked(without("dQ_P"))),
    Mistake(11, "dbeta without what is erased",
            rule(dBeta=lambda du, V: (du * V).sum(-1)), chunks(without("dBeta_W", "dBeta_A"))),
    Mistake(11, "dbeta without A", *both_chunked(without("dBeta_A"))),
    Mistake(11, "dbeta without W", *both_chunked(without("dBeta_W"))),
    Mistake(11, "dv without beta", rule(dV=lambda du: du), chunks(dV=lambda d_bV: d_bV)),
    Mistake(11, "dg without what is erased",
            rule(dG=lambda dS_written, S_decayed: (dS_written * S_decayed).sum((-2, -1))[..., None]),
            rule(dG=lambda dG, V, error, d_error: dG + ((V - error) * d_error).sum(-1))),
    Mistake(11, "dg without the scores and A", *both_chunked(without("pair_P", "pair_A"))),
    Mistake(11, "dg without the scores", *both_chunked(without("pair_P"))),
    Mistake(11, "dg without A", *both_chunked(without("pair_A"))),
    Mistake(11, "dg without what is read", *both_chunked(without("row_Q"))),
    Mistake(11, "dg without W", *both_chunked(without("row_W"))),
    Mistake(11, "dg without the decay to the chunk's end", *both_chunked(without("d_tail"))),
    Mistake(11, "dg without the decay of the whole chunk", *both_chunked(without("d_whole"))),

    Mistake(13, "gradients of a short chunk not written",
            *both_chunked(each(lambda d, full: d * full, "dQ", "dK", "dV", "dG", "dBeta", also=("full",)))),
    Mistake(13, "in the backward, the last gate of a short chunk read from its padding",
            *both_chunked(gc_end_back=lambda gc_end, full: gc_end * full)),

    Mistake(14, "dS_end ignored", rule(without("dS_end")), chunks(without("dS_last"))),
    Mistake(14, "dS0 lost", rule(without("dS0")), chunks(without("dS_first"))),
    Mistake(14, "dS_end returned as dS0", rule(dS0=lambda dS_end: dS_end), chunks(dS_first=lambda dS_end: dS_end)),
    Mistake(14, "dS0 is the gradient after the first token",
            rule(dS_first=lambda dS_next: dS_next), tokens(dS_first=lambda dS_next: dS_next)),

    Mistake(15, "gradients of row 0 for every row", *loop_and_chunks(each(row_0_for_all, *GRADIENTS))),
    Mistake(15, "gradients of row 0 alone", *loop_and_chunks(each(row_0_alone, *GRADIENTS))),
    Mistake(15, "dS_end of row 0 for every row", *loop_and_chunks(each(row_0_for_all, "dS_end"))),
    Mistake(15, "do of row 0 for every row",
            rule(each(row_0_for_all, "do")), chunks(each(row_0_for_all, "do_rows"))),

    Mistake(18, "dS in bfloat16 after every token",
            rule(each(bfloat16, "dS")), tokens(each(bfloat16, "dS")), by="size"),
    Mistake(18, "dS in bfloat16 after every chunk", *both_chunked(each(bfloat16, "dS")), by="size"),

    Mistake(19, "TF32 in the backward",
            chunks(dot_back=lambda: product(tf32)), rule(dot_back=lambda: product(tf32)), by="size"),

    Mistake(28, "dq of the state before the write",
            rule(dQ=lambda dO, S_decayed: dO @ t(S_decayed)), chunks(dQ_P=lambda dQK, K: np.tril(dQK, -1) @ K)),

    Mistake(29, "dS does not decay from token to token",
            rule(dS=lambda dS_decayed: dS_decayed),
            tokens(dS=lambda dS_next, Q, dO, b, K, dV_new: dS_next + t(Q) @ dO - t(b * K) @ dV_new)),
    Mistake(29, "dS does not decay from chunk to chunk", *both_chunked(dS_kept=lambda dS_next: dS_next)),
    Mistake(29, "dS without the first gate of a chunk", *both_chunked(dS=dS_without_first_gate)),
    Mistake(29, "dS without the decay of what a chunk reads", *both_chunked(dS_read=lambda Q, dO: t(Q) @ dO)),

    Mistake(32, "dq and dk swapped", *loop_and_chunks(dq=lambda dk: dk, dk=lambda dq: dq)),
    Mistake(32, "dg and dbeta swapped", *loop_and_chunks(dg=lambda dbeta: dbeta, dbeta=lambda dg: dg)),
    Mistake(32, "dv before dq and dk", *loop_and_chunks(dq=lambda dv: dv, dk=lambda dq: dq, dv=lambda dk: dk)),
)
