"""THE tensor table: each tensor's name in GGUF and in HF, its shape, its V-head order, and what its values are.

The model keeps the form of the GGUF file. From HF's form it differs in three ways, each a column of the table:

    V heads     grouped in HF (head h reads key head h // (H_v / H_k)), tiled in GGUF (h % H_k): an axis is permuted
    value       norms hold 1 + w (except ssm_norm), ssm_a holds -exp(A_log)
    shape       the convolution's kernel (channels, 1, K) is squeezed to (channels, K)
"""
from typing import NamedTuple

import numpy as np


class VHeads(NamedTuple):
    """An axis that runs over the value heads: `start` entries before them, then H_v heads of `size` entries each."""

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


# GGUF name, HF name, shape, V heads (axis, start, size), value. Letters: see `sizes`. Network order.
_EMBEDDING = ("token_embd.weight", "model.embed_tokens.weight", ("V", "D"), None, "same")
_DELTA = (
    ("attn_norm.weight", "input_layernorm.weight", ("D",), None, "one_plus"),
    ("attn_qkv.weight", "linear_attn.in_proj_qkv.weight", ("QKV", "D"), (0, "QK", "d_v"), "same"),
    ("attn_gate.weight", "linear_attn.in_proj_z.weight", ("VALUE", "D"), (0, "0", "d_v"), "same"),
    ("ssm_alpha.weight", "linear_attn.in_proj_a.weight", ("H_v", "D"), (0, "0", "1"), "same"),
    ("ssm_beta.weight", "linear_attn.in_proj_b.weight", ("H_v", "D"), (0, "0", "1"), "same"),
    ("ssm_conv1d.weight", "linear_attn.conv1d.weight", ("QKV", "K"), (0, "QK", "d_v"), "squeeze"),
    ("ssm_a", "linear_attn.A_log", ("H_v",), (0, "0", "1"), "minus_exp"),
    ("ssm_dt.bias", "linear_attn.dt_bias", ("H_v",), (0, "0", "1"), "same"),
    ("ssm_norm.weight", "linear_attn.norm.weight", ("d_v",), None, "same"),
    ("ssm_out.weight", "linear_attn.out_proj.weight", ("D", "VALUE"), (1, "0", "d_v"), "same"),
)
_ATTENTION = (
    ("attn_norm.weight", "input_layernorm.weight", ("D",), None, "one_plus"),
    ("attn_q.weight", "self_attn.q_proj.weight", ("2 Q", "D"), None, "same"),       # per head: d query, d gate rows
    ("attn_k.weight", "self_attn.k_proj.weight", ("KV", "D"), None, "same"),
    ("attn_v.weight", "self_attn.v_proj.weight", ("KV", "D"), None, "same"),
    ("attn_q_norm.weight", "self_attn.q_norm.weight", ("d",), None, "one_plus"),
    ("attn_k_norm.weight", "self_attn.k_norm.weight", ("d",), None, "one_plus"),
    ("attn_output.weight", "self_attn.o_proj.weight", ("D", "Q"), None, "same"),
)
_FEED_FORWARD = (
    ("post_attention_norm.weight", "post_attention_layernorm.weight", ("D",), None, "one_plus"),
    ("ffn_gate.weight", "mlp.gate_proj.weight", ("F", "D"), None, "same"),
    ("ffn_up.weight", "mlp.up_proj.weight", ("F", "D"), None, "same"),
    ("ffn_down.weight", "mlp.down_proj.weight", ("D", "F"), None, "same"),
)
_LAYERS = {"linear_attention": _DELTA + _FEED_FORWARD, "full_attention": _ATTENTION + _FEED_FORWARD}
_FINAL_NORM = ("output_norm.weight", "model.norm.weight", ("D",), None, "one_plus")
_HEAD = ("output.weight", "lm_head.weight", ("V", "D"), None, "same")

