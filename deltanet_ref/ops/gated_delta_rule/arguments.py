"""Arguments of the gated delta rule, checked and normalised once for all of its forms."""
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.notation import value_to_key_head
from deltanet_ref.ops.sequences import sequence_boundaries


class Arguments(NamedTuple):
    """The operator's arguments in one form: all tokens flat, one state for each sequence.

    A dense batch (B, L) is the packed case with B sequences of L tokens.
    """
    q: np.ndarray             # (B L, H_k, d_k)
    k: np.ndarray             # (B L, H_k, d_k)
    v: np.ndarray             # (B L, H_v, d_v)
    g: np.ndarray             # (B L, H_v) log decay
    beta: np.ndarray          # (B L, H_v)
    S0: np.ndarray            # (N_seq, H_v, d_k, d_v); zeros when none was given
    scale: float
    cu_seqlens: np.ndarray    # (N_seq + 1,) where each sequence starts; the last entry is B L
    key_head: np.ndarray      # (H_v,) the key head of each value head
    batch: tuple              # (B, L), to restore the shape of o and the gradients


def arguments(q, k, v, *, g, beta, S0, scale, head_order, cu_seqlens):
    """Check the shapes and bring the arguments to one form; raises InputError with the remedy."""
    q, k, v, g, beta = map(np.asarray, (q, k, v, g, beta))
    S0_shape = None if S0 is None else np.shape(S0)
    boundaries, key_head, state_shape = checked(q, k, v, g=g, beta=beta, S0_shape=S0_shape, head_order=head_order,
                                                cu_seqlens=cu_seqlens)
    B, L = k.shape[:2]
    d_k = k.shape[3]
    dtype = np.result_type(q, k, v, g, beta, np.float32, *(() if S0 is None else (S0,)))
    if S0 is None:
        S0 = np.zeros(state_shape, dtype)

    def flat(x):
        return x.reshape(B * L, *x.shape[2:]).astype(dtype, copy=False)

    return Arguments(*map(flat, (q, k, v, g, beta)), np.asarray(S0, dtype),
                     d_k ** -0.5 if scale is None else scale, boundaries, key_head, (B, L))


def checked(q, k, v, *, g, beta, S0_shape, head_order, cu_seqlens):
    """Sequence boundaries (N_seq + 1,), key heads (H_v,) and the shape of the state; raises InputError with the remedy.

    Only the shapes of the arrays are read: they may be on a device.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise InputError(f"{name} has shape {x.shape}; it must be (B, L, heads, head size)")
    B, L, H_k, d_k = k.shape
    H_v, d_v = v.shape[2:]
    if q.shape != k.shape:
        raise InputError(f"q has shape {q.shape} and k {k.shape}; both must be (B, L, H_k, d_k)")
    if v.shape[:2] != (B, L):
        raise InputError(f"v has shape {v.shape}; with k {k.shape} its first two axes must be ({B}, {L})")
    for name, x in (("g", g), ("beta", beta)):
        if x.shape != (B, L, H_v):
            hint = "; did you pass one per key head?" if x.shape == (B, L, H_k) else ""
            raise InputError(f"{name} has shape {x.shape}; it must be ({B}, {L}, {H_v}), one per value head{hint}")
    key_head = value_to_key_head(H_k, H_v, head_order)
    boundaries = sequence_boundaries(B, L, cu_seqlens)
    state_shape = (len(boundaries) - 1, H_v, d_k, d_v)
    if S0_shape is not None and S0_shape != state_shape:
        raise InputError(f"S0 has shape {S0_shape}; it must be (N_seq, H_v, d_k, d_v) = {state_shape}")
    return boundaries, key_head, state_shape


def gradient_shapes(dq, dk, dv, dg, dbeta, args):
    """Back to (B, L, ...); dq and dk are summed over the value heads that share a key head."""
    shared = args.key_head == np.arange(args.key_head.max() + 1)[:, None]                     # (H_k, H_v)

    def per_key_head(x):
        return np.stack([x[:, heads].sum(1) for heads in shared], 1)

    return tuple(x.reshape(*args.batch, *x.shape[1:]) for x in (per_key_head(dq), per_key_head(dk), dv, dg, dbeta))


def incoming_gradients(do, dS_end, args):
    """do as flat tokens, dS_end as (N_seq, H_v, d_k, d_v), zeros when None; raises InputError on a wrong shape."""
    o_shape = (*args.batch, *args.v.shape[1:])
    if np.shape(do) != o_shape:
        raise InputError(f"do has shape {np.shape(do)}; it must be that of o, {o_shape}")
    if dS_end is None:
        dS_end = np.zeros_like(args.S0)
    elif np.shape(dS_end) != args.S0.shape:
        raise InputError(f"dS_end has shape {np.shape(dS_end)}; it must be that of S_end, {args.S0.shape}")
    dtype = args.v.dtype
    return np.asarray(do, dtype).reshape(args.v.shape), np.asarray(dS_end, dtype)
