"""THE DEFINITION of the gated delta rule: one loop over tokens. Derivation: docs/derivations/delta-rule.md.

Source: Yang, Kautz, Hatamizadeh 2024, "Gated Delta Networks", eq. 10, with q scaled once and S stored (d_k, d_v).
"""
from typing import NamedTuple

import numpy as np

from deltanet_ref.ops.gated_delta_rule.arguments import Arguments, arguments, gradient_shapes, incoming_gradients


class RecurrentCache(NamedTuple):
    """Kept by recurrent_forward. Everything else is recomputed from the state that entered each token."""
    args: Arguments
    S: np.ndarray             # (B L, H_v, d_k, d_v) the state entering each token


def token_forward(q, k, v, g, beta, S, scale):
    """One token: decay, error, write, read [delta.1..4].

    q, k (..., d_k); v (..., d_v); g, beta (...,); S (..., d_k, d_v), the state before the token
    returns o (..., d_v), S (..., d_k, d_v)
    """
    S = np.exp(g)[..., None, None] * S                                     # 1  decay            S~ = exp(g) S
    u = beta[..., None] * (v - _read(k, S))                                # 2  error            u = beta (v - k S~)
    S = S + _outer(k, u)                                                   # 3  write            S = S~ + k u
    o = scale * _read(q, S)                                                # 4  read             o = scale q S
    return o, S


def token_backward(do, dS, q, k, v, g, beta, S, scale):
    """Gradients of one token [delta.5..9]; dS is the gradient of the state after it, S the state before it."""
    S_decayed = np.exp(g)[..., None, None] * S
    error = v - _read(k, S_decayed)
    u = beta[..., None] * error
    # 4  o = scale q S
    dq = scale * _read(do, _t(S_decayed + _outer(k, u)))
    dS = dS + _outer(q, scale * do)
    # 3  S = S~ + k u
    dk = _read(u, _t(dS))
    du = _read(k, dS)
    # 2  u = beta (v - k S~)
    dbeta = (du * error).sum(-1)
    dv = beta[..., None] * du
    dk = dk - _read(dv, _t(S_decayed))
    dS = dS - _outer(k, dv)
    # 1  S~ = exp(g) S
    dg = (dS * S_decayed).sum((-2, -1))
    dS = np.exp(g)[..., None, None] * dS
    return dq, dk, dv, dg, dbeta, dS


def recurrent_forward(q, k, v, *, g, beta, S0=None, scale=None, head_order="grouped", cu_seqlens=None):
    """o_t and S_end of the gated delta rule, token by token.

    q, k        (B, L, H_k, d_k), L2-normalised by the caller
    v           (B, L, H_v, d_v), H_v a multiple of H_k
    g, beta     (B, L, H_v): LOG decay (<= 0) and write strength
    S0          (N_seq, H_v, d_k, d_v) or None for zeros; N_seq is B, or len(cu_seqlens) - 1
    scale       factor of q; None means d_k ** -0.5
    head_order  "grouped" or "tiled": the key head of each value head (deltanet_ref.notation)
    cu_seqlens  (N_seq + 1,) start of each packed sequence, with B = 1
    returns     o (B, L, H_v, d_v), S_end (N_seq, H_v, d_k, d_v), cache; dtype by NumPy's promotion of the arguments
    raises      InputError for shapes that do not fit
    """
    args = arguments(q, k, v, g=g, beta=beta, S0=S0, scale=scale, head_order=head_order, cu_seqlens=cu_seqlens)
    q, k = args.q[:, args.key_head], args.k[:, args.key_head]              # of the key head of each value head
    o = np.empty_like(args.v)
    states = np.empty((len(args.v), *args.S0.shape[1:]), args.v.dtype)
    S_end = np.empty_like(args.S0)
    for n, (start, stop) in enumerate(zip(args.cu_seqlens, args.cu_seqlens[1:])):
        S = args.S0[n]
        for t in range(start, stop):
            states[t] = S
            o[t], S = token_forward(q[t], k[t], args.v[t], args.g[t], args.beta[t], S, args.scale)
        S_end[n] = S
    return o.reshape(*args.batch, *o.shape[1:]), S_end, RecurrentCache(args, states)


def recurrent_backward(do, dS_end, cache):
    """Gradients of recurrent_forward: the same loop, from the last token to the first.

    do (B, L, H_v, d_v); dS_end (N_seq, H_v, d_k, d_v) or None for zeros
    returns dq, dk (B, L, H_k, d_k), dv (B, L, H_v, d_v), dg, dbeta (B, L, H_v), dS0 (N_seq, H_v, d_k, d_v)
    """
    args = cache.args
    do, dS_end = incoming_gradients(do, dS_end, args)
    q, k = args.q[:, args.key_head], args.k[:, args.key_head]
    dq, dk, dv, dg, dbeta = (np.empty_like(x) for x in (q, k, args.v, args.g, args.beta))
    dS0 = np.empty_like(args.S0)
    for n, (start, stop) in enumerate(zip(args.cu_seqlens, args.cu_seqlens[1:])):
        dS = dS_end[n]
        for t in reversed(range(start, stop)):
            dq[t], dk[t], dv[t], dg[t], dbeta[t], dS = token_backward(
                do[t], dS, q[t], k[t], args.v[t], args.g[t], args.beta[t], cache.S[t], args.scale)
        dS0[n] = dS
    return *gradient_shapes(dq, dk, dv, dg, dbeta, args), dS0


def recurrent_step(q, k, v, *, g, beta, S, scale=None, head_order="grouped"):
    """One token of each sequence, for decoding.

    q, k (B, H_k, d_k); v (B, H_v, d_v); g, beta (B, H_v); S (B, H_v, d_k, d_v)
    returns o (B, H_v, d_v), S (B, H_v, d_k, d_v)
    """
    args = arguments(q[:, None], k[:, None], v[:, None], g=g[:, None], beta=beta[:, None], S0=S,
                     scale=scale, head_order=head_order, cu_seqlens=None)
    q, k = args.q[:, args.key_head], args.k[:, args.key_head]
    return token_forward(q, k, args.v, args.g, args.beta, args.S0, args.scale)


def _read(x, S):
    """x S for a row x: (..., m), (..., m, n) -> (..., n)."""
    return (x[..., None, :] @ S)[..., 0, :]


def _outer(x, y):
    return x[..., :, None] * y[..., None, :]


def _t(S):
    return S.swapaxes(-1, -2)
