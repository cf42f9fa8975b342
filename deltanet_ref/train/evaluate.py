"""The loss of a model on examples, in three units."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from deltanet_ref.train.batches import IGNORED, Example, in_order

OnBatch = Callable[[int, int], None] | None


class Evaluation(NamedTuple):
    """Means over all predicted tokens that have a label."""

    loss: float  # nats per token
    perplexity: float  # exp(loss)
    bits_per_byte: float  # total nats / ln 2 / bytes of these tokens; end tokens cost nats and have no bytes
    tokens: int
    bytes: int


def mean_loss(model, examples: Sequence[Example], batch_size: int = 1, on_batch: OnBatch = None) -> float:
    """Mean loss in nats over the trained tokens of all examples, batch_size examples at a time.

    on_batch: called with (examples done, number of examples) after each batch
    """
    nats, done = 0.0, 0
    for batch in in_order(examples, batch_size):
        nats += batch.kept * model.loss(batch.tokens, batch.labels, cu_seqlens=batch.cu_seqlens)
        done += len(batch.cu_seqlens) - 1
        if on_batch:
            on_batch(done, len(examples))
    return float(nats) / sum(example.kept for example in examples)


def evaluate(model, examples: Sequence[Example], batch_size: int = 1, on_batch: OnBatch = None) -> Evaluation:
    """Evaluate the model with the adapters that are attached to it. Arguments as for mean_loss."""
    loss = mean_loss(model, examples, batch_size, on_batch)
    tokens = sum(example.kept for example in examples)
    spelled = sum(_bytes(model.tokenizer, example.labels[1:]) for example in examples)
    return Evaluation(loss, math.exp(min(loss, 700.0)), loss * tokens / math.log(2) / max(spelled, 1), tokens, spelled)


def _bytes(tokenizer, labels):
    return sum(len(tokenizer.token_bytes(int(t))) for t in labels if t != IGNORED and t not in tokenizer.eos_ids)