_LINEAR = ("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_out", "attn_q", "attn_k", "attn_v", "attn_output",
           "ffn_gate", "ffn_up", "ffn_down")


def sizes(config):
    """The letters of the table for one model, as a dict of ints."""
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return {"0": 0, "1": 1, "V": config.vocab_size, "D": config.hidden_size, "F": config.intermediate_size,
            "d": d, "Q": heads * d, "2 Q": 2 * heads * d, "KV": kv_heads * d,
            "H_v": config.linear_num_value_heads, "d_v": config.linear_value_head_dim,
            "QK": 2 * config.linear_key_dim, "VALUE": config.linear_value_dim, "QKV": config.conv_channels,
            "K": config.linear_conv_kernel_dim}


def expected_tensors(config):
    """Lists every tensor of the model: dict GGUF name -> TensorSpec, in network order."""
    size = sizes(config)

    def spec(row, gguf_prefix="", hf_prefix=""):
        name, hf_name, shape, v_heads, value = row
        return TensorSpec(gguf_prefix + name, hf_prefix + hf_name, tuple(size[s] for s in shape),
                          v_heads and VHeads(v_heads[0], size[v_heads[1]], size[v_heads[2]]),
                          value, name.removesuffix(".weight") in _LINEAR)

    specs = [spec(_EMBEDDING)]
    for i, layer_type in enumerate(config.layer_types):
        specs += [spec(row, f"blk.{i}.", f"model.layers.{i}.") for row in _LAYERS[layer_type]]
    specs.append(spec(_FINAL_NORM))
    if not config.tie_word_embeddings:
        specs.append(spec(_HEAD))
    return {s.name: s for s in specs}


def linear_tensors(config):
    """Lists the linear layers, which are the default LoRA targets: dict GGUF name -> TensorSpec, in network order."""
    return {name: spec for name, spec in expected_tensors(config).items() if spec.linear}


def tiled_from_grouped(H_k, H_v, *, size=1, start=0):
    """Index p, int (start + H_v size,), with x_tiled = x_grouped[p].

    Tiled head r H_k + k is grouped head k R + r, with R = H_v / H_k. The first `start` entries (q and k channels) stay;
    each head moves as a block of `size` entries.
    """
    heads = np.arange(H_v).reshape(H_k, H_v // H_k).T.reshape(-1)
    return _blocks(heads, size, start)


def grouped_from_tiled(H_k, H_v, *, size=1, start=0):
    """Index p with x_grouped = x_tiled[p], the inverse of tiled_from_grouped."""
    heads = np.arange(H_v).reshape(H_v // H_k, H_k).T.reshape(-1)
    return _blocks(heads, size, start)


def _blocks(heads, size, start):
    rows = start + heads[:, None] * size + np.arange(size)
    return np.concatenate([np.arange(start), rows.reshape(-1)])


def to_gguf_form(x, spec, config):
    """Brings an HF tensor, a float array of the model's dtype, to GGUF's form: value, shape and V-head order."""
    if spec.value == "one_plus":
        x = 1 + x
    elif spec.value == "minus_exp":
        with np.errstate(over="ignore"):        # a decay to nothing at once
            x = -np.exp(x)
    elif spec.value == "squeeze":
        x = x[:, 0, :]
    if spec.v_heads is None or config.linear_num_key_heads == config.linear_num_value_heads:
        return x
    return np.take(x, v_head_index(spec, config, to="tiled"), axis=spec.v_heads.axis)


def to_hf_form(x, spec, config):
    """Brings a GGUF tensor to HF's form, the inverse of to_gguf_form. x float64, or float32 where spec.value is "same"."""
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
    """The index that brings spec's V-head axis to the order `to`: "tiled" (GGUF) or "grouped" (HF)."""
    index = {"tiled": tiled_from_grouped, "grouped": grouped_from_tiled}[to]
    return index(config.linear_num_key_heads, config.linear_num_value_heads, size=spec.v_heads.size,
                 start=spec.v_heads.start)
