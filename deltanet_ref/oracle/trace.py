"""Every named tensor of a forward, and every gradient of its backward: THE table of names, and how they are recorded.

The model computes as always; its operators are wrapped, and what passes through them is copied. docs/trace.md explains
the names, and the file, to those who write one from another implementation.
"""
import json
from dataclasses import asdict
from itertools import cycle
from typing import NamedTuple

import numpy as np

from deltanet_ref import ops
from deltanet_ref.errors import InputError
from deltanet_ref.formats.safetensors import read_safetensors, write_safetensors
from deltanet_ref.model.config import Config
from deltanet_ref.model.layer import Layer
from deltanet_ref.model.qwen35 import IGNORED, Qwen35
from deltanet_ref.model.tensors import VHeads, expected_tensors, sizes, v_head_index
from deltanet_ref.notation import HEAD_ORDERS

FORMAT = "deltanet_ref.trace/1"


class Stage(NamedTuple):
    """A row of the table."""
    name: str
    axes: tuple               # letters of model.tensors.sizes and of _sizes below
    meaning: str
    parameters: tuple = ()    # the tensors of the model that make it
    gradient: bool = True     # whether d.name is recorded


class Traced(NamedTuple):
    """One tensor of one trace."""
    name: str                 # "blk.0.conv", "d.blk.0.conv", "d.blk.0.ssm_a", "logits"
    axes: tuple               # letters; () for the gradient of a parameter
    shape: tuple
    v_heads: VHeads | None    # the axis over the value heads, which stand in grouped order
    meaning: str


# The gradient of mixer_out is d.mid and that of ffn_out is d.out: a sum hands its gradient to both terms.
_DELTA = (
    Stage("attn_norm", ("L", "D"), "RMS norm of the block's input", ("attn_norm.weight",)),
    Stage("qkv", ("L", "QKV"), "projected: all of q, all of k, all of v", ("attn_qkv.weight",)),
    Stage("z", ("L", "H_v", "d_v"), "projected: the output gate before SiLU", ("attn_gate.weight",)),
    Stage("b", ("L", "H_v"), "projected: the write strength before its sigmoid", ("ssm_beta.weight",)),
    Stage("a", ("L", "H_v"), "projected: the step size before its softplus", ("ssm_alpha.weight",)),
    Stage("conv", ("L", "QKV"), "causal convolution of qkv, then SiLU", ("ssm_conv1d.weight",)),
    Stage("conv_state", ("K-1", "QKV"), "the last K-1 rows of qkv, zeros before the first token", gradient=False),
    Stage("q", ("L", "H_k", "d_k"), "conv's q, L2-normalised per head, not scaled"),
    Stage("k", ("L", "H_k", "d_k"), "conv's k, L2-normalised per head"),
    Stage("v", ("L", "H_v", "d_v"), "conv's v"),
    Stage("g", ("L", "H_v"), "log decay, -exp(A_log) softplus(a + dt_bias)", ("ssm_a", "ssm_dt.bias")),
    Stage("beta", ("L", "H_v"), "write strength, sigmoid(b)"),
    Stage("o", ("L", "H_v", "d_v"), "output of the gated delta rule, scale d_k^-0.5 applied"),
    Stage("S", ("H_v", "d_k", "d_v"), "state of the delta rule after the last token", gradient=False),
    Stage("o_gated", ("L", "H_v", "d_v"), "RMS norm of o per head, times SiLU(z)", ("ssm_norm.weight",)),
    Stage("mixer_out", ("L", "D"), "o_gated projected back", ("ssm_out.weight",), gradient=False),
)
_ATTENTION = (
    Stage("attn_norm", ("L", "D"), "RMS norm of the block's input", ("attn_norm.weight",)),
    Stage("q_proj", ("L", "H", "d"), "projected: queries (a head's rows of attn_q: d of the query, d of the gate)",
          ("attn_q.weight",)),
    Stage("gate", ("L", "H", "d"), "projected: the output gate before its sigmoid"),
    Stage("k_proj", ("L", "H_kv", "d"), "projected: keys", ("attn_k.weight",)),
    Stage("v", ("L", "H_kv", "d"), "projected: values, which are the V cache too", ("attn_v.weight",)),
    Stage("q_norm", ("L", "H", "d"), "RMS norm of q_proj per head", ("attn_q_norm.weight",)),
    Stage("k_norm", ("L", "H_kv", "d"), "RMS norm of k_proj per head", ("attn_k_norm.weight",)),
    Stage("q", ("L", "H", "d"), "q_norm rotated to its position, not scaled"),
    Stage("k", ("L", "H_kv", "d"), "k_norm rotated to its position, which is the K cache too"),
    Stage("o", ("L", "H", "d"), "softmax attention"),
    Stage("o_gated", ("L", "H", "d"), "o times sigmoid(gate)"),
    Stage("mixer_out", ("L", "D"), "o_gated projected back", ("attn_output.weight",), gradient=False),
)
_FEED_FORWARD = (
    Stage("mid", ("L", "D"), "the block's input plus mixer_out"),
    Stage("ffn_norm", ("L", "D"), "RMS norm of mid", ("post_attention_norm.weight",)),
    Stage("ffn_gate", ("L", "F"), "projected: the half that goes through SiLU", ("ffn_gate.weight",)),
    Stage("ffn_up", ("L", "F"), "projected: the other half", ("ffn_up.weight",)),
    Stage("ffn_act", ("L", "F"), "SiLU(ffn_gate) times ffn_up"),
    Stage("ffn_out", ("L", "D"), "ffn_act projected back", ("ffn_down.weight",), gradient=False),
    Stage("out", ("L", "D"), "mid plus ffn_out: the block's output"),
)
BLOCKS = {"linear_attention": _DELTA + _FEED_FORWARD, "full_attention": _ATTENTION + _FEED_FORWARD}
BEFORE = (Stage("embed", ("L", "D"), "rows of the embedding", ("token_embd.weight",)),)
AFTER = (
    Stage("output_norm", ("L", "D"), "RMS norm of the last block's output", ("output_norm.weight",)),
    Stage("logits", ("L", "V"), "of the next token", ("output.weight",)),
    Stage("loss", (), "mean cross-entropy in nats: token t predicts token t + 1", gradient=False),
)


