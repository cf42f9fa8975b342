"""Rows of a table by token. Derivation: docs/derivations/linear-and-lora.md."""
import numpy as np
from scipy import sparse

from deltanet_ref.errors import InputError


def embedding_forward(tokens, w):
    """x_t = w[token_t] [embed.1].

    tokens int (...,), w (V, D) -> x (..., D). Raises InputError for a token outside 0..V-1.
    """
    outside = (tokens < 0) | (tokens >= len(w))
    if outside.any():
        raise InputError(f"token {tokens[outside][0]} is outside the vocabulary: it must be 0 .. {len(w) - 1}")
    return w[tokens]


def embedding_backward(dx, tokens, vocab_size):
    """dw_v = sum of dx_t over the t with token_t = v [embed.2]. dx (..., D), tokens (...,) -> dw (V, D)."""
    dx = dx.reshape(-1, dx.shape[-1])
    n = len(dx)
    one_hot = sparse.csr_array((np.ones(n, dx.dtype), (tokens.reshape(-1), np.arange(n))), shape=(vocab_size, n))
    return one_hot @ dx
