"""Packed sequences: cu_seqlens holds the offset at which each one starts."""
import numpy as np

from deltanet_ref.errors import InputError


def sequence_boundaries(B, L, cu_seqlens):
    """cu_seqlens as an int64 array (N_seq + 1,), itself if it is one; a dense batch is B sequences of L tokens.

    Raises InputError.
    """
    if cu_seqlens is None:
        return np.arange(B + 1) * L
    cu = np.asarray(cu_seqlens)
    if B != 1:
        raise InputError(f"cu_seqlens packs sequences along L and needs B = 1, not B = {B}")
    if cu.ndim != 1 or len(cu) < 2 or cu.dtype.kind not in "iu" or cu[0] != 0 or cu[-1] != L or (np.diff(cu) < 0).any():
        raise InputError(f"cu_seqlens must be integers that do not decrease, from 0 to L = {L}; it is {cu.tolist()}")
    return np.asarray(cu, np.int64)


def token_positions(cu_seqlens):
    """The position of each token in its sequence, (L,)."""
    return np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))


def rounded(n):
    """n or a little more, up to an eighth or 15: one of few sizes, for backends that prepare for each size."""
    step = max(16, 2 ** (int(n).bit_length() - 4))
    return -(-n // step) * step
