"""What a block is computed with: its tensors, the operators, and its linear maps with the adapters on them."""
from typing import NamedTuple

import numpy as np


class Attached(NamedTuple):
    """An adapter on the model; its updates count scale times."""
    adapter: object           # lora.adapter.Adapter: tensors, scale(target)
    scale: float
    trainable: bool


class Update(NamedTuple):
    """What one adapter adds to one linear map: h b^T."""
    tensor: str               # "ffn_up.weight"
    attached: Attached
    a: np.ndarray             # (r, in)
    b: np.ndarray             # (out, r)
    scale: float              # alpha / r and the adapter's own
    h: np.ndarray             # (B, L, r) scale x a^T


class LinearCache(NamedTuple):
    """Of linear maps that read the same input."""
    x: np.ndarray             # (B, L, in)
    updates: list             # an Update for each adapter on each of the maps


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
        (y,), cache = self.linear_maps_forward((tensor,), x)
        return y, cache

    def linear_backward(self, tensor, dy, cache, grads, need_dx=True):
        """dx (B, L, in), or None when nobody needs it; what grads collects goes there."""
        return self.linear_maps_backward((tensor,), (dy,), cache, grads, need_dx)

    def linear_maps_forward(self, tensors, x):
        """The y of each of several maps of the same x, in one list, and their cache."""
        results = self._weights.linear_forward(self.ops, [self.name(tensor) for tensor in tensors], x)
        updates = self.updates(tensors, x)
        for update in updates:
            self.ops.linear_add(results[tensors.index(update.tensor)], update.h, update.b)             # [lora.2]
        return results, LinearCache(x, updates)

    def linear_maps_backward(self, tensors, gradients, cache, grads, need_dx=True):
        """dx, the sum over the maps, or None when nobody needs it. gradients: dy of each map."""
        ops, dx = self.ops, None
        for tensor, dy in zip(tensors, gradients):
            if grads.base:
                grads.add(self.name(tensor), ops.linear_backward_weight(dy, cache.x))
            if need_dx:
                part = self._weights.linear_backward_input(ops, self.name(tensor), dy)
                dx = part if dx is None else np.add(dx, part, out=dx)
        updates = [u for u in cache.updates if need_dx or u.attached is grads.trained]
        if not updates:
            return dx
        dy_of = dict(zip(tensors, gradients))
        dh = [u.scale * ops.linear_backward_input(dy_of[u.tensor], u.b) for u in updates]             # [lora.4]
        if need_dx:
            dx += ops.linear_backward_input(np.concatenate(dh, -1), np.concatenate([u.a for u in updates]))   # [lora.6]
        trained = [(u, dh_u) for u, dh_u in zip(updates, dh) if u.attached is grads.trained]
        if trained:
            da = ops.linear_backward_weight(np.concatenate([dh_u for _, dh_u in trained], -1), cache.x)       # [lora.5]
            for (u, _), da_u in zip(trained, np.split(da, _ends([u for u, _ in trained])[:-1])):
                grads.add(self.name(u.tensor) + ".lora_a", da_u)
                grads.add(self.name(u.tensor) + ".lora_b", ops.linear_backward_weight(dy_of[u.tensor], u.h))  # [lora.3]
        return dx

    def updates(self, tensors, x):
        """An Update for each adapter on each of the maps of x; h of all of them is one product."""
        found = []
        for tensor in tensors:
            for attached in self._adapters.values():
                factors = factors_of(attached.adapter, self.name(tensor))
                if factors is not None:
                    a, b = (factor.astype(x.dtype, copy=False) for factor in factors)
                    scale = attached.scale * attached.adapter.scale(self.name(tensor))
                    found.append(Update(tensor, attached, a, b, scale, None))
        if not found:
            return []
        h = self.ops.linear_forward(x, np.concatenate([u.a for u in found]))                           # [lora.1]
        return [u._replace(h=u.scale * h_u) for u, h_u in zip(found, np.split(h, _ends(found)[:-1], axis=-1))]


def _ends(updates):
    """Where the ranks of each end, laid one after the other."""
    return np.cumsum([len(u.a) for u in updates])


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
