"""Loading: HF and GGUF become the same tensors, quantised bytes stay quantised, and what is wrong is listed at once."""

import json
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type, GGUFReader, dequantize
from safetensors.numpy import load_file, save_file

from deltanet_ref import ops
from deltanet_ref.errors import InputError
from deltanet_ref.formats import quants
from deltanet_ref.formats.gguf import read_gguf, write_gguf
from deltanet_ref.model.config import Config
from deltanet_ref.model.load import weights_from_gguf, weights_from_hf
from deltanet_ref.model.tensors import expected_tensors, grouped_from_tiled, hf_shape, tiled_from_grouped
from tests.paths import FIXTURES

MODELS = ["eq", "grouped"]
DELTA, ATTENTION = "linear_attention", "full_attention"


def small_config(H_k=2, ratio=3, layer_types=(DELTA, ATTENTION, ATTENTION, DELTA, DELTA), tied=False):
    """A model whose sizes differ, d_k and d_v included."""
    return Config(
        vocab_size=67,
        hidden_size=20,
        intermediate_size=28,
        num_hidden_layers=len(layer_types),
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=16,
        linear_num_key_heads=H_k,
        linear_num_value_heads=H_k * ratio,
        linear_key_head_dim=8,
        linear_value_head_dim=5,
        linear_conv_kernel_dim=4,
        rms_norm_eps=2.0**-20,
        rope_theta=5000.0,
        partial_rotary_factor=0.25,
        mrope_section=(1, 1, 0),
        layer_types=tuple(layer_types),
        tie_word_embeddings=tied,
        max_position_embeddings=300,
    )


