"""What a block is computed with: its tensors, the operators, and its linear maps with the adapters on them."""
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from deltanet_ref.model.layers import FEED_FORWARDS, MIXERS
from deltanet_ref.ops.lora_linear import LoraCache, Update


class Attached(NamedTuple):
    """An attached adapter and the factor its update is multiplied by."""
    adapter: object           # lora.adapter.Adapter: tensors, scale(target)
    scale: float
    trainable: bool


class LinearCache(NamedTuple):
    """Kept by linear maps that read the same input."""
    x: np.ndarray             # (B, L, in)
    applied: list             # (tensor, Attached) of each of lora.updates
    lora: LoraCache


class Layer:
    """Block number `index` of a model: layer["ssm_norm.weight"] is its tensor, in the model's dtype."""

    def __init__(self, index: int, config, weights, adapters: dict, observe: Callable | None = None):
        """observe: called as observe(name, array) with every stage of a trace, "blk.0.q" and "d.blk.0.q"; None: not."""
        self.index, self.config, self.ops = index, config, weights.backend
        self.mixer = MIXERS[config.layer_types[index]]
        self.feed_forward = FEED_FORWARDS[config.feed_forward_types[index]]
        self._weights, self._adapters, self._observe = weights, adapters, observe

    def name(self, tensor: str) -> str:
        """The tensor's name in the model."""
        return f"blk.{self.index}.{tensor}"

    def __getitem__(self, tensor):
        return self._weights[self.name(tensor)]

    # ---- stages of a trace

    def see(self, **stages):
        """Pass stages of the forward to the observer, if there is one."""
        self._pass_on("", stages)

    def see_gradients(self, **stages):
        """Pass gradients at these stages to the observer, if there is one."""
        self._pass_on("d.", stages)

    def _pass_on(self, prefix, stages):
        if self._observe is not None:
            for stage, array in stages.items():
                self._observe(f"{prefix}{self.name(stage)}", array)

    # ---- linear maps

    def linear_forward(self, tensor, x):
        """y = x W^T + sum over adapters of scale (x A^T) B^T. x (B, L, in) -> y (B, L, out), cache."""
        (y,), cache = self.linear_maps_forward((tensor,), x)
        return y, cache

    def linear_backward(self, tensor, dy, cache, grads, need_dx=True):
        """dx (B, L, in), or None unless needed; gradients of W, A and B go to grads."""
        return self.linear_maps_backward((tensor,), (dy,), cache, grads, need_dx)

    def linear_maps_forward(self, tensors, x):
        """A list with the y of each of several maps of the same x, and their cache."""
        results = self._weights.linear_forward([self.name(tensor) for tensor in tensors], x)
        return results, self.update(tensors, x, results)

    def update(self, tensors, x, results):
        """Add the adapters' updates to the results of maps of x, in place; None: only their cache is computed."""
        applied, updates = [], []
        for i, tensor in enumerate(tensors):
            for attached in self._adapters.values():
                factors = factors_of(attached.adapter, self.name(tensor))
                if factors is not None:
                    a, b = (self.ops.xp.asarray(factor, x.dtype) for factor in factors)
                    applied.append((tensor, attached))
                    updates.append(Update(i, a, b, attached.scale * attached.adapter.scale(self.name(tensor))))
        return LinearCache(x, applied, self.ops.lora_forward(results, x, updates))

    def linear_maps_backward(self, tensors, gradients, cache, grads, need_dx=True):
        """dx, the sum over the maps, or None unless needed. gradients: dy of each map."""
        ops, dx = self.ops, None
        for tensor, dy in zip(tensors, gradients, strict=True):
            if grads.base:
                grads.add(self.name(tensor), ops.linear_backward_weight(dy, cache.x))
            if need_dx:
                part = self._weights.linear_backward_input(self.name(tensor), dy)
                if dx is None:
                    dx = part
                else:
                    dx += part
        trained = [attached is grads.trained for _, attached in cache.applied]
        dx_update, factors = ops.lora_backward(gradients, cache.lora, need_dx, trained)
        if dx_update is not None:
            dx += dx_update
        for (tensor, _), pair in zip(cache.applied, factors, strict=True):
            if pair is not None:
                for factor, gradient in zip(("lora_a", "lora_b"), pair, strict=True):
                    grads.add(f"{self.name(tensor)}.{factor}", gradient)
        return dx


class Gradients(dict):
    """Tensor name -> gradient, and which ones are asked for: all of the base, or the factors of one adapter."""

    def __init__(self, base: bool, trained: Attached | None = None):
        super().__init__()
        self.base, self.trained = base, trained

    def add(self, name, gradient):
        """Add to the gradient of this name."""
        self[name] = self[name] + gradient if name in self else gradient

    def wanted(self, layer, tensors):
        """Whether any of these linear maps of the layer, or anything of the base, needs a gradient."""
        return self.base or any(factors_of(self.trained.adapter, layer.name(t)) is not None for t in tensors)


def factors_of(adapter, name):
    """A (r, in) and B (out, r) of an adapter for a tensor, or None when it does not adapt that tensor."""
    a = adapter.tensors.get(f"{name}.lora_a")
    return None if a is None else (a, adapter.tensors[f"{name}.lora_b"])
