"""The loss of a model over examples, in three units."""
import math
from typing import NamedTuple

from deltanet_ref.train.batches import IGNORED, in_order


class Evaluation(NamedTuple):
    """Means over all predicted tokens that carry a label."""
    loss: float           # nats per token
    perplexity: float     # exp(loss)
    bits_per_byte: float  # all nats / ln 2 / bytes that these tokens spell; end tokens cost nats and spell nothing
    tokens: int
    bytes: int


def mean_loss(model, examples, batch_size=1):
    """Mean loss in nats over the trained tokens of all examples, batch_size of them at a time."""
    nats = sum(batch.kept * model.loss(batch.tokens, batch.labels, cu_seqlens=batch.cu_seqlens)
               for batch in in_order(examples, batch_size))
    return float(nats) / sum(example.kept for example in examples)


def evaluate(model, examples, batch_size=1):
    """Evaluation of the model with whatever is attached to it."""
    loss = mean_loss(model, examples, batch_size)
    tokens = sum(example.kept for example in examples)
    spelled = sum(_bytes(model.tokenizer, example.labels[1:]) for example in examples)
    return Evaluation(loss, math.exp(min(loss, 700.0)), loss * tokens / math.log(2) / max(spelled, 1), tokens, spelled)


def _bytes(tokenizer, labels):
    return sum(len(tokenizer.token_bytes(int(t))) for t in labels if t != IGNORED and t not in tokenizer.eos_ids)
