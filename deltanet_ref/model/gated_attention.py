"""Gated softmax attention as a layer of Qwen3.5: q, k normed per head, partial rotary, grouped queries, a sigmoid gate."""
from threading import Lock
from typing import NamedTuple

import numpy as np

PROJECTIONS = ("attn_q.weight", "attn_k.weight", "attn_v.weight")
TENSORS = PROJECTIONS + ("attn_output.weight",)


class KeysValues(NamedTuple):
    """The KV cache: keys (after norm and rotary) and values of the P tokens so far."""
    k: np.ndarray             # (B, P, H_kv, d)
    v: np.ndarray             # (B, P, H_kv, d)


class AttentionState(KeysValues):
    """KeysValues that are continued without copying them, where they are the last ones in a Room."""
    room = None

    def append(self, k, v):
        """AttentionState with k and v (B, L, H_kv, d) behind these."""
        P, M = self.k.shape[1], self.k.shape[1] + k.shape[1]
        room = self.room if self.room and self.room.take(P, M) else Room(self, M)
        room.k[:, P:M], room.v[:, P:M] = k, v
        longer = AttentionState(room.k[:, :M], room.v[:, :M])
        longer.room = room
        return longer


class Room:
    """Keys and values in arrays that are longer than they are; a state that is continued twice gets a second Room."""

    def __init__(self, state, taken):
        B, P, H_kv, d = state.k.shape
        self.k, self.v = np.empty((2, B, taken + taken // 4 + 64, H_kv, d), state.k.dtype)
        self.k[:, :P], self.v[:, :P] = state
        self.taken, self.lock = taken, Lock()

    def take(self, P, M):
        """Whether places P .. M - 1 are there and free; they are taken then."""
        with self.lock:
            if P != self.taken or M > self.k.shape[1]:
                return False
            self.taken = M
            return True


class AttentionCache(NamedTuple):
    projections: tuple        # LinearCache of q with its gate, k, v
    q_norm: tuple
    k_norm: tuple
    rope: tuple               # cos, sin (L, rotary / 2)
    attention: tuple
    gate: tuple
    out: tuple


def gated_attention_forward(x, layer, *, rope, state=None, cu_seqlens=None):
    """x (B, L, D) -> y (B, L, D), AttentionState with these tokens appended, cache. rope: cos, sin of the positions."""
    c, ops = layer.config, layer.ops
    B, L, _ = x.shape
    # 1  project; attn_q holds, head by head, d query rows and d gate rows
    (q_gate, k, v), projections = layer.linear_maps_forward(PROJECTIONS, x)
    q, gate = np.split(q_gate.reshape(B, L, c.num_attention_heads, 2 * c.head_dim), 2, axis=-1)
    k = k.reshape(B, L, c.num_key_value_heads, c.head_dim)
    v = v.reshape(k.shape)
    # 2  norm per head
    q, q_norm = ops.rms_norm_forward(q, layer["attn_q_norm.weight"], c.rms_norm_eps)
    k, k_norm = ops.rms_norm_forward(k, layer["attn_k_norm.weight"], c.rms_norm_eps)
    # 3  rotary on the first quarter of each head
    q, k = ops.rope_forward(q, *rope), ops.rope_forward(k, *rope)
    # 4  attention over the past and these tokens
    state = AttentionState(k, v) if state is None else state.append(k, v)
    o, attention = ops.softmax_attention_forward(q, state.k, state.v, cu_seqlens=cu_seqlens)
    # 5  gate
    o, gate = ops.sigmoid_gate_forward(o, gate)
    # 6  project back
    y, out = layer.linear_forward("attn_output.weight", o.reshape(B, L, -1))
    cache = AttentionCache(projections, q_norm, k_norm, rope, attention, gate, out)
    return y, state, cache


def gated_attention_backward(dy, layer, cache, grads, need_dx=True):
    """dx (B, L, D), or None unless needed; gradients of the layer's tensors go to grads."""
    c, ops = layer.config, layer.ops
    B, L, _ = dy.shape
    # 6  project back
    do = layer.linear_backward("attn_output.weight", dy, cache.out, grads)
    # 5  gate
    do, dgate = ops.sigmoid_gate_backward(do.reshape(B, L, c.num_attention_heads, c.head_dim), cache.gate)
    # 4  attention
    dq, dk, dv = ops.softmax_attention_backward(do, cache.attention)
    # 3  rotary
    dq, dk = ops.rope_backward(dq, *cache.rope), ops.rope_backward(dk, *cache.rope)
    # 2  norm per head
    dk, dw_k = ops.rms_norm_backward(dk, cache.k_norm, need_dw=grads.base)
    dq, dw_q = ops.rms_norm_backward(dq, cache.q_norm, need_dw=grads.base)
    if grads.base:
        grads.add(layer.name("attn_q_norm.weight"), dw_q)
        grads.add(layer.name("attn_k_norm.weight"), dw_k)
    # 1  project
    projected = [d.reshape(B, L, -1) for d in (np.concatenate([dq, dgate], -1), dk, dv)]
    return layer.linear_maps_backward(PROJECTIONS, projected, cache.projections, grads, need_dx)
