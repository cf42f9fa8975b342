"""Kernels for the tests of the oracle: a loop over tokens, forward and backward, into which single mistakes can be
planted, and a chunked form. They share no code with deltanet_ref.ops or the mutants."""

import numpy as np


def loop_forward(q, k, v, *, g, beta, S0, scale, cu_seqlens=None, mistake=None, states=None):
    """One step per token, for all rows and heads at once; packed sequences one after the other."""
    if cu_seqlens is not None:
        parts = [
            loop_forward(
                *(x[:, a:b] for x in (q, k, v)),
                g=g[:, a:b],
                beta=beta[:, a:b],
                S0=S0[n : n + 1],
                scale=scale,
                mistake=mistake,
            )
            for n, (a, b) in enumerate(zip(cu_seqlens, cu_seqlens[1:]))
        ]
        return np.concatenate([o for o, _ in parts], 1), np.concatenate([S for _, S in parts])
    q, k = expand(q, v, mistake), expand(k, v, mistake)
    L = v.shape[1]
    o = np.zeros_like(v)
    S = S0.copy()
    if mistake == "row 0's state for every row":
        S[:] = S[:1]
    if mistake == "beta at most 1":
        beta = np.minimum(beta, 1)
    if mistake == "keys normalised inside":
        k = k / np.maximum(np.sqrt((k * k).sum(-1, keepdims=True)), 1e-12)
    if mistake == "keys normalised inside, 0/0":
        with np.errstate(invalid="ignore", divide="ignore"):
            k = k / np.sqrt((k * k).sum(-1, keepdims=True))
    if mistake == "first head's decay for all":
        g = np.repeat(g[:, :, :1], g.shape[2], 2)
    for t in range(L):
        if mistake == "forgets at chunk borders" and t and t % 64 == 0:
            S = np.zeros_like(S)
        if states is not None:
            states.append(S)
        decay = np.exp(np.maximum(g[:, t], -10) if mistake == "decay clamped" else g[:, t])[..., None, None]
        before = S
        S = decay * S
        error = v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], before if mistake == "error before decay" else S)
        if mistake == "read before write":
            o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], S)
        S = S + k[:, t][..., None] * (beta[:, t][..., None] * error)[:, :, None]
        if mistake == "half precision state":
            S = S.astype(np.float16).astype(S.dtype)
        if mistake != "read before write":
            o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], S)
    if mistake == "tail of 16 not written":
        o[:, L - L % 16 :] = 0
    return o, S


def loop_backward(q, k, v, *, g, beta, S0, scale, do, dS_end, mistake=None):
    states = []
    loop_forward(q, k, v, g=g, beta=beta, S0=S0, scale=scale, states=states)
    H_k = k.shape[2]
    Q, K = expand(q, v), expand(k, v)
    dQ, dK, dv, dg, dbeta = (np.zeros_like(x) for x in (Q, K, v, g, beta))
    dS = np.zeros_like(dS_end) if mistake == "dS_end ignored" else dS_end.copy()
    for t in reversed(range(v.shape[1])):
        a = np.exp(g[:, t])[..., None, None]
        decayed, b = a * states[t], beta[:, t][..., None]
        error = v[:, t] - np.einsum("bhk,bhkv->bhv", K[:, t], decayed)
        S = decayed + K[:, t][..., None] * (b * error)[:, :, None]
        dQ[:, t] = (1 if mistake == "dq without scale" else scale) * np.einsum("bhv,bhkv->bhk", do[:, t], S)
        dS = dS + scale * Q[:, t][..., None] * do[:, t][:, :, None]
        du = np.einsum("bhk,bhkv->bhv", K[:, t], dS)
        dv[:, t] = du if mistake == "dv without beta" else b * du
        dbeta[:, t] = (du * (v[:, t] if mistake == "dbeta without the read" else error)).sum(-1)
        dK[:, t] = np.einsum("bhkv,bhv->bhk", dS, b * error)
        if mistake != "dk without the erased part":
            dK[:, t] -= np.einsum("bhkv,bhv->bhk", decayed, b * du)
        if mistake != "dS not through the erased part":
            dS = dS - K[:, t][..., None] * (b * du)[:, :, None]
        dg[:, t] = (dS * (states[t] if mistake == "dg without the decay" else decayed)).sum((-2, -1))
        dS = dS if mistake == "dS not decayed at chunk borders" and t % 64 == 0 else a * dS
    if mistake == "dS0 lost":
        dS = np.zeros_like(dS)
    if mistake == "dg of the second row from the first":
        dg[1:] = dg[:1]

    def shared(x):
        split = x.reshape(*x.shape[:2], H_k, -1, x.shape[3])
        return split[:, :, :, -1] if mistake == "one value head per key head" else split.sum(3)

    gradients = [shared(dQ), shared(dK), dv, dg, dbeta, dS]
    if mistake == "dq and dk swapped":
        gradients[:2] = gradients[1::-1]
    return tuple(gradients)


