"""THE tensor table: each tensor's name in GGUF and in HF, its shape, its V-head order, and what its values are.

The model keeps the form of the GGUF file. It differs from HF's form in three ways, each a column of the table:

    V heads     grouped in HF (head h reads key head h // (H_v / H_k)), tiled in GGUF (h % H_k): one axis is permuted
    value       norms hold 1 + w (except ssm_norm), ssm_a holds -exp(A_log)
    shape       the convolution kernel (channels, 1, K) is squeezed to (channels, K)

The rows come from model/layers and model/block.py.
"""
from typing import NamedTuple

import numpy as np

from deltanet_ref.model.block import block_tensors
from deltanet_ref.model.layers import FEED_FORWARDS, MIXERS
from deltanet_ref.model.layers.kind import TensorRow


class VHeads(NamedTuple):
    """An axis over the value heads: `start` entries before them, then H_v heads of `size` entries each."""

    axis: int
    start: int
    size: int


class TensorSpec(NamedTuple):
    """One tensor of one model."""

    name: str                  # GGUF: "blk.0.attn_qkv.weight"
    hf_name: str               # HF:   "model.layers.0.linear_attn.in_proj_qkv.weight"
    shape: tuple               # as GGUF stores it, rows first
    v_heads: VHeads | None     # the axis to permute between grouped and tiled order
    value: str                 # "same", "one_plus", "minus_exp" or "squeeze": GGUF's value from HF's
    linear: bool               # y = x w^T: a LoRA target

    @property
    def is_matrix(self) -> bool:
        """Whether it is a weight matrix, which is quantised and decayed, rather than a vector or the convolution."""
        return len(self.shape) == 2 and self.value != "squeeze"


# outside the blocks; model/layers describes the tensors of each kind of layer, model/block.py the norms between them
_EMBEDDING = TensorRow("token_embd.weight", "model.embed_tokens.weight", ("V", "D"))
_FINAL_NORM = TensorRow("output_norm.weight", "model.norm.weight", ("D",), value="one_plus")
_HEAD = TensorRow("output.weight", "lm_head.weight", ("V", "D"))


def wide_dtype(dtype) -> np.dtype:
    """The dtype of vectors, adapters and gradients of weights in a model of this dtype: float32 for bfloat16."""
    return np.dtype(np.float32) if np.dtype(dtype).name == "bfloat16" else np.dtype(dtype)


def sizes(config, *kinds) -> dict:
    """The letters of shapes and axes for one model, as a dict of ints; kinds: those of the layer."""
    letters = {"0": 0, "1": 1, "V": config.vocab_size, "D": config.hidden_size}
    for kind in kinds:
        letters |= kind.sizes(config)
    return letters


def kinds_of(config) -> list:
    """(mixer, feed-forward) of each block."""
    return [(MIXERS[mixer], FEED_FORWARDS[feed_forward])
            for mixer, feed_forward in zip(config.layer_types, config.feed_forward_types, strict=True)]


def v_heads_of(row, size) -> VHeads | None:
    """The VHeads of a TensorRow or a Stage."""
    return row.v_heads and VHeads(row.v_heads[0], size[row.v_heads[1]], size[row.v_heads[2]])


def expected_tensors(config) -> dict:
    """Lists every tensor of the model: dict GGUF name -> TensorSpec, in network order."""
    def spec(row, size, gguf_prefix="", hf_prefix=""):
        return TensorSpec(gguf_prefix + row.name, hf_prefix + row.hf_name, tuple(size[letter] for letter in row.shape),
                          v_heads_of(row, size), row.value, row.linear)

    model = sizes(config)
    specs = [spec(_EMBEDDING, model)]
    for i, kinds in enumerate(kinds_of(config)):
        size = sizes(config, *kinds)
        specs += [spec(row, size, f"blk.{i}.", f"model.layers.{i}.") for row in block_tensors(*kinds)]
    specs.append(spec(_FINAL_NORM, model))
    if not config.tie_word_embeddings:
        specs.append(spec(_HEAD, model))
    return {s.name: s for s in specs}


def linear_tensors(config):
    """Lists the linear layers, which are the default LoRA targets: dict GGUF name -> TensorSpec, in network order."""
    return {name: spec for name, spec in expected_tensors(config).items() if spec.linear}


def tiled_from_grouped(H_k, H_v, *, size=1, start=0):
    """The index p, int (start + H_v size,), with x_tiled = x_grouped[p].

    Tiled head r H_k + k is grouped head k R + r, with R = H_v / H_k. The first `start` entries (q and k channels) stay
    in place; each head moves as a block of `size` entries.
    """
    heads = np.arange(H_v).reshape(H_k, H_v // H_k).T.reshape(-1)
    return _blocks(heads, size, start)


def grouped_from_tiled(H_k, H_v, *, size=1, start=0):
    """The index p with x_grouped = x_tiled[p], the inverse of tiled_from_grouped."""
    heads = np.arange(H_v).reshape(H_v // H_k, H_k).T.reshape(-1)
    return _blocks(heads, size, start)


def _blocks(heads, size, start):
    rows = start + heads[:, None] * size + np.arange(size)
    return np.concatenate([np.arange(start), rows.reshape(-1)])


def to_gguf_form(x, spec, config):
    """Converts an HF tensor, a float array of the model's dtype, to GGUF's form: value, shape and V-head order."""
    if spec.value == "one_plus":
        x = 1 + x
    elif spec.value == "minus_exp":
        with np.errstate(over="ignore"):        # an infinite rate: the state is forgotten at once
            x = -np.exp(x)
    elif spec.value == "squeeze":
        x = x[:, 0, :]
    if spec.v_heads is None or config.linear_num_key_heads == config.linear_num_value_heads:
        return x
    return np.take(x, v_head_index(spec, config, to="tiled"), axis=spec.v_heads.axis)


def to_hf_form(x, spec, config):
    """Converts a GGUF tensor to HF's form, the inverse of to_gguf_form. x float64, or float32 where spec.value is
    "same"."""
    if spec.v_heads is not None and config.linear_num_key_heads != config.linear_num_value_heads:
        x = np.take(x, v_head_index(spec, config, to="grouped"), axis=spec.v_heads.axis)
    if spec.value == "one_plus":
        return x - 1
    if spec.value == "minus_exp":
        return np.log(-x)
    return x.reshape(hf_shape(spec))


def hf_shape(spec):
    """The shape of the tensor in an HF checkpoint."""
    return (spec.shape[0], 1, spec.shape[1]) if spec.value == "squeeze" else spec.shape


def v_head_index(spec, config, *, to):
    """The index that reorders spec's V-head axis to `to`: "tiled" (GGUF) or "grouped" (HF)."""
    index = {"tiled": tiled_from_grouped, "grouped": grouped_from_tiled}[to]
    return index(config.linear_num_key_heads, config.linear_num_value_heads, size=spec.v_heads.size,
                 start=spec.v_heads.start)
