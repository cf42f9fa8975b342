"""Rows of a table by token. Mathematics: docs/derivations/linear-and-lora.md. Kernels: kernels/embedding.cu."""

import numpy as np

from deltanet_ref.backends.cuda.layout import THREADS, blocks, real, vector
from deltanet_ref.errors import InputError


def embedding_forward(device, tokens, w):
    """x_t = w[token_t]: as ops.embedding_forward."""
    tokens, D = np.asarray(tokens), w.shape[1]
    outside = (tokens < 0) | (tokens >= len(w))
    if outside.any():
        raise InputError(f"token {tokens[outside][0]} is outside the vocabulary: it must be 0 .. {len(w) - 1}")
    w = device.contiguous(w)
    x = device.empty((*tokens.shape, D), real(device, w))
    width = vector(w.dtype, [D], w, x)
    kernel = device.kernel("embedding", "embedding_forward", REAL=w.dtype, VECTOR=width)
    grid = blocks(x.size // width, THREADS)
    device.launch(kernel, grid, THREADS, device.upload(tokens, np.int32), w, tokens.size, D, x)
    return x


def embedding_backward(device, dx, tokens, vocab_size):
    """dw (V, D) float32: as ops.embedding_backward."""
    tokens, D = np.asarray(tokens).reshape(-1), dx.shape[-1]
    dx, dw = device.contiguous(dx), device.zeros((vocab_size, dx.shape[-1]), np.float32)
    order = np.argsort(tokens, kind="stable")  # all uses of a token are adjacent now
    used, starts = np.unique(tokens[order], return_index=True)
    uses = (device.upload(a, np.int32) for a in (order, [*starts, len(tokens)], used))
    width = vector(real(device, dx), [D], dx, dw)
    kernel = device.kernel("embedding", "embedding_backward", REAL=dx.dtype, VECTOR=width)
    device.launch(kernel, (len(used), blocks(D, 32 * width)), THREADS, dx, *uses, D, dw)
    return dw