def expand(x, v, mistake=None):
    """Repeat key heads: (B, L, H_k, d) -> (B, L, H_v, d)."""
    H_k, H_v = x.shape[2], v.shape[2]
    heads = np.arange(H_v) % H_k if mistake == "heads modulo" else np.arange(H_v) // (H_v // H_k)
    return x[:, :, heads]


def chunked_forward(q, k, v, *, g, beta, S0, scale, chunk=32, matrix=lambda x: x, mistake=None):
    """The chunked form, with intermediates; `matrix` is applied to both operands of every product."""
    q, k = expand(q, v), expand(k, v)
    o, S = np.zeros_like(v), S0.copy()
    names = ("gc", "A", "T", "U", "W", "V_new", "S")
    kept = {name: [] for name in names}

    def mul(a, b):
        return matrix(a) @ matrix(b)

    for start in range(0, v.shape[1], chunk):
        t = slice(start, min(start + chunk, v.shape[1]))
        Q, K, V, b = (x[:, t].swapaxes(1, 2) for x in (q, k, v, beta[..., None]))
        gc = np.cumsum(g[:, t].swapaxes(1, 2), -1)
        n = gc.shape[2]
        lower = np.tri(n, dtype=bool)
        Gamma = np.exp(np.where(lower, gc[..., :, None] - gc[..., None, :], -np.inf)).astype(v.dtype)
        A = np.tril(b * mul(K, K.swapaxes(2, 3)) * (1 if mistake == "A without Gamma" else Gamma), -1)
        T = np.linalg.inv(np.eye(n, dtype=v.dtype) + A).astype(v.dtype)
        if mistake == "T = I - A":
            T = np.eye(n, dtype=v.dtype) - A
        decay = np.exp(gc)[..., None].astype(v.dtype)
        U, W = mul(T, b * V), mul(T, b * (1 if mistake == "W without decay" else decay) * K)
        V_new = U + mul(W, S) if mistake == "V_new plus W S" else U - mul(W, S)
        scores = mul(Q, K.swapaxes(2, 3)) * (lower if mistake == "0/1 mask" else Gamma)
        o[:, t] = (scale * (mul(decay * Q, S) + mul(scores, V_new))).swapaxes(1, 2)
        for name, value in zip(names, (gc, A, T, U, W, V_new, S)):
            kept[name].append(value.swapaxes(1, 2) if name != "S" else value[:, None])
        tail = np.exp(gc[..., -1:] - gc)[..., None].astype(v.dtype)
        carry = 1 if mistake == "decay not carried" else decay[..., -1:, :]
        S = carry * S + mul((tail * K).swapaxes(2, 3), V_new)
    for name in ("A", "T"):
        kept[name] = [np.pad(x, [(0, 0)] * 3 + [(0, chunk - x.shape[3])]) for x in kept[name]]
    return o, S, {name: np.concatenate(parts, 1) for name, parts in kept.items()}
