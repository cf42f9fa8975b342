"""Every differentiable operation once, as a Case.

forward   maps the arguments to the tuple of outputs that gradients come in for, and the cache
backward  maps those gradients and the cache to the gradients of the arguments, in their order
"""

from collections.abc import Callable
from typing import NamedTuple
from unittest.mock import patch

import numpy as np

from deltanet_ref import ops
from deltanet_ref.ops import linear_cross_entropy
from deltanet_ref.ops.lora_linear import Update


class Case(NamedTuple):
    forward: Callable
    backward: Callable
    arguments: tuple
    inputs: str  # names of the arguments
    outputs: str = "y"

    @property
    def results(self):
        """Names of what `run` returns."""
        return [*self.outputs.split(), *(f"d{name}" for name in self.inputs.split())]


def _random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


CU_SEQLENS = np.array([0, 1, 1, 3, 6, 13])  # lengths 1, 0, 2, 3, 7: shorter and longer than a kernel
LABELS = np.array([3, -100, 10, 0, -100, 3])
TOKENS = np.array([[4, 0, 4], [6, 4, 0]])
POSITIONS = np.array([[0, 1, 2, 3, 4], [0, 7, 7, 9, 4], [0, 8, 6, 5, 4]])
TABLES = {dtype: ops.rope_tables(POSITIONS, 6, 1e4, (1, 1, 1), dtype) for dtype in (np.float32, np.float64)}


def _rope(f, x):
    return f(x, *TABLES[np.float32 if x.dtype == np.float32 else np.float64])


def _linear_backward(dy, cache):
    x, w = cache
    return ops.linear_backward_input(dy, w), ops.linear_backward_weight(dy, x)


def _lora(x, a, b):
    """The update alone: added to zeros."""
    y = np.zeros((*x.shape[:-1], len(b)), x.dtype)
    cache = ops.lora_forward([y], x, [Update(0, a, b, 0.7)])
    return (y,), cache


def _lora_backward(dy, cache):
    dx, [(da, db)] = ops.lora_backward([dy], cache)
    return dx, da, db


def _attention(**options):
    def forward(q, k, v):
        o, cache = ops.softmax_attention_forward(q, k, v, **options)
        return (o,), cache

    return forward


def _conv(**options):
    def forward(x, w, state):
        y, state_end, cache = ops.causal_conv1d_forward(x, w, state=state, **options)
        return (y, state_end), cache

    return forward


def _one(f, **options):
    """A forward with one output, as a case wants it."""

    def forward(*arguments):
        y, cache = f(*arguments, **options)
        return (y,), cache

    return forward


def _one_gradient(f):
    def backward(dy, cache):
        return (f(dy, cache),)

    return backward


def _in_blocks(f):
    """f with 4 rows of the vocabulary at a time."""

    def with_small_blocks(*arguments, **options):
        with patch.object(linear_cross_entropy, "BLOCK", 4):
            return f(*arguments, **options)

    return with_small_blocks


def _decay_gate(a, b, A_log, dt_bias):
    g, beta, cache = ops.decay_gate_forward(a, b, A_log, dt_bias)
    return (g, beta), cache


