"""Linear maps: products by cuBLAS. Mathematics: docs/derivations/linear-and-lora.md."""

import numpy as np

from deltanet_ref.errors import InputError


def linear_forward(device, x, w):
    """y = x w^T: as ops.linear_forward. x (..., in), w (out, in), of one dtype, which y has too."""
    if x.shape[-1] != w.shape[1]:
        raise InputError(f"x has {x.shape[-1]} features and w is {w.shape}; w must be (out, {x.shape[-1]})")
    return device.matmul(rows(x), w, transpose_b=True).reshape(*x.shape[:-1], len(w))


def linear_backward_input(device, dy, w):
    """dx = dy w: as ops.linear_backward_input, in the dtype of dy."""
    return device.matmul(rows(dy), w).reshape(*dy.shape[:-1], w.shape[1])


def linear_backward_weight(device, dy, x):
    """dw = dy^T x, summed over all rows: as ops.linear_backward_weight. float32 whatever the operands are."""
    return device.matmul(rows(dy), rows(x), transpose_a=True, out_dtype=np.float32)


def rows(x):
    """(..., n) -> (rows, n)."""
    return x.reshape(-1, x.shape[-1])
