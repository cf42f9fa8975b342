"""A block of Qwen3.5: x + mixer(norm(x)), then x + mlp(norm(x)). The mixer is a delta layer or an attention layer.

What a block leaves for its backward is a choice, one of KEEP. What is not kept is computed again, by the same forward
from the same numbers: the gradients are the same to the bit. Kept of each token, in numbers of the working precision:

    inputs       the block's input D
    products     the block's input D and what its linear maps give, no array twice
                 delta layer       qkv 2 H_k d_k + H_v d_v,  z H_v d_v,  b and a 2 H_v,  mixer D,  gate and up 2 F
                 attention layer   q and its gate 2 H d,  k and v 2 H_kv d,  mixer D,  gate and up 2 F
                 with adapters     h, the rank of each, for all maps but the last
    everything   that, and what norms, convolution, gates and the mixer make of it

With products no product with a weight is computed twice, with everything nothing is (for small models).
"""
from typing import NamedTuple

import numpy as np

from deltanet_ref.model import gated_attention, gated_deltanet
from deltanet_ref.model.layer import Layer, LinearCache

KEEP = ("everything", "products", "inputs")
UP_GATE = ("ffn_up.weight", "ffn_gate.weight")
DOWN = "ffn_down.weight"
MLP_TENSORS = UP_GATE + (DOWN,)


class MlpCache(NamedTuple):
    up_gate: LinearCache
    swiglu: tuple
    down: LinearCache


class BlockCache(NamedTuple):
    """Everything that block_backward reads."""
    norm: tuple
    mixer: tuple
    post_norm: tuple
    mlp: MlpCache


class Kept(NamedTuple):
    """What a BlockCache is computed from again."""
    x: np.ndarray             # (B, L, D) the block's input
    products: dict            # of a Rebuilding layer: names of linear maps -> what they gave


def is_attention(layer):
    return layer.config.layer_types[layer.index] == "full_attention"


def block_forward(x, layer, *, rope, state=None, cu_seqlens=None):
    """x (B, L, D) -> x (B, L, D), the mixer's state, BlockCache."""
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


def block_backward(dx, layer, kept, grads, need_dx=True, **options):
    """The gradient at the block's input, or None unless needed; gradients of its tensors go to grads.

    kept is what block_forward_keeping left, options are those that it had.
    """
    ops = layer.ops
    norm, mixer, post_norm, mlp = kept if isinstance(kept, BlockCache) else rebuild(kept, layer, **options)
    backward, tensors = ((gated_attention.gated_attention_backward, gated_attention.TENSORS) if is_attention(layer)
                         else (gated_deltanet.gated_deltanet_backward, gated_deltanet.TENSORS))
    need_mixer = need_dx or grads.wanted(layer, tensors)
    dh = mlp_backward(dx, layer, mlp, grads, need_dx=need_mixer)                             # 6, 5
    del mlp                                                                                  # a third of the memory
    if not need_mixer:
        return None
    dh, dw = ops.rms_norm_backward(dh, post_norm, need_dw=grads.base)                        # 4
    if grads.base:
        grads.add(layer.name("post_attention_norm.weight"), dw)
    dx = np.add(dx, dh, out=dh)                                                              # 3
    dh = backward(dx, layer, mixer, grads, need_dx)                                          # 2
    if not need_dx:
        return None
    dh, dw = ops.rms_norm_backward(dh, norm, need_dw=grads.base)                             # 1
    if grads.base:
        grads.add(layer.name("attn_norm.weight"), dw)
    return np.add(dx, dh, out=dh)


def mlp_forward(x, layer):
    """down(SiLU(gate(x)) * up(x)). x (B, L, D) -> (B, L, D), cache."""
    (up, gate), up_gate = layer.linear_maps_forward(UP_GATE, x)
    h, swiglu = layer.ops.swiglu_forward(gate, up)
    y, down = layer.linear_forward(DOWN, h)
    return y, MlpCache(up_gate, swiglu, down)


def mlp_backward(dy, layer, cache, grads, need_dx=True):
    if not (need_dx or grads.wanted(layer, MLP_TENSORS)):
        return None
    dh = layer.linear_backward(DOWN, dy, cache.down, grads)
    dgate, dup = layer.ops.swiglu_backward(dh, cache.swiglu)
    return layer.linear_maps_backward(UP_GATE, (dup, dgate), cache.up_gate, grads, need_dx)


# ---- less memory between forward and backward

def block_forward_keeping(keep, x, layer, **options):
    """block_forward for training: x, and what is kept for block_backward. keep: one of KEEP."""
    if keep == "everything":
        x, _, cache = block_forward(x, layer, **options)
        return x, cache
    products = {}
    y, _, _ = block_forward(x, Recording(layer, products) if keep == "products" else layer, **options)
    return y, Kept(x, products)


def rebuild(kept, layer, **options):
    """The BlockCache again, from a Kept, which is spent."""
    return block_forward(kept.x, Rebuilding(layer, kept.products), **options)[2]


class _OtherMaps:
    """A layer, with other linear maps."""

    linear_forward = Layer.linear_forward

    def __init__(self, layer, products):
        self._layer, self._products = layer, products
        self.index, self.config, self.ops = layer.index, layer.config, layer.ops

    def __getitem__(self, tensor):
        return self._layer[tensor]


class Recording(_OtherMaps):
    """A layer that keeps what its linear maps give; not the last one, whose result only the next block reads."""

    def linear_maps_forward(self, tensors, x):
        results, cache = self._layer.linear_maps_forward(tensors, x)
        if tensors != (DOWN,):
            self._products[tensors] = results, cache.updates
        return results, cache


class Rebuilding(_OtherMaps):
    """A layer that gives what Recording kept, and computes what it did not keep; of the last map only the updates."""

    def linear_maps_forward(self, tensors, x):
        if tensors == (DOWN,):
            return [0], LinearCache(x, self._layer.updates(tensors, x))
        if tensors not in self._products:
            return self._layer.linear_maps_forward(tensors, x)
        results, updates = self._products.pop(tensors)                     # the cache's now, to be freed with it
        return results, LinearCache(x, updates)
