"""A new mixer and a new feed-forward are a module each and a registry line: everything else derives from the
description.

The mixer is OLMo-Hybrid's variant of the delta rule, beta = 2 sigmoid(b) from separate projections without a
convolution; the feed-forward squares its hidden features. No module of the package knows of either.
"""

import json
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

import deltanet_ref as dr
from deltanet_ref import ops
from deltanet_ref.errors import InputError
from deltanet_ref.model.config import Config
from deltanet_ref.model.convert import open_base, write_base
from deltanet_ref.model.layers import FEED_FORWARDS, MIXERS
from deltanet_ref.model.layers.gated_deltanet import DeltaNetFields
from deltanet_ref.model.layers.kind import Kind, Stage, TensorRow
from deltanet_ref.model.layers.swiglu import SwigluFields
from deltanet_ref.model.qwen35 import Qwen35
from deltanet_ref.model.tensors import expected_tensors, hf_shape, to_hf_form
from deltanet_ref.model.weights import Weights
from deltanet_ref.oracle.trace import trace
from tests.tolerances import relative

# ---- what somebody would write in model/layers/olmo_delta.py

PROJECTIONS = tuple(f"olmo_{letter}.weight" for letter in "qkvba")


class OlmoState(NamedTuple):
    S: np.ndarray


def olmo_forward(x, layer, *, shared=None, state=None, cu_seqlens=None):
    c, ops = layer.config, layer.ops
    (q, k, v, b, a), projections = layer.linear_maps_forward(PROJECTIONS, x)
    q, k = (y.reshape(*x.shape[:2], c.linear_num_key_heads, -1) for y in (q, k))
    q, q_norm = ops.l2_norm_forward(q)
    k, k_norm = ops.l2_norm_forward(k)
    g, half_beta, gate = ops.decay_gate_forward(a, b, ops.xp.log(-layer["olmo_a"]), layer["olmo_dt"])
    o, S, delta = ops.gated_delta_rule_forward(
        q,
        k,
        v.reshape(*x.shape[:2], c.linear_num_value_heads, -1),
        g=g,
        beta=2 * half_beta,
        S0=state and state.S,
        head_order="tiled",
        cu_seqlens=cu_seqlens,
    )
    layer.see(q=q, k=k, g=g, beta=2 * half_beta, o=o, S=S)
    o, norm = ops.rms_norm_forward(o, layer["olmo_norm"], c.rms_norm_eps)
    y, out = layer.linear_forward("olmo_out.weight", o.reshape(*x.shape[:2], -1))
    layer.see(mixer_out=y)
    return y, OlmoState(S), (projections, q_norm, k_norm, gate, delta, norm, out)


def olmo_backward(dy, layer, cache, grads, need_dx=True):
    ops, rows = layer.ops, (*dy.shape[:2], -1)
    projections, q_norm, k_norm, gate, delta, norm, out = cache
    do = layer.linear_backward("olmo_out.weight", dy, out, grads)
    do, dw = ops.rms_norm_backward(do.reshape(norm.x.shape), norm, need_dw=grads.base)
    dq, dk, dv, dg, dbeta, _ = ops.gated_delta_rule_backward(do, None, delta)
    layer.see_gradients(q=dq, k=dk, g=dg, beta=dbeta, o=do)
    da, db, dA_log, ddt = ops.decay_gate_backward(dg, 2 * dbeta, gate, need_dw=grads.base)
    dq, dk = ops.l2_norm_backward(dq, q_norm), ops.l2_norm_backward(dk, k_norm)
    if grads.base:
        for name, d in (("olmo_norm", dw), ("olmo_a", dA_log / layer["olmo_a"]), ("olmo_dt", ddt)):
            grads.add(layer.name(name), d)
    return layer.linear_maps_backward(
        PROJECTIONS, [d.reshape(rows) for d in (dq, dk, dv, db, da)], projections, grads, need_dx
    )


