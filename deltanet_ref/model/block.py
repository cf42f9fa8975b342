"""A block of Qwen3.5: x + mixer(norm(x)), then x + mlp(norm(x)). The mixer is a delta layer or an attention layer."""
from typing import NamedTuple

from deltanet_ref.model import gated_attention, gated_deltanet

MLP_TENSORS = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")


class MlpCache(NamedTuple):
    gate: tuple
    up: tuple
    swiglu: tuple
    down: tuple


class BlockCache(NamedTuple):
    norm: tuple
    mixer: tuple
    post_norm: tuple
    mlp: MlpCache


def is_attention(layer):
    return layer.config.layer_types[layer.index] == "full_attention"


def block_forward(x, layer, *, rope, state=None, cu_seqlens=None):
    """x (B, L, D) -> x (B, L, D), the mixer's state, cache."""
    ops, eps = layer.ops, layer.config.rms_norm_eps
    h, norm = ops.rms_norm_forward(x, layer["attn_norm.weight"], eps)                        # 1
    if is_attention(layer):                                                                  # 2
        h, state, mixer = gated_attention.gated_attention_forward(h, layer, rope=rope, state=state,
                                                                  cu_seqlens=cu_seqlens)
    else:
        h, state, mixer = gated_deltanet.gated_deltanet_forward(h, layer, state=state, cu_seqlens=cu_seqlens)
    x = x + h                                                                                # 3
    h, post_norm = ops.rms_norm_forward(x, layer["post_attention_norm.weight"], eps)         # 4
    h, mlp = mlp_forward(h, layer)                                                           # 5
    x = x + h                                                                                # 6
    return x, state, BlockCache(norm, mixer, post_norm, mlp)


def block_backward(dx, layer, cache, grads, need_dx=True):
    """The gradient at the block's input, or None unless needed; gradients of its tensors go to grads."""
    ops = layer.ops
    backward, tensors = ((gated_attention.gated_attention_backward, gated_attention.TENSORS) if is_attention(layer)
                         else (gated_deltanet.gated_deltanet_backward, gated_deltanet.TENSORS))
    need_mixer = need_dx or grads.wanted(layer, tensors)
    dh = mlp_backward(dx, layer, cache.mlp, grads, need_dx=need_mixer)                       # 6, 5
    if not need_mixer:
        return None
    dh, dw = ops.rms_norm_backward(dh, cache.post_norm, need_dw=grads.base)                  # 4
    if grads.base:
        grads.add(layer.name("post_attention_norm.weight"), dw)
    dx = dx + dh                                                                             # 3
    dh = backward(dx, layer, cache.mixer, grads, need_dx)                                    # 2
    if not need_dx:
        return None
    dh, dw = ops.rms_norm_backward(dh, cache.norm, need_dw=grads.base)                       # 1
    if grads.base:
        grads.add(layer.name("attn_norm.weight"), dw)
    return dx + dh


def mlp_forward(x, layer):
    """down(SiLU(gate(x)) * up(x)). x (B, L, D) -> (B, L, D), cache."""
    gate, gate_cache = layer.linear_forward("ffn_gate.weight", x)
    up, up_cache = layer.linear_forward("ffn_up.weight", x)
    h, swiglu = layer.ops.swiglu_forward(gate, up)
    y, down = layer.linear_forward("ffn_down.weight", h)
    return y, MlpCache(gate_cache, up_cache, swiglu, down)


def mlp_backward(dy, layer, cache, grads, need_dx=True):
    if not (need_dx or grads.wanted(layer, MLP_TENSORS)):
        return None
    dh = layer.linear_backward("ffn_down.weight", dy, cache.down, grads)
    dgate, dup = layer.ops.swiglu_backward(dh, cache.swiglu)
    dx_up = layer.linear_backward("ffn_up.weight", dup, cache.up, grads, need_dx)
    dx_gate = layer.linear_backward("ffn_gate.weight", dgate, cache.gate, grads, need_dx)
    return dx_up + dx_gate if need_dx else None
