"""Random models made, saved and run by HF itself against our forward and backward on the same files."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

import deltanet_ref as dr
from deltanet_ref.model.tensors import expected_tensors, to_gguf_form
from tests.peers import hf_models
from tests.peers.hf_models import SHAPES
from tests.tolerances import relative

FLOAT64 = 1e-11  # two float64 computations of different order; measured: logits 5e-15, gradients 5e-14
FLOAT32 = 4e-6  # our float32 against HF's float64; measured 1.2e-6, HF's own float32 1.7e-6
every_shape = pytest.mark.parametrize("name", SHAPES)


def tokens_of(model, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, shape)


def saved(name, directory):
    """HF's model of one of the SHAPES, saved by HF in float32 -> the same values in HF's float64 code."""
    hf = hf_models.random_model(SHAPES[name], seed=list(SHAPES).index(name))
    hf.save_pretrained(directory)
    return hf_models.in_float64(hf)


def logits_of(hf, tokens):
    with torch.no_grad():
        return hf(torch.tensor(tokens), use_cache=False).logits.numpy()


def in_gguf_form(gradient, spec, model):
    """HF's gradient as that of the model's tensor: 1 + w moves as w; for a = -exp(A_log), da = dA_log / a."""
    moved = to_gguf_form(gradient, spec._replace(value="squeeze" if spec.value == "squeeze" else "same"), model.config)
    return moved / model.weights[spec.name] if spec.value == "minus_exp" else moved


def assert_gradients(ours, theirs, model):
    specs = expected_tensors(model.config)
    assert set(ours) == set(specs) and len(theirs) == len(specs)
    for name, spec in specs.items():
        assert theirs[spec.hf_name].any(), f"{spec.hf_name} has no gradient: the comparison would be empty"
        assert relative(ours[name], in_gguf_form(theirs[spec.hf_name], spec, model)) < FLOAT64, name


class OnlyFloat64(TorchDispatchMode):
    """Raises when any operation of torch gives a floating-point result that is not float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                assert x.dtype == torch.float64, f"{function} gives {x.dtype}"
        return out


def test_the_other_side_computes_in_float64_throughout():
    hf = hf_models.in_float64(hf_models.random_model(SHAPES["H_v = 2 H_k"], seed=1))
    tokens = tokens_of(hf, 2, 70)
    with OnlyFloat64():
        hf_models.logits_loss_and_grads(hf, tokens, tokens, np.ones_like(tokens))


@every_shape
@pytest.mark.parametrize("length", [1, 6, 131])
def test_hidden_states_and_logits_equal_hf(name, length, tmp_path):
    hf = saved(name, tmp_path)
    tokens = tokens_of(hf, 2, length)
    theirs, logits = hf_models.hidden_states(hf, tokens), logits_of(hf, tokens)
    model = dr.load_model(tmp_path, dtype="float64")
    for i, (h, other) in enumerate(zip(model.hidden_states(tokens), theirs, strict=True)):
        assert relative(h, other) < FLOAT64, i
    assert relative(model.logits(tokens), logits) < FLOAT64
    assert relative(dr.load_model(tmp_path).logits(tokens), logits) < FLOAT32


@every_shape
def test_loss_and_gradient_of_every_parameter_equal_hf(name, tmp_path):
    """131 is two chunks of the delta rule and three tokens; a fifth of the labels is ignored."""
    hf = saved(name, tmp_path)
    tokens = tokens_of(hf, 2, 131)
    labels = np.where(np.random.default_rng(1).random(tokens.shape) < 0.2, -100, tokens)
    _, loss, theirs = hf_models.logits_loss_and_grads(hf, tokens, labels)
    model = dr.load_model(tmp_path, dtype="float64")
    ours, grads = model.loss_and_grads(tokens, labels)
    assert abs(ours / loss - 1) < FLOAT64 and abs(model.loss(tokens, labels) / loss - 1) < FLOAT64
    assert_gradients(grads, theirs, model)


@every_shape
def test_right_padded_batches_equal_hf_with_its_attention_mask(name, tmp_path):
    """HF sees other tokens in the padding than we do."""
    hf = saved(name, tmp_path)
    lengths = np.array([77, 5, 64])
    mask = (np.arange(77) < lengths[:, None]).astype(int)
    tokens, other = tokens_of(hf, 3, 77), tokens_of(hf, 3, 77, seed=2)
    labels = np.where(mask, tokens, -100)
    logits, loss, theirs = hf_models.logits_loss_and_grads(hf, np.where(mask, tokens, other), labels, mask)
    model = dr.load_model(tmp_path, dtype="float64")
    ours = model.logits(tokens, lengths=lengths)
    for row, n in enumerate(lengths):
        assert relative(ours[row, :n], logits[row, :n]) < FLOAT64
    ours, grads = model.loss_and_grads(tokens, labels, lengths=lengths)
    assert abs(ours / loss - 1) < FLOAT64
    assert_gradients(grads, theirs, model)


