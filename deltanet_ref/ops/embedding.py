"""Embedding: rows of a table by token. Derivation: docs/derivations/linear-and-lora.md."""
import numpy as np

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
    dx, tokens = dx.reshape(-1, dx.shape[-1]), tokens.reshape(-1)
    dw = np.zeros((vocab_size, dx.shape[1]), dx.dtype)
    if len(tokens):
        order = np.argsort(tokens, kind="stable")                          # all uses of a token are adjacent now
        used, starts = np.unique(tokens[order], return_index=True)
        dw[used] = np.add.reduceat(dx[order], starts, axis=0)
    return dw