def trace_table(config, L):
    """Lists every tensor of a trace of L tokens in network order: dict name -> Traced. Gradients ("d.") come last, from
    the loss back to the embeddings, a parameter's directly after that of the tensor which it makes."""
    size, specs = _sizes(config, L), expected_tensors(config)
    stages = [("", BEFORE)] + [(f"blk.{i}.", BLOCKS[kind]) for i, kind in enumerate(config.layer_types)] + [("", AFTER)]
    rows = [(prefix, stage) for prefix, group in stages for stage in group]
    table = [_traced(prefix + s.name, s, size) for prefix, s in rows]
    for prefix, s in reversed(rows):
        if s.gradient:
            table.append(_traced(f"d.{prefix}{s.name}", s, size))
        for parameter in s.parameters:
            spec = specs.get(prefix + parameter)                           # none of a tied head
            if spec is not None:
                table.append(Traced(f"d.{spec.name}", (), spec.shape, spec.v_heads, "gradient of the parameter"))
    return {t.name: t for t in table}


def _sizes(config, L):
    c = config
    return sizes(c) | {"L": L, "H": c.num_attention_heads, "H_kv": c.num_key_value_heads,
                       "H_k": c.linear_num_key_heads, "d_k": c.linear_key_head_dim, "K-1": c.linear_conv_kernel_dim - 1}


def _traced(name, stage, size):
    axis = next((i for i, letter in enumerate(stage.axes) if letter in ("H_v", "QKV")), None)
    heads = None
    if axis is not None:
        heads = VHeads(axis, 0, 1) if stage.axes[axis] == "H_v" else VHeads(axis, size["QK"], size["d_v"])
    meaning = f"gradient at: {stage.meaning}" if name.startswith("d.") else stage.meaning
    return Traced(name, stage.axes, tuple(size[letter] for letter in stage.axes), heads, meaning)


def order_value_heads(x, traced, config, to):
    """x with its value heads brought to the order `to`, "grouped" or "tiled"; unchanged where it has none."""
    if traced.v_heads is None or config.linear_num_key_heads == config.linear_num_value_heads:
        return x
    return np.take(x, v_head_index(traced, config, to=to), axis=traced.v_heads.axis)


