"""AdamW in float32, one pass, with or without clipping. Kernels: kernels/adamw.cu."""

import numpy as np

from deltanet_ref.backends.cuda.layout import THREADS, blocks, vector, wide
from deltanet_ref.errors import InputError

NORM_BLOCKS = 256  # of adamw.cu


def adamw_update(device, p, g, m, v, *, t, lr, betas, eps, weight_decay):
    """p, m, v in place: as ops.adamw_update. All four are float32, and p, m, v in C order."""
    _update(device, p, g, m, v, None, t, lr, betas, eps, weight_decay)


def clipped_adamw_update(device, p, g, m, v, *, t, lr, betas, eps, weight_decay, limit):
    """|g| before clipping, a float: adamw_update with min(1, limit / (|g| + 1e-6)) g; nothing is changed if |g| is not
    finite. limit None: g is not clipped."""
    wide(device, g)
    g = device.contiguous(g)
    parts, norm = device.empty(NORM_BLOCKS, np.float32), device.empty(2, np.float32)
    kernel = device.kernel("adamw", "adamw_squares", VECTOR=vector(g.dtype, [g.size], g))
    device.launch(kernel, NORM_BLOCKS, THREADS, g, np.int64(g.size), parts)
    limit = float("inf") if limit is None else float(limit)
    device.launch(device.kernel("adamw", "adamw_norm", VECTOR=1), 1, 1, parts, limit, norm)
    _update(device, p, g, m, v, norm, t, lr, betas, eps, weight_decay)
    return float(norm[0])


def _update(device, p, g, m, v, norm, t, lr, betas, eps, weight_decay):
    if not p.shape == g.shape == m.shape == v.shape:
        raise InputError(f"p {p.shape}, g {g.shape}, m {m.shape}, v {v.shape} must have the same shape")
    if not all(x.flags.c_contiguous for x in (p, m, v)):
        raise InputError("p, m and v are updated in place and must be in C order: update the array, not a view of it")
    wide(device, p, g, m, v)
    beta1, beta2 = betas
    coefficients = lr * weight_decay, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**t), 1 / (1 - beta2**t), eps
    g = device.contiguous(g)
    width = vector(p.dtype, [p.size], p, m, v, g)
    kernel = device.kernel("adamw", "adamw_update", VECTOR=width)
    grid = blocks(p.size, THREADS * width)
    device.launch(kernel, grid, THREADS, device.upload(coefficients, np.float32), p, m, v, g, norm, np.int64(p.size))
