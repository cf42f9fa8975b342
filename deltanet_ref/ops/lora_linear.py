"""Low-rank updates of linear maps that read the same input. Derivation: docs/derivations/linear-and-lora.md.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3. The factors a of all updates are
stacked, so that h, da and dx take one matrix product each, whatever the number of maps and adapters.
"""
from types import ModuleType
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.ops import linear as numpy_linear


class Update(NamedTuple):
    """A low-rank update of one of the maps."""
    map: int                  # the map's index in ys
    a: np.ndarray             # (r, in)
    b: np.ndarray             # (out, r)
    scale: float


class LoraCache(NamedTuple):
    """Kept by lora_forward; nothing is recomputed."""
    x: np.ndarray             # (..., in)
    updates: list             # of Update
    h: list                   # (..., r) scale x a^T of each


def lora_forward(ys: list | None, x: np.ndarray, updates: list) -> LoraCache:
    """ys[u.map] += u.scale (x u.a^T) u.b^T for each update u, in place [lora.1..2].

    ys       the results of the maps, (..., out) each; None: only the cache is computed
    x        (..., in), the input that they share
    updates  list of Update
    raises   InputError when the ranks of a and b, or their other sizes, do not fit
    """
    return forward(numpy_linear, ys, x, updates)


def lora_backward(dys: list, cache: LoraCache, need_dx=True, trained=None) -> tuple:
    """Gradients of lora_forward [lora.3..6].

    dys      gradient of each map's result, (..., out)
    need_dx  False: dx is not computed
    trained  for each update whether its factors need gradients; None for all
    returns  dx (..., in), the sum over the updates, or None; and (da (r, in), db (out, r)), or None, for each update
    """
    return backward(numpy_linear, dys, cache, need_dx, trained)


def forward(linear: ModuleType, ys: list | None, x: np.ndarray, updates: list) -> LoraCache:
    """lora_forward with the linear maps of a module like ops.linear."""
    for u in updates:
        if u.a.shape[0] != u.b.shape[1]:
            raise InputError(f"a is {u.a.shape} and b {u.b.shape}: they must be (r, in) and (out, r) with the same "
                             "rank r")
    if not updates:
        return LoraCache(x, [], [])
    h = linear.linear_forward(x, _concatenate([u.a for u in updates], 0))                  # 1  h = scale x a^T
    h = [u.scale * part for u, part in zip(updates, _split(h, updates, -1))]
    if ys is not None:
        for u, h_u in zip(updates, h):
            linear.linear_add(ys[u.map], h_u, u.b)                                         # 2  y += h b^T
    return LoraCache(x, updates, h)


def backward(linear: ModuleType, dys: list, cache: LoraCache, need_dx=True, trained=None) -> tuple:
    """lora_backward with the linear maps of a module like ops.linear."""
    x, updates, h = cache
    trained = [True] * len(updates) if trained is None else trained
    factors = [None] * len(updates)
    used = [i for i in range(len(updates)) if need_dx or trained[i]]
    # 2  y += h b^T
    dh = {i: updates[i].scale * linear.linear_backward_input(dys[updates[i].map], updates[i].b) for i in used}
    db = {i: linear.linear_backward_weight(dys[updates[i].map], h[i]) for i in used if trained[i]}
    # 1  h = scale x a^T
    if db:
        da = linear.linear_backward_weight(_concatenate([dh[i] for i in db], -1), x)
        for i, da_i in zip(db, _split(da, [updates[i] for i in db], 0)):
            factors[i] = da_i, db[i]
    if not (need_dx and used):
        return None, factors
    dx = linear.linear_backward_input(_concatenate([dh[i] for i in used], -1),
                                      _concatenate([updates[i].a for i in used], 0))
    return dx, factors


def _concatenate(arrays, axis):
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)


def _split(x, updates, axis):
    """The part of x along the axis of stacked ranks that belongs to each update."""
    ends = np.cumsum([len(u.a) for u in updates])[:-1]
    return np.split(x, ends, axis)