OLMO = Kind(
    fields=DeltaNetFields,
    sizes=MIXERS["linear_attention"].sizes,
    forward=olmo_forward,
    backward=olmo_backward,
    output="olmo_out.weight",
    tensors=(
        TensorRow("olmo_q.weight", "linear_attn.q_proj.weight", ("KEY", "D"), linear=True),
        TensorRow("olmo_k.weight", "linear_attn.k_proj.weight", ("KEY", "D"), linear=True),
        TensorRow("olmo_v.weight", "linear_attn.v_proj.weight", ("VALUE", "D"), (0, "0", "d_v"), linear=True),
        TensorRow("olmo_b.weight", "linear_attn.b_proj.weight", ("H_v", "D"), (0, "0", "1"), linear=True),
        TensorRow("olmo_a.weight", "linear_attn.a_proj.weight", ("H_v", "D"), (0, "0", "1"), linear=True),
        TensorRow("olmo_a", "linear_attn.A_log", ("H_v",), (0, "0", "1"), value="minus_exp"),
        TensorRow("olmo_dt", "linear_attn.dt_bias", ("H_v",), (0, "0", "1")),
        TensorRow("olmo_norm", "linear_attn.o_norm.weight", ("d_v",)),
        TensorRow("olmo_out.weight", "linear_attn.o_proj.weight", ("D", "VALUE"), (1, "0", "d_v"), linear=True),
    ),
    stages=(
        Stage("q", ("L", "H_k", "d_k"), "unit queries", ("olmo_q.weight",)),
        Stage("k", ("L", "H_k", "d_k"), "unit keys", ("olmo_k.weight",)),
        Stage("g", ("L", "H_v"), "log decay", ("olmo_a", "olmo_dt"), v_heads=(1, "0", "1")),
        Stage("beta", ("L", "H_v"), "2 sigmoid(b)", v_heads=(1, "0", "1")),
        Stage("o", ("L", "H_v", "d_v"), "output of the rule", v_heads=(1, "0", "1")),
        Stage("S", ("H_v", "d_k", "d_v"), "state after the last token", gradient=False, v_heads=(0, "0", "1")),
        Stage("mixer_out", ("L", "D"), "projected back", ("olmo_out.weight",), gradient=False),
    ),
)
OLMO = OLMO._replace(sizes=lambda c, sizes=OLMO.sizes: sizes(c) | {"KEY": c.linear_key_dim})


# ---- and in model/layers/squared.py


def squared_forward(x, layer):
    h, up = layer.linear_forward("sq_up.weight", x)
    y, down = layer.linear_forward("sq_down.weight", h * h)
    layer.see(sq_act=h * h, ffn_out=y)
    return y, (up, h, down)


def squared_backward(dy, layer, cache, grads, need_dx=True):
    up, h, down = cache
    d = layer.linear_backward("sq_down.weight", dy, down, grads)
    layer.see_gradients(sq_act=d)
    return layer.linear_backward("sq_up.weight", 2 * h * d, up, grads, need_dx)


SQUARED = Kind(
    fields=SwigluFields,
    sizes=lambda c: {"F": c.intermediate_size},
    forward=squared_forward,
    backward=squared_backward,
    output="sq_down.weight",
    tensors=(
        TensorRow("sq_up.weight", "mlp.up.weight", ("F", "D"), linear=True),
        TensorRow("sq_down.weight", "mlp.down.weight", ("D", "F"), linear=True),
    ),
    stages=(
        Stage("sq_act", ("L", "F"), "squared", ("sq_up.weight",)),
        Stage("ffn_out", ("L", "D"), "projected back", ("sq_down.weight",), gradient=False),
    ),
)


# ---- the proof

IDS = np.random.default_rng(0).integers(0, 61, (1, 71))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(MIXERS, "olmo_delta", OLMO)
    monkeypatch.setitem(FEED_FORWARDS, "squared", SQUARED)


@pytest.fixture
def config(registered):
    return Config(
        vocab_size=61,
        hidden_size=22,
        intermediate_size=26,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=8,
        linear_value_head_dim=5,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6,
        rope_theta=1e5,
        partial_rotary_factor=0.5,
        mrope_section=(2, 1, 1),
        layer_types=("linear_attention", "olmo_delta", "full_attention"),
        mlp_layer_types=("squared", "dense", "squared"),
        tie_word_embeddings=False,
        max_position_embeddings=99,
    )


@pytest.fixture
def model(config):
    return Qwen35(config, Weights(config, tensors(config), "float64", ops))


def tensors(config):
    rng, stored = np.random.default_rng(1), {}
    for name, spec in expected_tensors(config).items():
        x = rng.standard_normal(spec.shape)
        stored[name] = (
            -np.exp(0.5 * x)
            if spec.value == "minus_exp"
            else 1 + 0.1 * x
            if x.ndim == 1
            else x
            if name == "token_embd.weight"
            else 1.5 * x / np.sqrt(spec.shape[-1])
        )
    return stored


