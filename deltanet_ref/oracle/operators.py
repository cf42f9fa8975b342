"""THE table of operators in the kit: arguments, outputs and gradients in pipeline order, and the reference.

Axes, one letter each: s sequence, t token, h head, f feature (any other axis).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from deltanet_ref import ops
from deltanet_ref.ops import gated_delta_rule as gdr
from deltanet_ref.ops.lora_linear import Update


class Operator(NamedTuple):
    """forward(*args, **options) -> outputs; backward(*args, **options, **incoming) -> gradients."""

    args: tuple  # positional arguments
    options: tuple  # keyword-only arguments; cu_seqlens, for packed cases, is last
    outputs: dict  # name -> axes
    incoming: tuple  # gradients of the outputs
    gradients: dict  # name -> axes
    reference: Callable  # inputs -> {output or gradient: array} in the dtype of the inputs


def _delta(x):
    """recurrent.py, the definition."""
    packed = {"cu_seqlens": x["cu_seqlens"]} if "cu_seqlens" in x else {}
    o, S_end, cache = gdr.recurrent_forward(
        x["q"],
        x["k"],
        x["v"],
        g=x["g"],
        beta=x["beta"],
        S0=x["S0"],
        scale=x["scale"],
        head_order=x.get("head_order", "grouped"),
        **packed,
    )
    gradients = gdr.recurrent_backward(x["do"], x["dS_end"], cache)
    return dict(zip(("o", "S_end", *DELTA.gradients), (o, S_end, *gradients)))


def _delta_step(x):
    """One token, without a token axis."""
    tokens = {name: x[name][:, None] for name in ("q", "k", "v", "g", "beta", "do")}
    y = _delta(x | tokens)
    return {name: value if name in ("S_end", "dS0") else value[:, 0] for name, value in y.items()}


def _conv(x):
    y, state_end, cache = ops.causal_conv1d_forward(x["x"], x["w"], state=x["state"], cu_seqlens=x.get("cu_seqlens"))
    dx, dw, dstate = ops.causal_conv1d_backward(x["dy"], x["dstate_end"], cache)
    return {"y": y, "state_end": state_end, "dx": dx, "dw": dw, "dstate": dstate}


def _gate(x):
    g, beta, cache = ops.decay_gate_forward(x["a"], x["b"], x["A_log"], x["dt_bias"])
    da, db, dA_log, ddt_bias = ops.decay_gate_backward(x["dg"], x["dbeta"], cache)
    return {"g": g, "beta": beta, "da": da, "db": db, "dA_log": dA_log, "ddt_bias": ddt_bias}


def _l2_norm(x):
    y, cache = ops.l2_norm_forward(x["x"], x["eps"])
    return {"y": y, "dx": ops.l2_norm_backward(x["dy"], cache)}


def _rms_norm(x):
    y, cache = ops.rms_norm_forward(x["x"], x["w"], x["eps"])
    return {"y": y, **dict(zip(("dx", "dw"), ops.rms_norm_backward(x["dy"], cache)))}


def _gated_rms_norm(x):
    y, cache = ops.gated_rms_norm_forward(x["x"], x["z"], x["w"], x["eps"])
    return {"y": y, **dict(zip(("dx", "dz", "dw"), ops.gated_rms_norm_backward(x["dy"], cache)))}


def _rope(x):
    cos, sin = ops.rope_tables(x["positions"], x["rotary_dim"], x["theta"], x["sections"], x["x"].dtype)
    return {"y": ops.rope_forward(x["x"], cos, sin), "dx": ops.rope_backward(x["dy"], cos, sin)}


def _attention(x):
    o, attention = ops.softmax_attention_forward(x["q"], x["k"], x["v"], scale=x["scale"])
    y, gate = ops.sigmoid_gate_forward(o, x["gate"])
    do, dgate = ops.sigmoid_gate_backward(x["dy"], gate)
    dq, dk, dv = ops.softmax_attention_backward(do, attention)
    return {"y": y, "dq": dq, "dk": dk, "dv": dv, "dgate": dgate}


def _cross_entropy(x):
    loss, cache = ops.cross_entropy_forward(x["logits"], x["labels"])
    return {
        "loss": np.asarray(loss, x["logits"].dtype),
        "dlogits": ops.cross_entropy_backward(x["dloss"], cache).astype(x["logits"].dtype),
    }


def _lora(x):
    y = ops.linear_forward(x["x"], x["w"])
    cache = ops.lora_forward([y], x["x"], [Update(0, x["a"], x["b"], x["scale"])])
    dx, [(da, db)] = ops.lora_backward([x["dy"]], cache)
    return {"y": y, "dx": dx + ops.linear_backward_input(x["dy"], x["w"]), "da": da, "db": db}


def _model(x):
    """The whole network: logits, loss and gradients over all tokens; then prefill of a prompt and decode steps."""
    from deltanet_ref.model.qwen35 import Qwen35
    from deltanet_ref.model.weights import Weights
    from deltanet_ref.oracle.cases import tiny_config

    config = tiny_config()
    stored = {name: value for name, value in x.items() if name not in OPERATORS["qwen35"].args}
    model = Qwen35(config, Weights(config, stored, x["output.weight"].dtype, ops))
    tokens, prompt = x["tokens"], x["prompt"]
    loss, gradients = model.loss_and_grads(tokens, x["labels"])
    decoded, state = model.prefill(tokens[:, :prompt])
    steps = [decoded.reshape(len(tokens), -1)]
    for t in range(prompt, tokens.shape[1]):
        logits, state = model.step(tokens[:, t], state)
        steps.append(logits.reshape(len(tokens), -1))
    return {
        "logits": model.logits(tokens),
        "decode_logits": np.stack(steps, 1),
        "loss": np.asarray(loss, model.dtype),
        **{f"d{name}": value for name, value in gradients.items()},
    }


def _model_gradients():
    from deltanet_ref.model.tensors import expected_tensors
    from deltanet_ref.oracle.cases import tiny_config

    return {f"d{name}": "f" * len(spec.shape) for name, spec in expected_tensors(tiny_config()).items()}


DELTA = Operator(
    ("q", "k", "v"),
    ("g", "beta", "S0", "scale", "cu_seqlens"),
    {"o": "sthf", "S_end": "shff"},
    ("do", "dS_end"),
    {"dq": "sthf", "dk": "sthf", "dv": "sthf", "dg": "sth", "dbeta": "sth", "dS0": "shff"},
    _delta,
)

OPERATORS = {
    "gated_delta_rule": DELTA,
    "gated_delta_rule_step": DELTA._replace(
        options=("g", "beta", "S0", "scale"),
        outputs={"o": "shf", "S_end": "shff"},
        reference=_delta_step,
        gradients={"dq": "shf", "dk": "shf", "dv": "shf", "dg": "sh", "dbeta": "sh", "dS0": "shff"},
    ),
    "causal_conv1d": Operator(
        ("x", "w"),
        ("state", "cu_seqlens"),
        {"y": "stf", "state_end": "sff"},
        ("dy", "dstate_end"),
        {"dx": "stf", "dw": "ff", "dstate": "sff"},
        _conv,
    ),
    "decay_gate": Operator(
        ("a", "b", "A_log", "dt_bias"),
        (),
        {"g": "sth", "beta": "sth"},
        ("dg", "dbeta"),
        {"da": "sth", "db": "sth", "dA_log": "h", "ddt_bias": "h"},
        _gate,
    ),
    "l2_norm": Operator(("x",), ("eps",), {"y": "sthf"}, ("dy",), {"dx": "sthf"}, _l2_norm),
    "rms_norm": Operator(("x", "w"), ("eps",), {"y": "stf"}, ("dy",), {"dx": "stf", "dw": "f"}, _rms_norm),
    "gated_rms_norm": Operator(
        ("x", "z", "w"), ("eps",), {"y": "stf"}, ("dy",), {"dx": "stf", "dz": "stf", "dw": "f"}, _gated_rms_norm
    ),
    "rope": Operator(
        ("x", "positions"), ("rotary_dim", "theta", "sections"), {"y": "sthf"}, ("dy",), {"dx": "sthf"}, _rope
    ),
    "gated_attention": Operator(
        ("q", "k", "v", "gate"),
        ("scale",),
        {"y": "sthf"},
        ("dy",),
        {"dq": "sthf", "dk": "sthf", "dv": "sthf", "dgate": "sthf"},
        _attention,
    ),
    "cross_entropy": Operator(("logits", "labels"), (), {"loss": ""}, ("dloss",), {"dlogits": "tf"}, _cross_entropy),
    "lora_linear": Operator(
        ("x", "w", "a", "b"), ("scale",), {"y": "tf"}, ("dy",), {"dx": "tf", "da": "ff", "db": "ff"}, _lora
    ),
    "qwen35": Operator(
        ("tokens", "labels", "prompt"),
        (),
        {"logits": "stf", "decode_logits": "stf", "loss": ""},
        (),
        _model_gradients(),
        _model,
    ),
}


def held_in(dtype: str) -> str:
    """The NumPy dtype that holds values of this dtype: float32 for bfloat16."""
    return "float32" if dtype == "bfloat16" else dtype


def in_dtype(inputs: dict, dtype) -> dict:
    """The inputs with every float array converted to dtype."""
    return {
        name: x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x for name, x in inputs.items()
    }