def random_tensors(config, seed=0):
    """Float32 tensors in GGUF's form, by GGUF name."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.standard_normal(spec.shape).astype(np.float32) for name, spec in expected_tensors(config).items()
    }
    return {name: -np.abs(x) if name.endswith("ssm_a") else x for name, x in tensors.items()}


def write_model(path, config, tensors, **metadata):
    write_gguf(path, config.to_gguf_metadata() | metadata, tensors)
    return read_gguf(path)


def write_hf(directory, config, tensors, prefix="model.", wrapped=False):
    directory.mkdir()
    text = {"model_type": "qwen3_5_text"} | {
        key: getattr(config, key)
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "layer_types",
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "tie_word_embeddings",
        )
    }
    config_json = {"model_type": "qwen3_5", "text_config": text} if wrapped else text
    (directory / "config.json").write_text(json.dumps(config_json))
    save_file(
        {prefix + name.removeprefix("model.") if name.startswith("model.") else name: x for name, x in tensors.items()},
        directory / "model.safetensors",
    )
    return directory


def random_hf_tensors(config, seed=0):
    rng = np.random.default_rng(seed)
    return {
        spec.hf_name: rng.standard_normal(hf_shape(spec)).astype(np.float32)
        for spec in expected_tensors(config).values()
    }


def tile(x, H_k, ratio, size, start=0):
    """Rows of x, V heads grouped, brought to the tiled order head by head: the definition, written as a loop."""
    out = x.copy()
    for key_head in range(H_k):
        for r in range(ratio):
            grouped, tiled = start + (key_head * ratio + r) * size, start + (r * H_k + key_head) * size
            out[tiled : tiled + size] = x[grouped : grouped + size]
    return out


@pytest.mark.parametrize("model", MODELS)
def test_an_hf_directory_becomes_the_file_of_the_official_converter(model):
    _, ours, notes = weights_from_hf(FIXTURES / model / "hf", "float32", ops)
    official = {t.name: t.data for t in GGUFReader(FIXTURES / model / f"{model}-f32.gguf").tensors}
    assert notes == [] and set(ours) == set(official)
    for name, want in official.items():
        if name.endswith("ssm_a"):  # exp differs between libraries by one unit in the last place
            np.testing.assert_array_max_ulp(ours[name], want.reshape(ours[name].shape), maxulp=1)
        else:
            np.testing.assert_array_equal(ours[name], want.reshape(ours[name].shape), err_msg=name)


@pytest.mark.parametrize("H_k, ratio", [(4, 1), (3, 2), (2, 3)])
def test_hf_tensors_are_transformed_as_defined(H_k, ratio, tmp_path):
    config = small_config(H_k, ratio)
    hf = random_hf_tensors(config)
    loaded, weights, _ = weights_from_hf(write_hf(tmp_path / "hf", config, hf), "float64", ops)
    assert loaded.linear_num_value_heads == H_k * ratio
    wide = {name: x.astype(np.float64) for name, x in hf.items()}
    delta, attention = "model.layers.3.linear_attn.", "model.layers.2."
    q_and_k, d_v = 2 * H_k * 8, 5
    expected = {
        "blk.3.attn_qkv.weight": tile(wide[delta + "in_proj_qkv.weight"], H_k, ratio, d_v, q_and_k),
        "blk.3.attn_gate.weight": tile(wide[delta + "in_proj_z.weight"], H_k, ratio, d_v),
        "blk.3.ssm_alpha.weight": tile(wide[delta + "in_proj_a.weight"], H_k, ratio, 1),
        "blk.3.ssm_beta.weight": tile(wide[delta + "in_proj_b.weight"], H_k, ratio, 1),
        "blk.3.ssm_conv1d.weight": tile(wide[delta + "conv1d.weight"][:, 0], H_k, ratio, d_v, q_and_k),
        "blk.3.ssm_a": tile(-np.exp(wide[delta + "A_log"]), H_k, ratio, 1),
        "blk.3.ssm_dt.bias": tile(wide[delta + "dt_bias"], H_k, ratio, 1),
        "blk.3.ssm_norm.weight": wide[delta + "norm.weight"],
        "blk.3.ssm_out.weight": tile(wide[delta + "out_proj.weight"].T, H_k, ratio, d_v).T,
        "blk.2.attn_norm.weight": 1 + wide[attention + "input_layernorm.weight"],
        "blk.2.attn_q.weight": wide[attention + "self_attn.q_proj.weight"],
        "blk.2.attn_k_norm.weight": 1 + wide[attention + "self_attn.k_norm.weight"],
        "blk.2.post_attention_norm.weight": 1 + wide[attention + "post_attention_layernorm.weight"],
        "blk.2.ffn_down.weight": wide[attention + "mlp.down_proj.weight"],
        "output_norm.weight": 1 + wide["model.norm.weight"],
        "output.weight": wide["lm_head.weight"],
    }
    for name, want in expected.items():
        assert weights[name].dtype == np.float64
        np.testing.assert_array_equal(weights[name], want, err_msg=name)


@pytest.mark.parametrize("H_k, ratio", [(5, 1), (2, 3), (3, 2), (4, 5)])
def test_the_two_head_orders_are_inverse_and_follow_their_definition(H_k, ratio):
    size, start = 7, 11
    H_v = H_k * ratio
    x = np.arange(start + H_v * size)
    tiled = x[tiled_from_grouped(H_k, H_v, size=size, start=start)]
    np.testing.assert_array_equal(tiled, tile(x, H_k, ratio, size, start))
    np.testing.assert_array_equal(tiled[grouped_from_tiled(H_k, H_v, size=size, start=start)], x)


def test_float32_tensors_are_the_file_itself_and_the_order_is_the_networks(tmp_path):
    config = small_config()
    tensors = random_tensors(config)
    file = write_model(tmp_path / "m.gguf", config, dict(reversed(tensors.items())))
    loaded, weights, notes = weights_from_gguf(file, "float32", ops)
    assert loaded == config and notes == []
    assert list(weights) == list(tensors)
    assert list(weights)[:3] == ["token_embd.weight", "blk.0.attn_norm.weight", "blk.0.attn_qkv.weight"]
    assert list(weights)[-2:] == ["output_norm.weight", "output.weight"]
    for name, want in tensors.items():
        np.testing.assert_array_equal(weights[name], want)
        assert np.shares_memory(weights[name], file.tensors[name].raw)
    _, wide, _ = weights_from_gguf(file, "float64", ops)
    assert wide["blk.0.attn_qkv.weight"].dtype == np.float64
    np.testing.assert_array_equal(wide["blk.0.attn_qkv.weight"], tensors["blk.0.attn_qkv.weight"])


@pytest.mark.parametrize("name", ["quant-Q4_K_M.gguf", "quant-q8_0.gguf"])
def test_quantised_tensors_stay_quantised_until_used(name):
    file = read_gguf(FIXTURES / "quant" / name)
    _, weights, _ = weights_from_gguf(file, "float64", ops)
    reference = {t.name: t for t in GGUFReader(FIXTURES / "quant" / name).tensors}
    quantised = [n for n in weights if weights.stored_type(n) != Type.F32]
    assert {"token_embd.weight", "blk.0.attn_qkv.weight", "blk.0.ssm_alpha.weight"} <= set(quantised)
    for n in ("token_embd.weight", "blk.0.attn_qkv.weight", "blk.1.ssm_out.weight", "blk.2.ssm_a"):
        assert weights.stored_type(n) == reference[n].tensor_type
        want = dequantize(reference[n].data, reference[n].tensor_type).reshape(weights.shape(n))
        np.testing.assert_array_equal(weights[n], want)
        assert weights[n].dtype == np.float64


def test_rows_decodes_only_the_rows_asked_for(monkeypatch):
    _, weights, _ = weights_from_gguf(read_gguf(FIXTURES / "quant" / "quant-Q4_K_M.gguf"), "float32", ops)
    whole, decoded, real = weights["token_embd.weight"], [], quants.dequantize

    def watched(raw, type, shape, dtype):
        decoded.append(shape)
        return real(raw, type, shape, dtype)

    monkeypatch.setattr(quants, "dequantize", watched)
    ids = np.array([479, 3, 3, 0, 211])
    np.testing.assert_array_equal(weights.rows("token_embd.weight", ids), whole[ids])
    assert decoded == [(5, 256)]


def test_a_tensor_can_be_replaced_by_one_that_fits(tmp_path):
    config = small_config()
    _, weights, _ = weights_from_gguf(write_model(tmp_path / "m.gguf", config, random_tensors(config)), "float32", ops)
    new = np.arange(20.0)
    weights["blk.1.attn_norm.weight"] = new
    np.testing.assert_array_equal(weights["blk.1.attn_norm.weight"], new)
    assert weights["blk.1.attn_norm.weight"].dtype == np.float32
    with pytest.raises(InputError, match=r"\(20,\).*\(21,\)"):
        weights["blk.1.attn_norm.weight"] = np.zeros(21)


def test_missing_extra_and_misshapen_tensors_are_listed_together(tmp_path):
    config = small_config()
    tensors = random_tensors(config)
    del tensors["blk.0.ssm_norm.weight"], tensors["output_norm.weight"]
    tensors["blk.4.attn_q.weight"] = np.zeros((3, 2), np.float32)
    tensors["rope_freqs.weight"] = np.zeros(2, np.float32)
    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"].T.copy()
    with pytest.raises(InputError) as error:
        weights_from_gguf(write_model(tmp_path / "m.gguf", config, tensors), "float32", ops)
    text = str(error.value)
    assert "2 missing: blk.0.ssm_norm.weight, output_norm.weight" in text
    assert "2 unexpected: blk.4.attn_q.weight, rope_freqs.weight" in text
    assert (
        "1 with the wrong shape" in text
        and "blk.1.ffn_up.weight is (20, 28), not (28, 20)" in text
        and "\n" not in text
    )


def test_a_long_list_is_cut_and_counted(tmp_path):
    config = small_config()
    tensors = {name: x for name, x in random_tensors(config).items() if not name.startswith("blk.0.")}
    with pytest.raises(InputError, match=r"14 missing: blk.0.attn_norm.weight, .* and 6 more"):
        weights_from_gguf(write_model(tmp_path / "m.gguf", config, tensors), "float32", ops)


def test_prediction_blocks_and_vision_are_skipped_with_a_note(tmp_path):
    config = small_config()
    extra = {
        name: np.ones((2, 2), np.float32)
        for name in (
            "blk.5.attn_q.weight",
            "blk.5.ffn_up.weight",
            "blk.5.nextn.eh_proj.weight",
            "v.blk.0.attn_q.weight",
            "mm.0.weight",
        )
    }
    counts = {"qwen35.block_count": np.uint32(6), "qwen35.nextn_predict_layers": np.uint32(1)}
    file = write_model(tmp_path / "m.gguf", config, random_tensors(config) | extra, **counts)
    loaded, weights, notes = weights_from_gguf(file, "float32", ops)
    assert loaded == config and len(weights) == len(expected_tensors(config))
    assert sorted(note.split(" tensors")[0] for note in notes) == ["2 vision", "3 multi-token prediction"]


def test_a_block_beyond_the_last_is_not_taken_for_a_prediction_block(tmp_path):
    config = small_config()
    tensors = random_tensors(config) | {"blk.5.ffn_up.weight": np.ones((28, 20), np.float32)}
    with pytest.raises(InputError, match="1 unexpected: blk.5.ffn_up.weight"):
        weights_from_gguf(write_model(tmp_path / "m.gguf", config, tensors), "float32", ops)


def test_embeddings_are_tied_when_there_is_no_output_tensor(tmp_path):
    config = small_config(tied=True, layer_types=(ATTENTION, DELTA))
    loaded, weights, _ = weights_from_gguf(
        write_model(tmp_path / "m.gguf", config, random_tensors(config)), "float32", ops
    )
    assert loaded.tie_word_embeddings and "output.weight" not in weights


def test_files_that_are_no_model_are_refused_by_name(tmp_path):
    config = small_config()
    tensors = random_tensors(config)
    for path, metadata, some, match in [
        ("moe.gguf", {"general.architecture": "qwen35moe"}, tensors, "qwen35moe"),
        ("lora.gguf", {"general.type": "adapter"}, tensors, "adapter.*base model"),
        ("vocabulary.gguf", {}, {}, "contains no tensors"),
        ("decay.gguf", {}, tensors | {"blk.3.ssm_a": -tensors["blk.3.ssm_a"]}, r"blk.3.ssm_a.*negative"),
    ]:
        with pytest.raises(InputError, match=f"{path}.*{match}"):
            weights_from_gguf(write_model(tmp_path / path, config, some, **metadata), "float32", ops)
    with pytest.raises(InputError, match="'numpy' does not compute in bfloat16"):
        weights_from_gguf(read_gguf(tmp_path / "decay.gguf"), "bfloat16", ops)
    with pytest.raises(InputError, match="config.json"):
        weights_from_hf(tmp_path, "float32", ops)


@pytest.mark.parametrize(
    "prefix, head", [("model.language_model.", "lm_head."), ("language_model.model.", "language_model.lm_head.")]
)
def test_the_text_part_of_a_multimodal_checkpoint_is_the_text_model(prefix, head, tmp_path):
    config = small_config()
    hf = random_hf_tensors(config)
    _, want, _ = weights_from_hf(write_hf(tmp_path / "text", config, hf), "float32", ops)
    more = hf | {
        "mtp.fc.weight": np.ones((2, 2), np.float32),
        "mtp.norm.weight": np.ones(2, np.float32),
        "visual.patch_embed.weight": np.ones(3, np.float32),
    }
    more = {name.replace("lm_head.", head): x for name, x in more.items()}
    _, weights, notes = weights_from_hf(write_hf(tmp_path / "mm", config, more, prefix, wrapped=True), "float32", ops)
    assert sorted(note.split(" tensor")[0] for note in notes) == ["1 vision", "2 multi-token prediction"]
    for name in want:
        np.testing.assert_array_equal(weights[name], want[name])


def test_hf_embeddings_are_tied_only_when_the_head_is_absent_or_a_copy(tmp_path):
    config = small_config(tied=True)
    hf = random_hf_tensors(config)
    copy, other = hf["model.embed_tokens.weight"], hf["model.embed_tokens.weight"] + 1
    for name, head, tied in (
        ("absent", {}, True),
        ("copy", {"lm_head.weight": copy}, True),
        ("other", {"lm_head.weight": other}, False),
    ):
        loaded, weights, _ = weights_from_hf(write_hf(tmp_path / name, config, hf | head), "float32", ops)
        assert loaded.tie_word_embeddings == tied and ("output.weight" in weights) == (not tied)
    with pytest.raises(InputError, match="1 missing: lm_head.weight"):
        weights_from_hf(write_hf(tmp_path / "untied", replace(config, tie_word_embeddings=False), hf), "float32", ops)


def test_hf_problems_are_listed_under_hf_names(tmp_path):
    config = small_config()
    hf = random_hf_tensors(config)
    del hf["model.layers.0.linear_attn.A_log"]
    hf["model.layers.1.linear_attn.A_log"] = np.zeros(6, np.float32)
    hf["model.layers.3.linear_attn.conv1d.weight"] = hf["model.layers.3.linear_attn.conv1d.weight"][:, 0].copy()
    with pytest.raises(InputError) as error:
        weights_from_hf(write_hf(tmp_path / "hf", config, hf), "float32", ops)
    for part in (
        "1 missing: model.layers.0.linear_attn.A_log",
        "1 unexpected: model.layers.1.linear_attn.A_log",
        "model.layers.3.linear_attn.conv1d.weight is (62, 4), not (62, 1, 4)",
    ):
        assert part in str(error.value)


def test_shards_are_one_model(tmp_path):
    config = small_config()
    hf = random_hf_tensors(config)
    directory = write_hf(tmp_path / "hf", config, hf)
    _, want, _ = weights_from_hf(directory, "float32", ops)
    names = sorted(load_file(directory / "model.safetensors"))
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: hf[name] for name in held}, directory / shard)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {name: shard for shard, held in shards.items() for name in held}})
    )
    _, weights, _ = weights_from_hf(directory, "float32", ops)
    for name in want:
        np.testing.assert_array_equal(weights[name], want[name])
