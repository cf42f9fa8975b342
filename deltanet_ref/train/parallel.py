"""Loss and gradient of every parameter over a batch, with its sequences distributed over threads; dropout.

The trained tensors are those that a GGUF holds, except A_log in place of ssm_a = -exp(A_log), so that the decay keeps
its sign; dA_log = ssm_a dssm_a.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from deltanet_ref.model.qwen35 import Qwen35
from deltanet_ref.model.weights import Weights
from deltanet_ref.train.batches import in_order

# tensors whose columns are dropped: inputs of a block, outputs of its branches, input of the head
DROPPED = (
    "attn_norm.weight",
    "post_attention_norm.weight",
    "ssm_out.weight",
    "attn_output.weight",
    "ffn_down.weight",
    "output_norm.weight",
)


class ParallelModel:
    """A model, its parameters, and the threads that share its batches.

    parameters      name -> array, to be updated in place: the model's own tensors, with A_log in place of ssm_a
    loss_and_grads  batch in which every label counts -> mean loss, name -> gradient; summed over sequences in order, so
                    the bits are the same for any number of threads
    dropout         p: in training every feature that a tensor of DROPPED reads (a norm: writes) is zero with
                    probability p and divided by 1 - p otherwise, with one mask per sequence (Gal and Ghahramani 2016).
                    A feature multiplies one column, so the column is scaled, and its gradient likewise; the operators
                    need no dropout of their own.
    """

    def __init__(self, model, threads, dropout=0.0, seed=0):
        self.model, self.dropout, self.executor = model, dropout, ThreadPoolExecutor(threads)
        self.rng = np.random.default_rng([seed, 1])
        self.parameters = {
            _trained_name(name): np.log(-w) if name.endswith("ssm_a") else w for name, w in model.weights.items()
        }

    def loss_and_grads(self, batch):
        """The mean loss of a batch and the gradient of every parameter; sequences run on threads of their own."""
        self.update_decay()
        cu = batch.cu_seqlens
        sequences = [batch.tokens[:, a:b] for a, b in zip(cu, cu[1:])]
        results = self.executor.map(self._sequence, sequences, self.rng.spawn(len(sequences)))
        mean, total = 0.0, {}
        for sequence, (loss, gradients) in zip(sequences, results):
            weight = (sequence.size - 1) / batch.kept
            mean += weight * loss
            for name, gradient in gradients.items():
                gradient *= weight
                total[name] = total[name] + gradient if name in total else gradient
        for name in [name for name in total if name.endswith("ssm_a")]:
            total[_trained_name(name)] = self.model.weights[name] * total.pop(name)  # dA_log = ssm_a dssm_a
        return mean, total

    def _sequence(self, tokens, rng):
        scales = self._dropout_scales(rng)
        config, weights, dtype = self.model.config, self.model.weights, self.model.dtype
        dropped = {name: weights[name] * scales[name] if name in scales else weights[name] for name in weights}
        model = Qwen35(config, Weights(config, dropped, dtype, self.model.backend))
        loss, gradients = model.loss_and_grads(tokens, tokens, wrt="all", keep="everything")
        for name, scale in scales.items():
            gradients[name] *= scale
        return loss, gradients

    def _dropout_scales(self, rng):
        """Name -> the factors of its columns, each 0 or 1 / (1 - p)."""
        if not self.dropout:
            return {}
        keep, weights = 1 - self.dropout, self.model.weights
        return {
            name: (rng.random(weights.shape(name)[-1]) < keep).astype(weights.dtype) / weights.dtype.type(keep)
            for name in weights
            if name.endswith(DROPPED)
        }

    def update_decay(self):
        """Recompute the model's ssm_a = -exp(A_log) from the parameters."""
        for name in self.model.weights:
            if name.endswith("ssm_a"):
                self.model.weights[name] = -np.exp(self.parameters[_trained_name(name)])

    def evaluate(self, examples, batch_size: int) -> float:
        """Mean loss in nats over all predicted tokens, without dropout."""
        self.update_decay()
        losses = self.executor.map(
            lambda batch: batch.kept * self.model.loss(batch.tokens, batch.labels, cu_seqlens=batch.cu_seqlens),
            in_order(examples, batch_size),
        )
        return float(sum(losses)) / sum(example.kept for example in examples)


def _trained_name(name):
    return name.replace("ssm_a", "A_log") if name.endswith("ssm_a") else name
