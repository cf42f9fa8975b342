"""AdamW in float32, one pass. Kernel: kernels/adamw.cu."""

import numpy as np

from deltanet_ref.backends.cuda.layout import THREADS, blocks, vector, wide
from deltanet_ref.errors import InputError


def adamw_update(device, p, g, m, v, *, t, lr, betas, eps, weight_decay):
    """p, m, v in place: as ops.adamw_update. All four are float32, and p, m, v in C order."""
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
    device.launch(kernel, grid, THREADS, device.upload(coefficients, np.float32), p, m, v, g, np.int64(p.size))