# ---- the file

class Trace(NamedTuple):
    """Named tensors and what they were made from."""
    tensors: dict             # name -> array; in a file that was read: a mapping that reads each when it is asked for
    config: Config
    tokens: list              # of int
    dtype: str                # of the computation
    model: str                # where the parameters came from
    version: str              # the software that wrote it
    head_order: str = "grouped"

    def table(self):
        return trace_table(self.config, len(self.tokens))


def write_trace(path, trace):
    """Writes a .safetensors file: the tensors, and the rest as metadata, each a string (config and tokens are JSON)."""
    metadata = {"format": FORMAT, "config": json.dumps(asdict(trace.config)), "tokens": json.dumps(trace.tokens)}
    metadata |= {field: getattr(trace, field) for field in ("dtype", "model", "version", "head_order")}
    write_safetensors(path, trace.tensors, metadata)


def read_trace(path):
    """Reads a trace. Raises InputError for a file that is no trace or whose metadata cannot be read."""
    file = read_safetensors(path)
    data = file.metadata
    if data.get("format") != FORMAT:
        raise InputError(f"{path}: is no trace: its metadata must say format = {FORMAT} (docs/trace.md tells the rest)")
    try:
        config = json.loads(data["config"])
        config = Config(**config | {key: tuple(config[key]) for key in ("mrope_section", "layer_types")})
        tokens = [int(token) for token in json.loads(data["tokens"])]
        rest = {field: data[field] for field in ("dtype", "model", "version", "head_order")}
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: the metadata of the trace is damaged or incomplete ({error!r})") from None
    if rest["head_order"] not in HEAD_ORDERS:
        raise InputError(f"{path}: head_order is {rest['head_order']!r}; write {' or '.join(HEAD_ORDERS)}")
    return Trace(file, config, tokens, **rest)


# ---- recording

class Watch(NamedTuple):
    """What one call of an operator is given and gives back, by name; None for what is not recorded."""
    arguments: tuple = ()
    results: tuple = ()
    whole: bool = True        # the backward gives the whole gradient of the arguments: nothing else reads them


# operator -> its calls in the order of the forward; "before" is the block's input
_BLOCK_NORMS = [Watch(("before",), ("attn_norm",), whole=False), Watch(("mid",), ("ffn_norm",), whole=False)]
_SWIGLU = [Watch(("ffn_gate", "ffn_up"), ("ffn_act",))]
WATCHED = {
    "linear_attention": {
        "rms_norm": _BLOCK_NORMS,
        "causal_conv1d": [Watch(("qkv",), ("conv", "conv_state"))],
        "l2_norm": [Watch((), ("q",)), Watch((), ("k",))],
        "decay_gate": [Watch(("a", "b"), ("g", "beta"))],
        "gated_delta_rule": [Watch((None, None, "v"), ("o", "S"))],
        "gated_rms_norm": [Watch((None, "z"), ("o_gated",))],
        "swiglu": _SWIGLU,
    },
    "full_attention": {
        "rms_norm": [_BLOCK_NORMS[0], Watch(("q_proj",), ("q_norm",)), Watch(("k_proj",), ("k_norm",)),
                     _BLOCK_NORMS[1]],
        "softmax_attention": [Watch(("q", "k", "v"), ("o",))],
        "sigmoid_gate": [Watch((None, "gate"), ("o_gated",))],
        "swiglu": _SWIGLU,
    },
    "after": {"rms_norm": [Watch(("before",), ("output_norm",))]},
}
# linear maps into the residual stream: what comes out, and where the gradient that goes in belongs
_INTO_STREAM = {"ssm_out.weight": ("mixer_out", "mid"), "attn_output.weight": ("mixer_out", "mid"),
                "ffn_down.weight": ("ffn_out", "out")}


class Labelled(NamedTuple):
    """An operator's cache, on its way to the backward, with the names that belong to the call."""
    watch: Watch
    cache: tuple


