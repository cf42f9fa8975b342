"""The inputs of a training step, filled up so that steps of few shapes occur: a backend may prepare for each shape.

Behind the tokens of a batch comes one sequence of padding, whose targets are ignored, and empty sequences. They change
no gradient: nothing that belongs to another sequence reads them, and what comes back to them is zero.
"""
import numpy as np

from deltanet_ref.ops.sequences import rounded, token_positions

IGNORED = -100                # a label that is not trained, as in HF


def filled_up(tokens, targets, cu_seqlens) -> dict:
    """tokens, targets (T,), cu_seqlens (N_seq + 1,) and positions (T,), all int64, of a shape that step_shape names."""
    T = rounded(len(tokens))
    more = T - len(tokens)
    sequences = len(cu_seqlens) - 1 + (more > 0)
    ends = np.full(1 << (sequences - 1).bit_length(), T)
    ends[:len(cu_seqlens) - 1] = cu_seqlens[1:]
    cu_seqlens = np.concatenate([[0], ends])
    return dict(tokens=np.pad(tokens, (0, more)).astype(np.int64), cu_seqlens=cu_seqlens,
                targets=np.pad(targets, (0, more), constant_values=IGNORED).astype(np.int64),
                positions=token_positions(cu_seqlens))


def step_shape(inputs: dict) -> tuple:
    """What the work of a step depends on: tokens, sequences, and targets that are not ignored, rounded."""
    return len(inputs["tokens"]), len(inputs["cu_seqlens"]), rounded(np.count_nonzero(inputs["targets"] != IGNORED))


def backwards(inputs: dict) -> dict:
    """Other inputs of the same shape: everything in reverse order."""
    cu_seqlens = inputs["cu_seqlens"][-1] - inputs["cu_seqlens"][::-1]
    return dict(tokens=inputs["tokens"][::-1].copy(), targets=inputs["targets"][::-1].copy(), cu_seqlens=cu_seqlens,
                positions=token_positions(cu_seqlens))