@pytest.mark.parametrize("name", ["H_v = H_k", "H_v = 3 H_k"])
def test_prefill_and_steps_equal_hf_with_its_cache(name, tmp_path):
    """HF decodes by its recurrent form with cached states, as we do."""
    hf = saved(name, tmp_path)
    tokens = tokens_of(hf, 80)[None]
    model, start = dr.load_model(tmp_path, dtype="float64"), 71
    ours, state = model.prefill(tokens[:, :start])
    with torch.no_grad():
        out = hf(torch.tensor(tokens[:, :start]), use_cache=True)
        for t in range(start, 80):
            assert relative(ours, out.logits[:, -1].numpy()) < FLOAT64, t
            out = hf(torch.tensor(tokens[:, t : t + 1]), past_key_values=out.past_key_values, use_cache=True)
            ours, state = model.step(tokens[:, t], state)
    assert relative(ours, out.logits[:, -1].numpy()) < FLOAT64


def test_bfloat16_checkpoints_in_several_files_are_read_as_hf_reads_them(tmp_path):
    hf = hf_models.random_model(SHAPES["H_v = 2 H_k"], seed=5, dtype=torch.bfloat16)
    hf.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    tokens = tokens_of(hf, 2, 67)
    theirs = logits_of(hf_models.in_float64(hf), tokens)
    assert relative(dr.load_model(tmp_path, dtype="float64").logits(tokens), theirs) < FLOAT64


# ---- the multimodal checkpoint

VISION = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, num_position_embeddings=16)


def save_multimodal(text, directory):
    """Saves HF's multimodal model with the values of the text model in it, and a block for multi-token prediction."""
    config = Qwen3_5Config(
        text_config=text.config.to_dict(),
        tie_word_embeddings=text.config.tie_word_embeddings,
        vision_config=VISION | {"out_hidden_size": text.config.hidden_size},
    )
    model = Qwen3_5ForConditionalGeneration(config).float()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["mtp.fc.weight"] = torch.ones(text.config.hidden_size, 2 * text.config.hidden_size)
    tensors["mtp.layers.0.mlp.gate_proj.weight"] = torch.ones(5, 3)
    save_file(tensors, file, {"format": "pt"})
    return list(tensors)


@pytest.mark.parametrize("name", ["H_v = H_k", "H_v = 3 H_k"])
def test_the_text_part_of_hfs_multimodal_checkpoint_gives_the_logits_and_gradients_of_the_text_model(name, tmp_path):
    text = hf_models.random_model(SHAPES[name], seed=7)
    names = save_multimodal(text, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3_5"
    assert "model.language_model.embed_tokens.weight" in names and any(n.startswith("model.visual.") for n in names)
    tokens = tokens_of(text, 2, 67)
    logits, loss, theirs = hf_models.logits_loss_and_grads(hf_models.in_float64(text), tokens, tokens)
    model = dr.load_model(tmp_path, dtype="float64")
    assert sorted(note.split()[1] for note in model.notes) == ["multi-token", "vision"]
    assert relative(model.logits(tokens), logits) < FLOAT64
    _, grads = model.loss_and_grads(tokens, tokens)
    assert_gradients(grads, theirs, model)


# ---- the table by which gradients were compared, itself


def test_the_table_puts_the_value_heads_where_the_formula_says(tmp_path):
    """Tiled head h reads key head h % H_k, so it is HF's head (h % H_k) (H_v / H_k) + h // H_k.

    Checked without the table for the rows of attn_qkv, the columns of ssm_out, and ssm_a with its chain rule.
    """
    hf = saved("H_v = 3 H_k", tmp_path)
    tokens = tokens_of(hf, 1, 70)
    _, _, theirs = hf_models.logits_loss_and_grads(hf, tokens, tokens)
    model = dr.load_model(tmp_path, dtype="float64")
    _, ours = model.loss_and_grads(tokens, tokens)
    H_k, H_v, d_k, d_v = 2, 6, 8, 13
    qkv, out, dA_log = (
        theirs[f"model.layers.1.linear_attn.{name}"] for name in ("in_proj_qkv.weight", "out_proj.weight", "A_log")
    )
    A_log = hf.model.layers[1].linear_attn.A_log.detach().numpy()
    q_and_k = 2 * H_k * d_k
    assert relative(ours["blk.1.attn_qkv.weight"][:q_and_k], qkv[:q_and_k]) < FLOAT64
    for h in range(H_v):
        g = (h % H_k) * (H_v // H_k) + h // H_k
        tiled, grouped = slice(h * d_v, (h + 1) * d_v), slice(g * d_v, (g + 1) * d_v)
        assert relative(ours["blk.1.attn_qkv.weight"][q_and_k:][tiled], qkv[q_and_k:][grouped]) < FLOAT64
        assert relative(ours["blk.1.ssm_out.weight"][:, tiled], out[:, grouped]) < FLOAT64
        assert abs(ours["blk.1.ssm_a"][h] * -np.exp(A_log[g]) / dA_log[g] - 1) < FLOAT64
