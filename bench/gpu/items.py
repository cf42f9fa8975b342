"""The operators as the benchmark runs them: inputs, forward, backward, and the floors of both in bytes and flops.

forward and backward call a backend by the names of the interface, so that the same lines run on the card and, with
deltanet_ref.ops in float64, make the values to compare with.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Item(NamedTuple):
    """An operator.

    inputs    (rng, sizes) -> name -> float64 array; integers stay on the host
    forward   (backend, inputs, sizes) -> outputs, cache
    backward  (backend, gradients of the outputs, cache, inputs) -> gradients; None: there is none
    floor     (sizes, e) -> (bytes, flops) of forward and of backward; e: bytes of an activation
    small     sizes at which the results are compared: tails everywhere
    main      sizes that are timed: those of the 0.8B shape
    wide      inputs that are float32 whatever the activations are
    """

    inputs: Callable
    forward: Callable
    backward: Callable | None
    floor: Callable
    small: dict
    main: dict
    wide: frozenset = frozenset()


TOKENS = 8192


def normal(rng, *shape):
    return rng.standard_normal(shape)


def one(outputs_and_cache):
    """A forward with one output, as an Item returns it."""
    y, cache = outputs_and_cache
    return (y,), cache


# ---- rows and elements


def rms_norm():
    return Item(
        inputs=lambda rng, s: dict(x=normal(rng, 1, s["L"], s["D"]), w=1 + 0.1 * normal(rng, s["D"])),
        forward=lambda be, x, s: one(be.rms_norm_forward(x["x"], x["w"], 1e-6)),
        backward=lambda be, dy, cache, x: be.rms_norm_backward(*dy, cache, need_dw=False)[:1],
        floor=lambda s, e: ((2 * s["L"] * s["D"] * e, 0), (3 * s["L"] * s["D"] * e, 0)),
        small=dict(L=37, D=67),
        main=dict(L=TOKENS, D=1024),
        wide=frozenset("w"),
    )


def gated_rms_norm():
    def inputs(rng, s):
        shape = 1, s["L"], s["H"], s["d"]
        return dict(x=normal(rng, *shape), z=normal(rng, *shape), w=1 + 0.1 * normal(rng, s["d"]))

    return Item(
        inputs=inputs,
        forward=lambda be, x, s: one(be.gated_rms_norm_forward(x["x"], x["z"], x["w"], 1e-6)),
        backward=lambda be, dy, cache, x: be.gated_rms_norm_backward(*dy, cache, need_dw=False)[:2],
        floor=lambda s, e: tuple((n * s["L"] * s["H"] * s["d"] * e, 0) for n in (3, 5)),
        small=dict(L=37, H=3, d=33),
        main=dict(L=TOKENS, H=16, d=128),
        wide=frozenset("w"),
    )


def l2_norm():
    return Item(
        inputs=lambda rng, s: dict(x=normal(rng, 1, s["L"], s["H"], s["d"])),
        forward=lambda be, x, s: one(be.l2_norm_forward(x["x"])),
        backward=lambda be, dy, cache, x: (be.l2_norm_backward(*dy, cache),),
        floor=lambda s, e: tuple((n * s["L"] * s["H"] * s["d"] * e, 0) for n in (2, 3)),
        small=dict(L=37, H=3, d=33),
        main=dict(L=TOKENS, H=16, d=128),
    )


def causal_conv1d():
    def forward(be, x, s):
        y, _, cache = be.causal_conv1d_forward(x["x"], x["w"])
        return (y,), cache

    return Item(
        inputs=lambda rng, s: dict(x=normal(rng, 1, s["L"], s["C"]), w=normal(rng, s["C"], 4) / 2),
        forward=forward,
        backward=lambda be, dy, cache, x: be.causal_conv1d_backward(*dy, None, cache, need_dw=False)[:1],
        floor=lambda s, e: tuple((n * s["L"] * s["C"] * e, 0) for n in (2, 3)),
        small=dict(L=37, C=67),
        main=dict(L=TOKENS, C=6144),
        wide=frozenset("w"),
    )


def decay_gate():
    def inputs(rng, s):
        a, b = normal(rng, 2, 1, s["L"], s["H"])
        return dict(a=a, b=b, A_log=normal(rng, s["H"]), dt_bias=normal(rng, s["H"]) - 4)

    def forward(be, x, s):
        g, beta, cache = be.decay_gate_forward(x["a"], x["b"], x["A_log"], x["dt_bias"])
        return (g, beta), cache

    return Item(
        inputs=inputs,
        forward=forward,
        backward=lambda be, dy, cache, x: be.decay_gate_backward(*dy, cache, need_dw=False)[:2],
        floor=lambda s, e: ((s["L"] * s["H"] * (2 * e + 8), 0), (s["L"] * s["H"] * (4 * e + 8), 0)),
        small=dict(L=37, H=5),
        main=dict(L=TOKENS, H=16),
        wide=frozenset({"A_log", "dt_bias"}),
    )


def sigmoid_gate():
    return Item(
        inputs=lambda rng, s: dict(zip("og", normal(rng, 2, 1, s["L"], s["H"], s["d"]))),
        forward=lambda be, x, s: one(be.sigmoid_gate_forward(x["o"], x["g"])),
        backward=lambda be, dy, cache, x: be.sigmoid_gate_backward(*dy, cache),
        floor=lambda s, e: tuple((n * s["L"] * s["H"] * s["d"] * e, 0) for n in (3, 5)),
        small=dict(L=37, H=3, d=33),
        main=dict(L=TOKENS, H=8, d=256),
    )


def swiglu():
    return Item(
        inputs=lambda rng, s: dict(zip("gu", normal(rng, 2, 1, s["L"], s["F"]))),
        forward=lambda be, x, s: one(be.swiglu_forward(x["g"], x["u"])),
        backward=lambda be, dy, cache, x: be.swiglu_backward(*dy, cache),
        floor=lambda s, e: tuple((n * s["L"] * s["F"] * e, 0) for n in (3, 5)),
        small=dict(L=37, F=67),
        main=dict(L=TOKENS, F=3584),
    )


def rope():
    def tables(be, x, s):
        return be.rope_tables(
            np.arange(s["L"]), s["rotary"], 1e7, dtype=x["x"].dtype if be.name == "numpy" else np.float32
        )

    def forward(be, x, s):
        cos, sin = tables(be, x, s)
        return (be.rope_forward(x["x"], cos, sin),), (cos, sin)

    return Item(
        inputs=lambda rng, s: dict(x=normal(rng, 1, s["L"], s["H"], s["d"])),
        forward=forward,
        backward=lambda be, dy, cache, x: (be.rope_backward(*dy, *cache),),
        floor=lambda s, e: tuple((2 * s["L"] * s["H"] * s["d"] * e, 0) for _ in range(2)),
        small=dict(L=37, H=3, d=34, rotary=12),
        main=dict(L=TOKENS, H=8, d=256, rotary=64),
    )


# ---- the head


def linear_cross_entropy():
    def inputs(rng, s):
        x, w = normal(rng, s["L"], s["D"]), normal(rng, s["V"], s["D"]) / s["D"] ** 0.5
        return dict(x=x, w=w, labels=rng.integers(0, s["V"], s["L"]))

    def forward(be, x, s):
        loss, cache = be.linear_cross_entropy_forward(x["x"], x["w"], x["labels"])
        return (loss,), cache

    return Item(
        inputs=inputs,
        forward=forward,
        backward=lambda be, dy, cache, x: be.linear_cross_entropy_backward(1.0, cache, need_dw=False)[:1],
        floor=lambda s, e: ((s["V"] * s["D"] * e, 4 * s["L"] * s["V"] * s["D"]), (2 * s["L"] * s["D"] * e, 0)),
        small=dict(L=37, D=64, V=331),
        main=dict(L=TOKENS, D=1024, V=248_320),
    )


# ---- attention and the delta rule


def softmax_attention():
    def inputs(rng, s):
        q = normal(rng, 1, s["L"], s["H"], s["d"])
        return dict(q=q, **dict(zip("kv", normal(rng, 2, 1, s["L"], s["H_kv"], s["d"]))))

    def floor(s, e):
        products = s["L"] ** 2 * s["H"] * s["d"]  # of one L x L x d product, the half below the diagonal
        rows = s["L"] * s["d"] * e
        return (rows * 2 * (s["H"] + s["H_kv"]), 2 * products), (rows * 4 * (s["H"] + s["H_kv"]), 5 * products)

    return Item(
        inputs=inputs,
        forward=lambda be, x, s: one(be.softmax_attention_forward(x["q"], x["k"], x["v"])),
        backward=lambda be, dy, cache, x: be.softmax_attention_backward(*dy, cache),
        floor=floor,
        small=dict(L=83, H=4, H_kv=2, d=40),
        main=dict(L=TOKENS, H=8, H_kv=2, d=256),
    )


def gated_delta_rule():
    def inputs(rng, s):
        q, k = normal(rng, 2, s.get("B", 1), s["L"], s["H_k"], s["d_k"])
        v = normal(rng, s.get("B", 1), s["L"], s["H_v"], s["d_v"])
        return dict(
            q=q / np.linalg.norm(q, axis=-1, keepdims=True),
            k=k / np.linalg.norm(k, axis=-1, keepdims=True),
            v=v,
            g=-np.exp(normal(rng, *v.shape[:3]) - 2),
            beta=1 / (1 + np.exp(-normal(rng, *v.shape[:3]))),
        )

    def forward(be, x, s):
        o, _, cache = be.gated_delta_rule_forward(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"])
        return (o,), cache

    def floor(s, e):
        tokens = s.get("B", 1) * s["L"]
        keys, values, C = s["H_k"] * s["d_k"], s["H_v"] * s["d_v"], 64
        state, pair = s["H_v"] * s["d_k"] * s["d_v"], C * s["H_v"] * (s["d_k"] + s["d_v"])
        forward = tokens * (2 * keys + 2 * values) * e, tokens * (6 * state + 2 * pair)
        backward = tokens * (4 * keys + 3 * values) * e, tokens * (16 * state + 5 * pair)
        return forward, backward

    return Item(
        inputs=inputs,
        forward=forward,
        backward=lambda be, dy, cache, x: be.gated_delta_rule_backward(*dy, None, cache)[:5],
        floor=floor,
        small=dict(L=149, H_k=2, H_v=4, d_k=48, d_v=32),
        main=dict(L=TOKENS, H_k=16, H_v=16, d_k=128, d_v=128),
        wide=frozenset({"g", "beta"}),
    )


ITEMS = {
    make.__name__: make()
    for make in (
        rms_norm,
        gated_rms_norm,
        l2_norm,
        causal_conv1d,
        decay_gate,
        sigmoid_gate,
        swiglu,
        rope,
        linear_cross_entropy,
        softmax_attention,
        gated_delta_rule,
    )
}

# PEERS' shapes of the delta rule: name -> sizes
RULES = {
    "B1 L2048, 16/16 heads": dict(B=1, L=2048, H_k=16, H_v=16, d_k=128, d_v=128),
    "B1 L8192, 16/16 heads": dict(B=1, L=8192, H_k=16, H_v=16, d_k=128, d_v=128),
    "B4 L2048, 16/16 heads": dict(B=4, L=2048, H_k=16, H_v=16, d_k=128, d_v=128),
    "B1 L8192, 16/32 heads": dict(B=1, L=8192, H_k=16, H_v=32, d_k=128, d_v=128),
}
# (tokens in a sequence, sequences) of the LoRA step
STEPS = {"B1 L2048": (2048, 1), "B4 L2048": (2048, 4)}