CASES = {
    "linear": Case(
        lambda x, w: ((ops.linear_forward(x, w),), (x, w)), _linear_backward, (_random(2, 3, 5), _random(7, 5)), "x w"
    ),
    "lora": Case(_lora, _lora_backward, (_random(2, 3, 7), _random(4, 7), _random(5, 4)), "x a b"),
    "embedding": Case(
        lambda w: ((ops.embedding_forward(TOKENS, w),), None),
        lambda dx, _: (ops.embedding_backward(dx, TOKENS, 7),),
        (_random(7, 5),),
        "w",
    ),
    "l2_norm": Case(
        _one(ops.l2_norm_forward, eps=1e-2), _one_gradient(ops.l2_norm_backward), (_random(2, 3, 4, 5),), "x"
    ),
    "rms_norm": Case(
        _one(ops.rms_norm_forward, eps=1e-2), ops.rms_norm_backward, (_random(2, 3, 5), _random(5)), "x w"
    ),
    "gated_rms_norm": Case(
        _one(ops.gated_rms_norm_forward, eps=1e-2),
        ops.gated_rms_norm_backward,
        (_random(2, 3, 4, 5), _random(2, 3, 4, 5, seed=1), _random(5)),
        "x z w",
    ),
    "rope": Case(
        lambda x: ((_rope(ops.rope_forward, x),), None),
        lambda dy, _: (_rope(ops.rope_backward, dy),),
        (_random(2, 5, 3, 7),),
        "x",
    ),
    "causal_conv1d": Case(
        _conv(),
        ops.causal_conv1d_backward,
        (_random(2, 5, 7), _random(7, 4), _random(2, 3, 7)),
        "x w state",
        "y state_end",
    ),
    "causal_conv1d-one-token": Case(
        _conv(),
        ops.causal_conv1d_backward,
        (_random(2, 1, 3), _random(3, 4), _random(2, 3, 3)),
        "x w state",
        "y state_end",
    ),
    "causal_conv1d-packed": Case(
        _conv(cu_seqlens=CU_SEQLENS),
        ops.causal_conv1d_backward,
        (_random(1, 13, 2), _random(2, 4), _random(5, 3, 2)),
        "x w state",
        "y state_end",
    ),
    "decay_gate": Case(
        _decay_gate,
        ops.decay_gate_backward,
        (3 * _random(2, 5, 3), 3 * _random(2, 5, 3, seed=1), _random(3), _random(3, seed=1)),
        "a b A_log dt_bias",
        "g beta",
    ),
    "softmax_attention": Case(
        _attention(),
        ops.softmax_attention_backward,
        (_random(2, 5, 3, 4), _random(2, 5, 1, 4), _random(2, 5, 1, 4, seed=1)),
        "q k v",
        "o",
    ),
    "softmax_attention-past": Case(
        _attention(scale=0.9),
        ops.softmax_attention_backward,
        (_random(2, 4, 6, 3), _random(2, 7, 2, 3), _random(2, 7, 2, 5)),
        "q k v",
        "o",
    ),
    "softmax_attention-one-token": Case(
        _attention(),
        ops.softmax_attention_backward,
        (_random(1, 1, 4, 3), _random(1, 6, 2, 3), _random(1, 6, 2, 3, seed=1)),
        "q k v",
        "o",
    ),
    "softmax_attention-packed": Case(
        _attention(cu_seqlens=CU_SEQLENS),
        ops.softmax_attention_backward,
        (_random(1, 13, 4, 3), _random(1, 13, 2, 3), _random(1, 13, 2, 3, seed=1)),
        "q k v",
        "o",
    ),
    "sigmoid_gate": Case(
        _one(ops.sigmoid_gate_forward),
        ops.sigmoid_gate_backward,
        (_random(2, 3, 5), 3 * _random(2, 3, 5, seed=1)),
        "o gate",
    ),
    "swiglu": Case(
        _one(ops.swiglu_forward), ops.swiglu_backward, (3 * _random(2, 3, 5), _random(2, 3, 5, seed=1)), "gate up"
    ),
    "cross_entropy": Case(
        _one(ops.cross_entropy_forward, labels=LABELS),
        _one_gradient(ops.cross_entropy_backward),
        (_random(6, 11),),
        "logits",
        "loss",
    ),
    "cross_entropy-count": Case(
        _one(ops.cross_entropy_forward, labels=LABELS, count=17),
        _one_gradient(ops.cross_entropy_backward),
        (_random(6, 11),),
        "logits",
        "loss",
    ),
    "linear_cross_entropy": Case(
        _one(ops.linear_cross_entropy_forward, labels=LABELS),
        ops.linear_cross_entropy_backward,
        (_random(6, 5), _random(11, 5)),
        "x w",
        "loss",
    ),
    "linear_cross_entropy-blocks": Case(
        _one(_in_blocks(ops.linear_cross_entropy_forward), labels=LABELS, count=17),
        _in_blocks(ops.linear_cross_entropy_backward),
        (3 * _random(6, 5), _random(11, 5)),
        "x w",
        "loss",
    ),
}


def incoming(case):
    """Fixed random gradients of the outputs."""
    outputs, _ = case.forward(*case.arguments)
    return [np.asarray(_random(*np.shape(y), seed=2)) for y in outputs]


def run(case, arguments, gradients):
    """All outputs and all gradients of one forward and backward."""
    outputs, cache = case.forward(*arguments)
    return [*outputs, *case.backward(*gradients, cache)]