class Observer:
    """The operators of a backend; what passes through those in `watched` goes to record(name, array) first."""

    def __init__(self, backend, watched, record):
        self._backend, self._record = backend, record
        self._calls = {op: cycle(calls) for op, calls in watched.items()}

    def __getattr__(self, name):
        operator = getattr(self._backend, name)
        op, _, direction = name.rpartition("_")
        if op not in self._calls or direction not in ("forward", "backward"):
            return operator
        observe = self._forward if direction == "forward" else self._backward
        return lambda *args, **options: observe(op, operator, args, options)

    def embedding_backward(self, dx, *args):
        self._record("d.embed", dx)
        return self._backend.embedding_backward(dx, *args)

    def _forward(self, op, operator, args, options):
        watch = next(self._calls[op])
        *results, cache = operator(*args, **options)
        self._all(watch.arguments + watch.results, args[:len(watch.arguments)] + tuple(results))
        return *results, Labelled(watch, cache)

    def _backward(self, op, operator, args, options):
        *gradients, (watch, cache) = args
        results = operator(*gradients, cache, **options)
        names = watch.results + (watch.arguments if watch.whole else ())
        self._all([name and f"d.{name}" for name in names],
                  gradients + list(results if isinstance(results, tuple) else (results,)))
        return results

    def _all(self, names, arrays):
        for name, array in zip(names, arrays):
            if name is not None and array is not None:
                self._record(name, array)


class ObservedLayer(Layer):
    """A layer that records what its last linear maps add to the residual stream, and the gradients there."""

    def __init__(self, index, config, weights, backend, adapters, record):
        ops = Observer(backend, WATCHED[config.layer_types[index]], record)
        super().__init__(index, config, weights, ops, adapters)
        self._record = record

    def linear_maps_forward(self, tensors, x):
        results, cache = super().linear_maps_forward(tensors, x)
        for tensor, y in zip(tensors, results):
            if tensor in _INTO_STREAM:
                self._record(_INTO_STREAM[tensor][0], y)
        return results, cache

    def linear_maps_backward(self, tensors, gradients, *args, **options):
        for tensor, dy in zip(tensors, gradients):
            if tensor in _INTO_STREAM:
                self._record(f"d.{_INTO_STREAM[tensor][1]}", dy)
        return super().linear_maps_backward(tensors, gradients, *args, **options)


def observed(model, record):
    """The same model, which calls record(full name, array) for all that passes through its operators.

    Arrays have the model's form: batch axis first, value heads tiled. They may be overwritten after the call.
    """
    def recorder(prefix, before):
        def record_one(name, array):
            gradient, name = ("d.", name[2:]) if name.startswith("d.") else ("", name)
            record(gradient + (before if name == "before" else prefix + name), array)
        return record_one

    config, layers = model.config, len(model.layers)
    after = Observer(model.backend, WATCHED["after"], recorder("", f"blk.{layers - 1}.out"))
    twin = Qwen35(config, model.weights, backend=after, tokenizer=model.tokenizer)
    twin.layers = [
        ObservedLayer(i, config, model.weights, model.backend, model.adapters,
                      recorder(f"blk.{i}.", f"blk.{i - 1}.out" if i else "embed")) for i in range(layers)]
    return twin


def trace(model, tokens, backward=False, name="", version=""):
    """Records a forward over one sequence of tokens, and the backward of its loss -> Trace.

    tokens   (L,) int
    name     of the model, version: of this software; for the metadata
    raises   InputError for no tokens, or tokens outside the vocabulary
    """
    tokens = np.asarray(tokens)
    row, table, found = tokens[None], trace_table(model.config, tokens.size), {}

    def record(name, array):
        if name in found or name not in table:
            return
        array = order_value_heads(np.reshape(array, table[name].shape), table[name], model.config, to="grouped")
        found[name] = np.array(array)

    twin = observed(model, record)
    if backward:
        loss, gradients = twin.loss_and_grads(row, row)
        for tensor, gradient in gradients.items():
            record(f"d.{tensor}", gradient)
    else:
        loss = twin.loss(row, row)
    logits = model.backend.linear_forward(found["output_norm"], model.weights[model.head])
    record("logits", logits)
    record("loss", np.asarray(loss, model.dtype))
    if backward:
        _, cache = ops.cross_entropy_forward(logits, np.append(tokens[1:], IGNORED))
        record("d.logits", ops.cross_entropy_backward(1.0, cache))
    tensors = {name: found[name] for name in table if name in found}
    return Trace(tensors, model.config, tokens.tolist(), model.dtype.name, name, version)
