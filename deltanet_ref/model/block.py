"""A block: x + mixer(norm(x)), then x + feed_forward(norm(x)); model/layers describes the mixers and feed-forwards.

What a block leaves for its backward is a choice, one of KEEP. What is not kept is computed again, by the same forward
from the same numbers: the gradients are the same to the bit. Kept of each token, in numbers of the working precision:

    inputs       the block's input D
    products     the block's input D and the products of its linear maps, no array twice
                 delta layer       qkv 2 H_k d_k + H_v d_v,  z H_v d_v,  b and a 2 H_v,  mixer D,  gate and up 2 F
                 attention layer   q and its gate 2 H d,  k and v 2 H_kv d,  mixer D,  gate and up 2 F
                 with adapters     h, the rank of each
    everything   that, and the results of norms, convolution, gates and the mixer

With products no product with a weight is computed twice, with everything nothing is (for small models).
"""
from typing import NamedTuple

import numpy as np

from deltanet_ref.model.layer import Layer
from deltanet_ref.model.layers.kind import Stage, TensorRow

KEEP = ("everything", "products", "inputs")
ATTN_NORM, FFN_NORM = "attn_norm.weight", "post_attention_norm.weight"

# the norms' tensors and stages; those of the mixer and the feed-forward stand between (model/layers)
MIXER_NORM = TensorRow(ATTN_NORM, "input_layernorm.weight", ("D",), value="one_plus")
FEED_FORWARD_NORM = TensorRow(FFN_NORM, "post_attention_layernorm.weight", ("D",), value="one_plus")
BEFORE_MIXER = (Stage("attn_norm", ("L", "D"), "RMS norm of the block's input", (ATTN_NORM,)),)
BEFORE_FEED_FORWARD = (Stage("mid", ("L", "D"), "the block's input plus mixer_out"),
                       Stage("ffn_norm", ("L", "D"), "RMS norm of mid", (FFN_NORM,)))
AFTER_FEED_FORWARD = (Stage("out", ("L", "D"), "mid plus ffn_out: the block's output"),)


def block_tensors(mixer, feed_forward):
    """TensorRows of a block of these kinds, in network order."""
    return (MIXER_NORM, *mixer.tensors, FEED_FORWARD_NORM, *feed_forward.tensors)


def block_stages(mixer, feed_forward):
    """Stages of a block of these kinds, in network order."""
    return (*BEFORE_MIXER, *mixer.stages, *BEFORE_FEED_FORWARD, *feed_forward.stages, *AFTER_FEED_FORWARD)


class BlockCache(NamedTuple):
    """Everything that block_backward reads."""
    norm: tuple
    mixer: tuple
    post_norm: tuple
    feed_forward: tuple


class Kept(NamedTuple):
    """What a BlockCache is computed from again."""
    x: np.ndarray             # (B, L, D) the block's input
    products: dict            # of a Rebuilding layer: names of linear maps -> their results and LoraCache


def block_forward(x, layer, *, shared, state=None, cu_seqlens=None):
    """x (B, L, D) -> x (B, L, D), the mixer's state, BlockCache.

    shared: for each block what its mixer's Kind.shared gave for these positions; state, cu_seqlens: the mixer's.
    """
    ops, eps = layer.ops, layer.config.rms_norm_eps
    h, norm = ops.rms_norm_forward(x, layer[ATTN_NORM], eps)                                 # 1
    layer.see(attn_norm=h)
    h, state, mixer = layer.mixer.forward(h, layer, shared=shared[layer.index], state=state, cu_seqlens=cu_seqlens)  # 2
    x = x + h                                                                                # 3
    h, post_norm = ops.rms_norm_forward(x, layer[FFN_NORM], eps)                             # 4
    layer.see(mid=x, ffn_norm=h)
    h, feed_forward = layer.feed_forward.forward(h, layer)                                   # 5
    x = x + h                                                                                # 6
    layer.see(out=x)
    return x, state, BlockCache(norm, mixer, post_norm, feed_forward)


def block_backward(dx, layer, kept, grads, need_dx=True, **options):
    """The gradient at the block's input, or None unless needed; gradients of its tensors go to grads.

    kept is what block_forward_keeping left, options are those that it had.
    """
    ops, mixer_kind, feed_forward_kind = layer.ops, layer.mixer, layer.feed_forward
    norm, mixer, post_norm, feed_forward = kept if isinstance(kept, BlockCache) else rebuild(kept, layer, **options)
    need_mixer = need_dx or grads.wanted(layer, mixer_kind.linear_maps)
    layer.see_gradients(out=dx)
    if not (need_mixer or grads.wanted(layer, feed_forward_kind.linear_maps)):
        return None
    dh = feed_forward_kind.backward(dx, layer, feed_forward, grads, need_mixer)              # 6, 5
    del feed_forward                                                                         # a third of the memory
    if not need_mixer:
        return None
    layer.see_gradients(ffn_norm=dh)
    dh, dw = ops.rms_norm_backward(dh, post_norm, need_dw=grads.base)                        # 4
    if grads.base:
        grads.add(layer.name(FFN_NORM), dw)
    dh += dx                                                                                 # 3
    dx = dh
    layer.see_gradients(mid=dx)
    dh = mixer_kind.backward(dx, layer, mixer, grads, need_dx)                               # 2
    if not need_dx:
        return None
    layer.see_gradients(attn_norm=dh)
    dh, dw = ops.rms_norm_backward(dh, norm, need_dw=grads.base)                             # 1
    if grads.base:
        grads.add(layer.name(ATTN_NORM), dw)
    dh += dx
    return dh


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
    """The BlockCache again, from a Kept, which is consumed."""
    return block_forward(kept.x, Rebuilding(layer, kept.products), **options)[2]


class _OtherMaps:
    """A layer, with other linear maps."""

    linear_forward = Layer.linear_forward

    def __init__(self, layer, products):
        self._layer, self._products = layer, products
        self.index, self.config, self.ops = layer.index, layer.config, layer.ops
        self.mixer, self.feed_forward = layer.mixer, layer.feed_forward
        self.last = (layer.feed_forward.output,)   # the map whose product is only read by the next block

    def __getitem__(self, tensor):
        return self._layer[tensor]


class Recording(_OtherMaps):
    """A layer that keeps the products of its linear maps, except the last one's, and what adapters computed."""

    def linear_maps_forward(self, tensors, x):
        results, cache = self._layer.linear_maps_forward(tensors, x)
        self._products[tensors] = (None if tensors == self.last else results), cache._replace(
            x=None, lora=cache.lora._replace(x=None))
        return results, cache

    def see(self, **stages):
        self._layer.see(**stages)


class Rebuilding(_OtherMaps):
    """A layer that returns what Recording kept and computes what it did not; of the last map no product."""

    def linear_maps_forward(self, tensors, x):
        if tensors in self._products:
            results, cache = self._products.pop(tensors)                   # the cache's now, to be freed with it
            return results or [0], cache._replace(x=x, lora=cache.lora._replace(x=x))
        if tensors == self.last:
            return [0], self._layer.update(tensors, x, None)
        return self._layer.linear_maps_forward(tensors, x)

    def see(self, **stages):
        """The observer has seen them in the forward."""
