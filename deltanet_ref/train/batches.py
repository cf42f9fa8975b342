"""Examples packed end to end into batches without padding, in an order that only the seed decides."""
from typing import NamedTuple

import numpy as np

from deltanet_ref.model.qwen35 import IGNORED


class Example(NamedTuple):
    """One sequence to train on."""
    tokens: np.ndarray  # (n,) int32
    labels: np.ndarray  # (n,) int32, aligned with tokens (the model shifts); IGNORED where nothing is to be learned
    source: str         # where it came from, "train.jsonl:7", for messages

    @property
    def kept(self):
        """How many of its tokens are predicted and trained: the first has nothing before it that could predict it."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))


class Batch(NamedTuple):
    """Sequences laid end to end; cu_seqlens says where each begins, and nothing leaks from one to the next."""
    tokens: np.ndarray      # (1, T) int32
    labels: np.ndarray      # (1, T) int32, IGNORED where nothing is to be learned
    cu_seqlens: np.ndarray  # (N + 1,) int64: 0, then where each sequence ends
    kept: int               # labels that count in the mean: not IGNORED and not the first of a sequence


def pack(examples):
    """Lay examples end to end: one Batch of all their tokens."""
    return Batch(
        tokens=np.concatenate([e.tokens for e in examples])[None],
        labels=np.concatenate([e.labels for e in examples])[None],
        cu_seqlens=np.concatenate([[0], np.cumsum([len(e.tokens) for e in examples])]),
        kept=sum(e.kept for e in examples),
    )


def in_order(examples, batch_size):
    """Each example once, in the order given, batch_size to a Batch; the last may hold fewer."""
    for start in range(0, len(examples), batch_size):
        yield pack(examples[start : start + batch_size])


def shuffled(examples, batch_size, seed):
    """Epoch after epoch without end, each in an order of its own drawn from (seed, epoch)."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(examples))
        yield from in_order([examples[i] for i in order], batch_size)
        epoch += 1