def test_the_tensor_table_and_the_lora_targets_hold_what_the_description_says(config, model):
    specs = expected_tensors(config)
    assert specs["blk.1.olmo_v.weight"].shape == (30, 22) and "blk.1.attn_qkv.weight" not in specs
    assert specs["blk.0.sq_up.weight"].hf_name == "model.layers.0.mlp.up.weight" and "blk.0.ffn_up.weight" not in specs
    adapter = dr.new_adapter(model, rank=2)
    assert {"blk.1.olmo_b.weight", "blk.2.sq_down.weight", "blk.1.ffn_up.weight"} <= set(adapter.targets)


def test_gradients_are_those_of_the_loss(model):
    """Every tensor's directional derivative against central differences of fourth order: at h = 1e-6 the rounding of
    the losses is eps / h = 2e-10 of the loss, which has a factor of 50 in hand, and the truncation is below it: the
    sharpest step, the L2 norm of keys as short as 1e-3, gives (h / 1e-3)^4 = 1e-12."""
    loss, grads = model.loss_and_grads(IDS, IDS)
    assert set(grads) == set(model.weights)
    rng, h = np.random.default_rng(2), 1e-6
    for name, before in {name: model.weights[name].copy() for name in model.weights}.items():
        direction = rng.standard_normal(before.shape)
        if name == "token_embd.weight":
            direction[np.setdiff1d(np.arange(61), IDS)] = 0
        slope = 0.0
        for steps, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            model.weights[name] = before + steps * h * direction
            slope += weight * model.loss(IDS, IDS) / (12 * h)
        model.weights[name] = before
        assert abs(slope - (grads[name] * direction).sum()) < 1e-8 * loss, name


@pytest.mark.parametrize("keep", ["products", "inputs"])
def test_recomputing_gives_the_same_gradients_of_an_adapter(model, keep):
    adapter = dr.new_adapter(model, rank=2)
    for name, factor in adapter.tensors.items():
        factor[:] = np.random.default_rng(len(name)).standard_normal(factor.shape) / 4
    model.attach(adapter)
    _, want = model.loss_and_grads(IDS, IDS, wrt="lora", keep="everything")
    _, grads = model.loss_and_grads(IDS, IDS, wrt="lora", keep=keep)
    assert set(grads) == set(adapter.tensors)
    for name in want:
        np.testing.assert_array_equal(grads[name], want[name], err_msg=name)
        assert want[name].any(), name


def test_prefill_and_steps_give_the_logits_of_the_full_forward(model):
    """By the recurrence or by chunks: float64 rounding of sums over up to 71 tokens, 1e-12 with a factor of 100 in
    hand."""
    logits, state = model.logits(IDS)[0], None
    for piece in (IDS[0, :30], IDS[0, 30:60], *IDS[0, 60:].tolist()):
        last, state = (model.prefill if np.ndim(piece) else model.step)(piece, state)
    assert relative(last, logits[-1]) < 1e-12
    assert isinstance(state.blocks[1], OlmoState)


def test_the_trace_has_its_stages_and_gradients(model):
    found = trace(model, IDS[0], backward=True)
    table = found.table()
    assert list(found.tensors) == list(table)
    assert {name: x.shape for name, x in found.tensors.items()} == {name: t.shape for name, t in table.items()}
    assert {"blk.1.beta", "d.blk.1.o", "d.blk.1.olmo_a", "d.blk.0.sq_act"} <= set(table) and "blk.1.conv" not in table
    assert found.tensors["blk.1.beta"].max() > 1  # 2 sigmoid


def write_hf(directory, config, stored):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    save_file(
        {
            spec.hf_name: np.ascontiguousarray(to_hf_form(stored[name], spec, config).reshape(hf_shape(spec)))
            for name, spec in expected_tensors(config).items()
        },
        directory / "model.safetensors",
    )


def test_a_checkpoint_is_loaded_and_converted(tmp_path, model, config):
    """An HF directory with these layers; as GGUF, whose architecture has no name for them, it is refused."""
    write_hf(tmp_path / "hf", config, tensors(config))
    loaded = dr.load_model(tmp_path / "hf", backend="numpy", dtype="float64")
    assert loaded.config == config
    want = model.logits(IDS)
    assert relative(loaded.logits(IDS), want) < 1e-12  # log and exp of ssm_a, 1 + w and back
    write_base(open_base(tmp_path / "hf"), tmp_path / "again", "f32")
    again = dr.load_model(tmp_path / "again", backend="numpy", dtype="float64")
    assert relative(again.logits(IDS), want) < 1e-5  # float32 matrices, 2^-24 a value over three layers
    with pytest.raises(InputError, match="cannot hold layers of type olmo_delta, squared: write an HF directory"):
        write_base(open_base(tmp_path / "hf"), tmp_path / "m.gguf")
