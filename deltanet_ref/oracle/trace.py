"""Every named tensor of a forward, and every gradient of its backward: THE table of names, and how they are recorded.

The model computes as always; its layers pass their stages to an observer (Layer.see), which copies them. docs/trace.md
explains the names, and the file, to those who write one from another implementation.
"""

import json
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from deltanet_ref import ops
from deltanet_ref.errors import InputError
from deltanet_ref.formats.safetensors import read_safetensors, write_safetensors
from deltanet_ref.model.block import block_stages
from deltanet_ref.model.config import Config
from deltanet_ref.model.layers.kind import Stage
from deltanet_ref.model.qwen35 import IGNORED
from deltanet_ref.model.tensors import VHeads, expected_tensors, kinds_of, sizes, v_head_index, v_heads_of
from deltanet_ref.notation import HEAD_ORDERS

FORMAT = "deltanet_ref.trace/1"


class Traced(NamedTuple):
    """One tensor of one trace."""

    name: str  # "blk.0.conv", "d.blk.0.conv", "d.blk.0.ssm_a", "logits"
    axes: tuple  # letters; () for the gradient of a parameter
    shape: tuple
    v_heads: VHeads | None  # the axis over the value heads, which stand in grouped order
    meaning: str


# Stages outside the blocks; model/block.py and model/layers have those of the blocks. The gradient of mixer_out is
# d.mid # and that of ffn_out is d.out: a sum passes its gradient to both terms.
BEFORE = (Stage("embed", ("L", "D"), "rows of the embedding", ("token_embd.weight",)),)
AFTER = (
    Stage("output_norm", ("L", "D"), "RMS norm of the last block's output", ("output_norm.weight",)),
    Stage("logits", ("L", "V"), "of the next token", ("output.weight",)),
    Stage("loss", (), "mean cross-entropy in nats: token t predicts token t + 1", gradient=False),
)


def trace_table(config, L):
    """Lists every tensor of a trace of L tokens in network order: dict name -> Traced. Gradients ("d.") come last, from
    the loss back to the embeddings, a parameter's directly after that of the tensor that it produces."""
    specs, model = expected_tensors(config), sizes(config) | {"L": L}
    groups = [("", BEFORE, model)]
    for i, kinds in enumerate(kinds_of(config)):
        groups.append((f"blk.{i}.", block_stages(*kinds), sizes(config, *kinds) | {"L": L}))
    groups.append(("", AFTER, model))
    rows = [(prefix, stage, size) for prefix, stages, size in groups for stage in stages]
    table = [_traced(prefix + s.name, s, size) for prefix, s, size in rows]
    for prefix, s, size in reversed(rows):
        if s.gradient:
            table.append(_traced(f"d.{prefix}{s.name}", s, size))
        for parameter in s.parameters:
            spec = specs.get(prefix + parameter)  # none of a tied head
            if spec is not None:
                table.append(Traced(f"d.{spec.name}", (), spec.shape, spec.v_heads, "gradient of the parameter"))
    return {t.name: t for t in table}


def stages_of(config):
    """Names of the stages of all kinds of blocks that the model has."""
    return {stage.name for kinds in kinds_of(config) for stage in block_stages(*kinds)}


def _traced(name, stage, size):
    meaning = f"gradient at: {stage.meaning}" if name.startswith("d.") else stage.meaning
    return Traced(name, stage.axes, tuple(size[letter] for letter in stage.axes), v_heads_of(stage, size), meaning)


def order_value_heads(x, traced, config, to):
    """x with its value heads brought to the order `to`, "grouped" or "tiled"; unchanged where it has none."""
    if traced.v_heads is None or config.linear_num_key_heads == config.linear_num_value_heads:
        return x
    return np.take(x, v_head_index(traced, config, to=to), axis=traced.v_heads.axis)


# ---- the file


class Trace(NamedTuple):
    """Named tensors and what they were made from."""

    tensors: dict  # name -> array; of a file: a mapping that reads each on access
    config: Config
    tokens: list  # of int
    dtype: str  # of the computation
    model: str  # where the parameters came from
    version: str  # the software that wrote it
    head_order: str = "grouped"

    def table(self) -> dict:
        """Every tensor that a whole trace of this model and these tokens has: trace_table."""
        return trace_table(self.config, len(self.tokens))


def write_trace(path, trace):
    """Write a .safetensors file: the tensors, and the rest as string metadata (config and tokens as JSON)."""
    metadata = {"format": FORMAT, "config": json.dumps(asdict(trace.config)), "tokens": json.dumps(trace.tokens)}
    metadata |= {field: getattr(trace, field) for field in ("dtype", "model", "version", "head_order")}
    write_safetensors(path, trace.tensors, metadata)


def read_trace(path):
    """Read a trace. Raises InputError for a file that is not a trace, or whose metadata cannot be read."""
    file = read_safetensors(path)
    data = file.metadata
    if data.get("format") != FORMAT:
        raise InputError(f"{path}: is not a trace: its metadata must contain format = {FORMAT} (docs/trace.md)")
    try:
        config = json.loads(data["config"])
        config = Config(**{key: tuple(value) if isinstance(value, list) else value for key, value in config.items()})
        tokens = [int(token) for token in json.loads(data["tokens"])]
        rest = {field: data[field] for field in ("dtype", "model", "version", "head_order")}
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: the metadata of the trace is damaged or incomplete ({error!r})") from None
    if rest["head_order"] not in HEAD_ORDERS:
        raise InputError(f"{path}: head_order is {rest['head_order']!r}; write {' or '.join(HEAD_ORDERS)}")
    return Trace(file, config, tokens, **rest)


# ---- recording


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
        array = np.reshape(model.backend.to_host(array), table[name].shape)
        found[name] = np.array(order_value_heads(array, table[name], model.config, to="grouped"))

    twin = model.observed(record)
    if backward:
        loss, gradients = twin.loss_and_grads(row, row)
        for tensor, gradient in gradients.items():
            record(f"d.{tensor}", gradient)
    else:
        loss = twin.loss(row, row)
    h = model.backend.xp.asarray(found["output_norm"].astype(model.dtype))
    logits = model.backend.to_host(model.backend.linear_forward(h, model.weights[model.head]))
    record("logits", logits)
    record("loss", np.asarray(loss, model.weights.wide_dtype))
    if backward:
        _, cache = ops.cross_entropy_forward(logits, np.append(tokens[1:], IGNORED))
        record("d.logits", ops.cross_entropy_backward(1.0, cache))
    tensors = {name: found[name] for name in table if name in found}
    return Trace(tensors, model.config, tokens.tolist(), model.dtype.name, name, version)
