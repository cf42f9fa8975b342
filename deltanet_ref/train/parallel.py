"""One batch, several threads: loss and gradient of every parameter, and the validation loss.

Trained are the tensors as the GGUF holds them, with one exception: A_log instead of ssm_a = -exp(A_log), so that the
decay keeps its sign; dA_log = ssm_a dssm_a.
"""
import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from deltanet_ref.train.batches import Batch, in_order

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4        # glibc's malloc.h


class ParallelModel:
    """A model and the threads that share its batches, a shard of whole sequences each.

    parameters      name -> array, to be updated in place: the model's own tensors, but A_log in place of ssm_a
    loss_and_grads  batch -> mean loss, name -> gradient. The shards are added in their order, so the same number of threads
                    gives the same bits.
    """

    def __init__(self, model, threads):
        self.model, self.threads, self.executor = model, threads, ThreadPoolExecutor(threads)
        self.parameters = {_trained_name(name): np.log(-w) if name.endswith("ssm_a") else w
                           for name, w in model.weights.items()}

    def loss_and_grads(self, batch):
        self.update_decay()
        shards = split(batch, self.threads)
        results = self.executor.map(lambda shard: self.model.loss_and_grads(
            shard.tokens, shard.labels, cu_seqlens=shard.cu_seqlens, wrt="all"), shards)
        mean, total = 0.0, {}
        for shard, (loss, gradients) in zip(shards, results):
            weight = shard.kept / batch.kept
            mean += weight * loss
            for name, gradient in gradients.items():
                gradient *= weight
                total[name] = total[name] + gradient if name in total else gradient
        for name in [name for name in total if name.endswith("ssm_a")]:
            total[_trained_name(name)] = self.model.weights[name] * total.pop(name)       # dA_log = ssm_a dssm_a
        return mean, total

    def update_decay(self):
        """ssm_a = -exp(A_log): the model's copy follows the parameter."""
        for name in self.model.weights:
            if name.endswith("ssm_a"):
                self.model.weights[name] = -np.exp(self.parameters[_trained_name(name)])

    def evaluate(self, examples, batch_size):
        """Mean loss in nats over all predicted tokens."""
        self.update_decay()
        losses = self.executor.map(
            lambda batch: batch.kept * self.model.loss(batch.tokens, batch.labels, cu_seqlens=batch.cu_seqlens),
            in_order(examples, batch_size))
        return float(sum(losses)) / sum(example.kept for example in examples)


def _trained_name(name):
    return name.replace("ssm_a", "A_log") if name.endswith("ssm_a") else name


def split(batch, parts):
    """A batch whose labels all count -> at most `parts` Batches of whole sequences, in order."""
    cu = batch.cu_seqlens
    edges = np.unique(np.linspace(0, len(cu) - 1, parts + 1).round().astype(int))
    return [Batch(batch.tokens[:, cu[a]:cu[b]], batch.labels[:, cu[a]:cu[b]], cu[a:b + 1] - cu[a],
                  kept=int(cu[b] - cu[a] - (b - a))) for a, b in zip(edges, edges[1:])]


def keep_freed_memory():
    """Tell glibc to keep what is freed and never to map single arrays.

    Otherwise each large array is mapped and unmapped, the threads wait for each other in the kernel, and two of them are no
    faster than one (measured on 2 cores: 3.4 instead of 7.1 thousand tokens/s). Does nothing on other systems.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)       # musl has none
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20)):
            mallopt(option, value)
