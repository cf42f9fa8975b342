"""Rows of a stored table by token: their bytes are gathered as they are, and decoded then."""

import numpy as np

from deltanet_ref.backends.cuda.embedding import embedding_forward
from deltanet_ref.backends.cuda.quants import dequantize, resident


def stored_embedding_forward(device, tokens, tensor, dtype):
    """w[tokens] of a stored tensor w (V, D): tokens int (...) -> (..., D) of this dtype.

    embedding_forward copies rows without looking at the numbers: to it, a row is one of 16-bit numbers. All types of
    quants.KERNELS have rows of an even number of bytes.
    """
    V, D = tensor.shape
    raw = resident(device, tensor).raw.reshape(-1)
    table = raw.view(device.bf16).reshape(V, -1)
    gathered = embedding_forward(device, tokens, table).reshape(-1).view(np.uint8)
    return dequantize(device, gathered, tensor.type, (tokens.size, D), dtype).reshape(*tokens.shape, D)
