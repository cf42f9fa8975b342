"""AdamW and gradient clipping by global norm, on dictionaries of a backend's arrays."""

import math

import numpy as np

from deltanet_ref import ops
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

    def step(self, parameters: dict, gradients: dict, lr: float) -> None:
        """Update every array of parameters in place. Raises InputError if the two dictionaries have different names."""
        if parameters.keys() != gradients.keys():
            odd = sorted(parameters.keys() ^ gradients.keys())
            raise InputError(f"parameters and gradients must have the same names; only one has {', '.join(odd)}")
        self.t += 1
        for name, p in parameters.items():
            if name not in self.m:
                self.m[name], self.v[name] = (self.backend.xp.zeros_like(p) for _ in "mv")
            self.backend.adamw_update(
                p,
                gradients[name],
                self.m[name],
                self.v[name],
                t=self.t,
                lr=lr,
                betas=self.betas,
                eps=self.eps,
                weight_decay=self.weight_decay if self.decays(name, p) else 0.0,
            )


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
