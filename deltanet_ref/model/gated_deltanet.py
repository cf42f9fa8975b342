"""The gated delta rule as a layer of Qwen3.5: project, convolve, gate, recur, normalise, project.

V heads stand in the tiled order of the GGUF file throughout.
"""
from typing import NamedTuple

import numpy as np

PROJECTIONS = ("attn_qkv.weight", "attn_gate.weight", "ssm_beta.weight", "ssm_alpha.weight")
TENSORS = PROJECTIONS + ("ssm_out.weight",)


class DeltaNetState(NamedTuple):
    """What a delta layer remembers of the tokens so far."""
    conv: np.ndarray          # (N_seq, K - 1, channels) the last inputs of the convolution
    S: np.ndarray             # (N_seq, H_v, d_k, d_v)


class DeltaNetCache(NamedTuple):
    projections: tuple        # LinearCache of qkv, z, b, a
    conv: tuple
    q_norm: tuple
    k_norm: tuple
    gate: tuple
    delta: tuple
    norm: tuple
    out: tuple


def gated_deltanet_forward(x, layer, *, state=None, cu_seqlens=None):
    """x (B, L, D) -> y (B, L, D), DeltaNetState after the last token, cache (None for a single token with state)."""
    c, ops = layer.config, layer.ops
    B, L, _ = x.shape
    # 1  project: qkv (B, L, 2 H_k d_k + H_v d_v), z (B, L, H_v d_v), b and a (B, L, H_v)
    (qkv, z, b, a), projections = layer.linear_maps_forward(PROJECTIONS, x)
    if L == 1 and state is not None and hasattr(ops, "delta_layer_step"):                     # 2 .. 6 at once
        o, conv, S = ops.delta_layer_step(
            qkv[:, 0], z[:, 0], b[:, 0], a[:, 0], state.conv, state.S, conv=layer["ssm_conv1d.weight"],
            decay=layer["ssm_a"], dt_bias=layer["ssm_dt.bias"], norm=layer["ssm_norm.weight"], eps=c.rms_norm_eps,
            head_order="tiled")
        y, _ = layer.linear_forward("ssm_out.weight", o.reshape(B, L, -1))
        return y, DeltaNetState(conv, S), None
    # 2  causal convolution along the tokens, each channel on its own, then SiLU
    qkv, conv_state, conv = ops.causal_conv1d_forward(
        qkv, layer["ssm_conv1d.weight"], state=state and state.conv, cu_seqlens=cu_seqlens)
    q, k, v = split_heads(qkv, c)
    # 3  unit keys and queries
    q, q_norm = ops.l2_norm_forward(q)
    k, k_norm = ops.l2_norm_forward(k)
    # 4  the gates
    g, beta, gate = ops.decay_gate_forward(a, b, np.log(-layer["ssm_a"]), layer["ssm_dt.bias"])
    # 5  the recurrence
    if L == 1 and state is not None:
        o, S = ops.gated_delta_rule_step(q[:, 0], k[:, 0], v[:, 0], g=g[:, 0], beta=beta[:, 0], S=state.S,
                                         head_order="tiled")
        o, delta = o[:, None], None
    else:
        o, S, delta = ops.gated_delta_rule_forward(q, k, v, g=g, beta=beta, S0=state and state.S,
                                                   head_order="tiled", cu_seqlens=cu_seqlens)
    # 6  normalise each head, gated by SiLU(z)
    o, norm = ops.gated_rms_norm_forward(o, z.reshape(o.shape), layer["ssm_norm.weight"], c.rms_norm_eps)
    # 7  project back
    y, out = layer.linear_forward("ssm_out.weight", o.reshape(B, L, -1))
    cache = delta and DeltaNetCache(projections, conv, q_norm, k_norm, gate, delta, norm, out)
    return y, DeltaNetState(conv_state, S), cache


def gated_deltanet_backward(dy, layer, cache, grads, need_dx=True):
    """dx (B, L, D), or None unless needed; gradients of the layer's tensors go to grads."""
    ops = layer.ops
    B, L, _ = dy.shape
    # 7  project back
    do = layer.linear_backward("ssm_out.weight", dy, cache.out, grads)
    # 6  normalise each head, gated by SiLU(z)
    heads = (B, L, layer.config.linear_num_value_heads, layer.config.linear_value_head_dim)
    do, dz, dw = ops.gated_rms_norm_backward(do.reshape(heads), cache.norm, need_dw=grads.base)
    # 5  the recurrence
    dq, dk, dv, dg, dbeta, _ = ops.gated_delta_rule_backward(do, None, cache.delta)
    # 4  the gates
    da, db, dA_log, ddt_bias = ops.decay_gate_backward(dg, dbeta, cache.gate, need_dw=grads.base)
    # 3  unit keys and queries
    dk = ops.l2_norm_backward(dk, cache.k_norm)
    dq = ops.l2_norm_backward(dq, cache.q_norm)
    # 2  causal convolution, SiLU
    dqkv = np.concatenate([d.reshape(B, L, -1) for d in (dq, dk, dv)], -1)
    dqkv, dconv, _ = ops.causal_conv1d_backward(dqkv, None, cache.conv, need_dw=grads.base)
    if grads.base:
        grads.add(layer.name("ssm_norm.weight"), dw)
        grads.add(layer.name("ssm_a"), dA_log / layer["ssm_a"])            # ssm_a = -exp(A_log)
        grads.add(layer.name("ssm_dt.bias"), ddt_bias)
        grads.add(layer.name("ssm_conv1d.weight"), dconv)
    # 1  project
    return layer.linear_maps_backward(PROJECTIONS, (dqkv, dz.reshape(B, L, -1), db, da), cache.projections, grads,
                                      need_dx)


def split_heads(qkv, c):
    """(B, L, 2 H_k d_k + H_v d_v) -> q, k (B, L, H_k, d_k), v (B, L, H_v, d_v)."""
    size = c.linear_num_key_heads * c.linear_key_head_dim
    q, k, v = np.split(qkv, [size, 2 * size], axis=-1)

    def heads(x, n):
        return x.reshape(*x.shape[:2], n, -1)

    return heads(q, c.linear_num_key_heads), heads(k, c.linear_num_key_heads), heads(v, c.linear_num_value_heads)
