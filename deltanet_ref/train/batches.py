"""Examples packed end to end into batches without padding, in an order determined by the seed."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from deltanet_ref.model.qwen35 import IGNORED


class Example(NamedTuple):
    """One sequence to train on."""

    tokens: np.ndarray  # (n,) int32
    labels: np.ndarray  # (n,) int32, aligned with tokens (the model shifts); IGNORED where it is not trained
    source: str  # "train.jsonl:7", for messages

    @property
    def kept(self) -> int:
        """Number of labels in the loss; the first token's never counts, as nothing precedes it."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))


class Batch(NamedTuple):
    """Packed sequences: all state is reset at the boundaries that cu_seqlens gives."""

    tokens: np.ndarray  # (1, T) int32
    labels: np.ndarray  # (1, T) int32, IGNORED where it is not trained
    cu_seqlens: np.ndarray  # (N + 1,) int64: 0, then the end of each sequence
    kept: int  # number of labels in the mean loss: not IGNORED and not the first of a sequence


def pack(examples: Sequence[Example]) -> Batch:
    """Concatenate examples into one Batch."""
    return Batch(
        tokens=np.concatenate([e.tokens for e in examples])[None],
        labels=np.concatenate([e.labels for e in examples])[None],
        cu_seqlens=np.concatenate([[0], np.cumsum([len(e.tokens) for e in examples])]),
        kept=sum(e.kept for e in examples),
    )


def in_order(examples: Sequence[Example], batch_size: int) -> Iterator[Batch]:
    """Each example once, in the given order, batch_size per Batch; the last Batch may be smaller."""
    for start in range(0, len(examples), batch_size):
        yield pack(examples[start : start + batch_size])


def shuffled(examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless epochs, each in its own order drawn from (seed, epoch)."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(examples))
        yield from in_order([examples[i] for i in order], batch_size)
        epoch += 1
