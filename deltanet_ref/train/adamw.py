"""AdamW and gradient clipping by global norm, on dictionaries of a backend's arrays."""

import math

import numpy as np

from deltanet_ref import ops
from deltanet_ref.backends.packed import PackedArrays
from deltanet_ref.errors import InputError


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019): adamw_update on every array.

    m and v have the dtype and shape of their array and start at zero.

    decays   (name, array) -> whether weight decay applies to it (default: to all)
    backend  where the arrays live, and whose adamw_update runs
    """

    def __init__(self, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decays=lambda name, array: True, backend=ops):
        self.backend = backend
        self.betas, self.eps, self.weight_decay, self.decays = betas, eps, weight_decay, decays
        self.t = 0
        self.m, self.v = {}, {}

    def step(self, parameters: dict, gradients: dict, lr: float, limit: float | None = None) -> float:
        """Update every array of parameters in place, with gradients clipped by their global norm.

        limit    as of clip_by_global_norm, which may scale the gradients in place
        returns  their global 2-norm before clipping; if it is not finite, nothing is updated

        A backend with clipped_adamw_update updates all arrays at once: they become views of one array, and the entries
        of parameters are replaced by these views in the first step.

        Raises InputError if the two dictionaries have different names.
        """
        if parameters.keys() != gradients.keys():
            odd = sorted(parameters.keys() ^ gradients.keys())
            raise InputError(f"parameters and gradients must have the same names; only one has {', '.join(odd)}")
        decay = {name: self.weight_decay if self.decays(name, p) else 0.0 for name, p in parameters.items()}
        self.t += 1
        options = dict(t=self.t, lr=lr, betas=self.betas, eps=self.eps)
        if self.backend.clipped_adamw_update is not None and len(set(decay.values())) == 1:
            norm = self._step_at_once(parameters, gradients, next(iter(decay.values())), limit, options)
        else:
            norm = clip_by_global_norm(gradients, limit, self.backend)
            if math.isfinite(norm):
                self._step_each(parameters, gradients, decay, options)
        if not math.isfinite(norm):
            self.t -= 1
        return norm

    def _step_each(self, parameters, gradients, decay, options):
        for name, p in parameters.items():
            if name not in self.m:
                self.m[name], self.v[name] = (self.backend.xp.zeros_like(p) for _ in "mv")
            self.backend.adamw_update(
                p, gradients[name], self.m[name], self.v[name], weight_decay=decay[name], **options
            )

    def _step_at_once(self, parameters, gradients, decay, limit, options):
        xp = self.backend.xp
        gradients = PackedArrays.of(xp, gradients)
        layout = gradients.layout
        if not isinstance(self.m, PackedArrays):
            self.m, self.v = (PackedArrays.zeros(xp, layout, gradients.whole.dtype) for _ in "mv")
            self._packed = None
        if self._packed is None or any(parameters[name] is not view for name, view in self._packed.items()):
            self._packed = PackedArrays.of(xp, {name: parameters[name] for name, _ in self.m.layout})
            parameters.update(self._packed)
        if layout != self.m.layout:  # the same arrays in another order
            gradients = PackedArrays.of(xp, {name: gradients[name] for name, _ in self.m.layout})
        arrays = (x.whole for x in (self._packed, gradients, self.m, self.v))
        return self.backend.clipped_adamw_update(*arrays, weight_decay=decay, limit=limit, **options)


def clip_by_global_norm(gradients: dict, limit: float | None, backend=ops) -> float:
    """Scale all gradients in place by min(1, limit / (|g| + 1e-6)) and return |g|, their global 2-norm before scaling.

    limit=None only computes the norm. The 1e-6 is that of torch.nn.utils.clip_grad_norm_.
    """
    wide = (backend.xp.asarray(g, np.float64) for g in gradients.values())
    norm = math.sqrt(sum(float(backend.xp.square(g).sum()) for g in wide))
    if limit is not None and norm + 1e-6 > limit:
        for g in gradients.values():
            g *= limit / (norm + 1e-6)
    return norm
