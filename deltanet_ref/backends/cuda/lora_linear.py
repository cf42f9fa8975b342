"""Low-rank updates by products that accumulate into the results. Mathematics: ops/lora_linear.py.

A product by cuBLAS has a factor alpha: the scale of an update needs no pass of its own. h = x a^T is kept without it.
"""

from typing import NamedTuple

import numpy as np

from deltanet_ref.backends.cuda.linear import rows
from deltanet_ref.errors import InputError


class LoraCache(NamedTuple):
    """Kept by lora_forward; nothing is recomputed."""

    x: object  # (..., in)
    updates: list  # of ops.lora_linear.Update
    h: object  # (rows, sum of r) x a^T, the updates side by side; None without updates


def lora_forward(device, ys, x, updates):
    """ys[u.map] += u.scale (x u.a^T) u.b^T for each update u, in place: as ops.lora_forward."""
    for u in updates:
        if u.a.shape[0] != u.b.shape[1]:
            raise InputError(
                f"a is {u.a.shape} and b {u.b.shape}: they must be (r, in) and (out, r) with the same rank r"
            )
    if not updates:
        return LoraCache(x, [], None)
    h = device.matmul(rows(x), _stacked(device, updates), transpose_b=True)  # 1  h = x a^T
    if ys is not None:
        for u, part in zip(updates, _parts(updates), strict=True):  # 2  y += scale h b^T
            device.matmul(h[:, part], u.b, transpose_b=True, out=rows(ys[u.map]), accumulate=True, alpha=u.scale)
    return LoraCache(x, updates, h)


def lora_backward(device, dys, cache, need_dx=True, trained=None):
    """Gradients of lora_forward: as ops.lora_backward. dx has the dtype of x; da and db are float32."""
    x, updates, h = cache
    trained = [True] * len(updates) if trained is None else trained
    factors = [None] * len(updates)
    if not (updates and (need_dx or any(trained))):
        return None, factors
    dh = device.empty(h.shape, h.dtype)
    parts = _parts(updates)
    for i, (u, part) in enumerate(zip(updates, parts, strict=True)):
        dy = rows(dys[u.map])
        # 2  y += scale h b^T
        if need_dx or trained[i]:
            device.matmul(dy, u.b, out=dh[:, part], alpha=u.scale)
        # 1  h = x a^T
        if trained[i]:
            db = device.matmul(dy, h[:, part], transpose_a=True, out_dtype=np.float32, alpha=u.scale)
            da = device.matmul(dh[:, part], rows(x), transpose_a=True, out_dtype=np.float32)
            factors[i] = da, db
    if not need_dx:
        return None, factors
    return device.matmul(dh, _stacked(device, updates)).reshape(x.shape), factors


def _stacked(device, updates):
    """The factors a of all updates, (sum of r, in)."""
    return updates[0].a if len(updates) == 1 else device.xp.concatenate([u.a for u in updates])


def _parts(updates):
    """The rows of _stacked that belong to each update."""
    ends = np.cumsum([len(u.a) for u in updates]).tolist()
    return [slice(end - len(u.a), end) for u, end in zip(updates, ends, strict=True)]
