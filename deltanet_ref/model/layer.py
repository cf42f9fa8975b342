"""What a block is computed with: its tensors, the operators, and its linear maps with the adapters on them."""
from typing import NamedTuple

import numpy as np


class Attached(NamedTuple):
    """An adapter on the model; its updates count scale times."""
    adapter: object           # lora.adapter.Adapter: tensors, scale(target)
    scale: float
    trainable: bool


class LinearCache(NamedTuple):
    x: np.ndarray             # (B, L, in), shared by the maps that read the same input
    updates: list             # (Attached, cache of ops.lora_forward) for each adapter on this tensor


class Layer:
    """Block number `index` of a model: layer["ssm_norm.weight"] is its tensor, in the model's dtype."""

    def __init__(self, index, config, weights, ops, adapters):
        self.index, self.config, self.ops = index, config, ops
        self._weights, self._adapters = weights, adapters

    def name(self, tensor):
        return f"blk.{self.index}.{tensor}"

    def __getitem__(self, tensor):
        return self._weights[self.name(tensor)]

    def linear_forward(self, tensor, x):
        """y = x W^T + sum over adapters of scale (x A^T) B^T. x (B, L, in) -> y (B, L, out), cache."""
        y = self.ops.linear_forward(x, self[tensor])
        updates = []
        for attached in self._adapters.values():
            factors = factors_of(attached.adapter, self.name(tensor))
            if factors is not None:
                a, b = (factor.astype(x.dtype, copy=False) for factor in factors)
                update, cache = self.ops.lora_forward(
                    x, a, b, attached.scale * attached.adapter.scale(self.name(tensor)))
                y += update
                updates.append((attached, cache))
        return y, LinearCache(x, updates)

    def linear_backward(self, tensor, dy, cache, grads, need_dx=True):
        """dx (B, L, in), or None when nobody needs it; what grads collects goes there."""
        if grads.base:
            grads.add(self.name(tensor), self.ops.linear_backward_weight(dy, cache.x))
        dx = self.ops.linear_backward_input(dy, self[tensor]) if need_dx else None
        for attached, update in cache.updates:
            if need_dx or attached is grads.trained:
                dx_update, da, db = self.ops.lora_backward(dy, update)
                if need_dx:
                    dx += dx_update
                if attached is grads.trained:
                    grads.add(self.name(tensor) + ".lora_a", da)
                    grads.add(self.name(tensor) + ".lora_b", db)
        return dx


class Gradients(dict):
    """Tensor name -> gradient, and which ones are asked for: all of the base, or the factors of one adapter."""

    def __init__(self, base, trained=None):
        super().__init__()
        self.base, self.trained = base, trained

    def add(self, name, gradient):
        self[name] = self[name] + gradient if name in self else gradient

    def wanted(self, layer, tensors):
        """Whether any of these tensors of the layer has a gradient to be collected."""
        return self.base or any(factors_of(self.trained.adapter, layer.name(t)) is not None for t in tensors)


def factors_of(adapter, name):
    """A (r, in) and B (out, r) of an adapter for a tensor, or None when it leaves that tensor alone."""
    a = adapter.tensors.get(f"{name}.lora_a")
    return None if a is None else (a, adapter.tensors[f"{name}.lora_b"])
