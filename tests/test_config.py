"""The model's configuration: the same from GGUF and HF, written as the official converter does, refused when bad."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from gguf import GGUFReader

from deltanet_ref.errors import InputError
from deltanet_ref.formats.gguf import read_gguf, write_gguf
from deltanet_ref.model.config import Config
from tests.paths import FIXTURES

MODELS = ["eq", "grouped"]


def hf_config(model):
    return json.loads((FIXTURES / model / "hf" / "config.json").read_text())


def gguf_metadata(**changes):
    """Metadata of a small irregular model; a key set to None is left out."""
    metadata = {
        "general.architecture": "qwen35",
        "qwen35.block_count": 7,
        "qwen35.context_length": 512,
        "qwen35.embedding_length": 40,
        "qwen35.feed_forward_length": 56,
        "qwen35.attention.head_count": 6,
        "qwen35.attention.head_count_kv": 2,
        "qwen35.attention.key_length": 24,
        "qwen35.attention.value_length": 24,
        "qwen35.rope.freq_base": 5000.0,
        "qwen35.rope.dimension_count": 6,
        "qwen35.ssm.conv_kernel": 4,
        "qwen35.rope.dimension_sections": np.array([1, 1, 1, 0]),
        "qwen35.attention.layer_norm_rms_epsilon": 2.0**-20,
        "qwen35.ssm.state_size": 8,
        "qwen35.ssm.group_count": 3,
        "qwen35.ssm.time_step_rank": 9,
        "qwen35.ssm.inner_size": 9 * 10,
        "qwen35.full_attention_interval": 3,
        "qwen35.vocab_size": 100,
    }
    metadata.update({f"qwen35.{key}" if "general" not in key else key: value for key, value in changes.items()})
    return {key: value for key, value in metadata.items() if value is not None}


@pytest.mark.parametrize("model", MODELS)
def test_gguf_and_hf_give_the_same_config(model):
    file = read_gguf(FIXTURES / model / f"{model}-f32.gguf")
    from_gguf = Config.from_gguf(file.metadata, {name: t.shape for name, t in file.tensors.items()})
    from_hf = Config.from_hf(hf_config(model))
    assert from_gguf.rms_norm_eps == np.float32(from_hf.rms_norm_eps)  # the file holds a float32
    assert replace(from_gguf, rms_norm_eps=from_hf.rms_norm_eps) == from_hf


@pytest.mark.parametrize("model", MODELS)
def test_metadata_is_written_as_the_official_converter_writes_it(model, tmp_path):
    config = Config.from_hf(hf_config(model))
    write_gguf(tmp_path / "ours.gguf", config.to_gguf_metadata(), {"token_embd.weight": np.zeros((2, 3), np.float32)})
    ours, official = (
        {
            field.name: (field.types, field.contents())
            for field in GGUFReader(path).fields.values()
            if field.name.startswith("qwen35.") or field.name in ("general.architecture", "general.type")
        }
        for path in (tmp_path / "ours.gguf", FIXTURES / model / f"{model}-f32.gguf")
    )
    assert ours == official


def test_metadata_round_trip_keeps_irregular_layers_and_unequal_heads():
    layers = ("full_attention", "linear_attention", "linear_attention", "full_attention", "linear_attention")
    config = replace(Config.from_gguf(gguf_metadata()), num_hidden_layers=5, layer_types=layers)
    metadata = config.to_gguf_metadata() | {"qwen35.vocab_size": 100}
    assert metadata["qwen35.full_attention_interval"] == 4  # the converter's value where no interval fits
    assert Config.from_gguf(metadata) == config


def test_interval_counts_from_the_first_layer_and_recurrent_layers_win():
    types = Config.from_gguf(gguf_metadata()).layer_types
    assert [t == "full_attention" for t in types] == [False, False, True, False, False, True, False]
    recurrent = np.array([False, True, True, True, True, False, False])
    types = Config.from_gguf(gguf_metadata(**{"attention.recurrent_layers": recurrent})).layer_types
    assert [t == "linear_attention" for t in types] == recurrent.tolist()
    types = Config.from_gguf(gguf_metadata(full_attention_interval=None)).layer_types
    assert [i for i, t in enumerate(types) if t == "full_attention"] == [3]  # llama.cpp's default of 4


@pytest.mark.parametrize("listed", [6, 7])
def test_the_multi_token_prediction_block_is_no_layer(listed):
    recurrent = np.array([True, False, True, True, False, True, True][:listed])
    config = Config.from_gguf(gguf_metadata(nextn_predict_layers=1, **{"attention.recurrent_layers": recurrent}))
    assert config.num_hidden_layers == 6
    assert [t == "linear_attention" for t in config.layer_types] == recurrent[:6].tolist()


def test_vocabulary_comes_from_the_key_the_table_or_the_tokens():
    without = gguf_metadata(vocab_size=None)
    assert Config.from_gguf(gguf_metadata(), {"token_embd.weight": (96, 40)}).vocab_size == 100
    assert Config.from_gguf(without, {"token_embd.weight": (96, 40)}).vocab_size == 96
    assert Config.from_gguf(without | {"tokenizer.ggml.tokens": ["a", "b", "c"]}).vocab_size == 3


@pytest.mark.parametrize(
    "metadata, names",
    [
        (gguf_metadata(**{"general.architecture": "qwen35moe"}), ["qwen35moe", "dense"]),
        (gguf_metadata(**{"general.type": "adapter"}), ["adapter", "base model"]),
        (
            gguf_metadata(
                embedding_length=None, **{"ssm.state_size": None, "rope.freq_base": "fast", "ssm.inner_size": 91}
            ),
            ["embedding_length is missing", "state_size is missing", "'fast'", "91"],
        ),
        (gguf_metadata(**{"attention.recurrent_layers": np.array([True, False])}), ["recurrent_layers must have 7"]),
        (
            gguf_metadata(**{"attention.head_count_kv": 4, "ssm.group_count": 2, "rope.dimension_count": 5}),
            ["6 attention heads", "9 delta value heads", "5 of 24"],
        ),
        (gguf_metadata(block_count=2**32 - 1), ["4294967295"]),
        (gguf_metadata(nextn_predict_layers=7), ["leave 0 layers"]),
        (gguf_metadata(context_length=0, feed_forward_length=0), ["max_position_embeddings", "intermediate_size"]),
        (gguf_metadata(full_attention_interval=0), ["full_attention_interval"]),
        (gguf_metadata(**{"rope.scaling.type": "yarn"}), ["rope.scaling.type"]),
    ],
)
def test_bad_metadata_is_refused_with_everything_that_is_wrong(metadata, names):
    with pytest.raises(InputError) as error:
        Config.from_gguf(metadata)
    assert "\n" not in str(error.value)
    for name in names:
        assert name in str(error.value)


def test_rotary_settings_may_be_nested_or_flat_and_silence_means_the_defaults():
    rope = {"rope_theta": 7e6, "partial_rotary_factor": 0.5, "mrope_section": [20, 22, 22]}
    nested = Config.from_hf({"model_type": "qwen3_5_text", "rope_parameters": rope | {"rope_type": "default"}})
    assert nested == Config.from_hf({"model_type": "qwen3_5_text", **rope})
    assert (nested.rope_theta, nested.rotary_dim, nested.mrope_section) == (7e6, 128, (20, 22, 22))
    silent = Config.from_hf({"model_type": "qwen3_5_text"})
    assert (silent.rope_theta, silent.rotary_dim, silent.mrope_section) == (10000.0, 64, (11, 11, 10))
    assert [i for i, t in enumerate(silent.layer_types) if t == "full_attention"] == [3, 7, 11, 15, 19, 23, 27, 31]


def test_the_text_part_of_a_multimodal_config_is_the_text_config():
    text = hf_config("eq")
    del text["tie_word_embeddings"]
    multimodal = {"model_type": "qwen3_5", "text_config": text, "vision_config": {}, "tie_word_embeddings": True}
    assert asdict(Config.from_hf(multimodal)) == asdict(Config.from_hf(hf_config("eq")))


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"model_type": "qwen3_5_moe"}, ["qwen3_5_moe", "dense"]),
        ({"model_type": "qwen3_5"}, ["text_config"]),
        (
            {"num_experts": 8, "hidden_act": "gelu", "rope_parameters": {"rope_type": "yarn"}},
            ["experts", "gelu", "scaled"],
        ),
        ({"layer_types": ["linear_attention", "sliding_attention"]}, ["2 entries for 4", "sliding_attention"]),
        (
            {"hidden_size": -1, "head_dim": "64", "num_key_value_heads": True},
            ["hidden_size is -1", "head_dim", "is True"],
        ),
        ({"linear_num_value_heads": 3}, ["3 delta value heads", "2 key heads"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
    ],
)
def test_bad_hf_config_is_refused_with_everything_that_is_wrong(changes, names):
    with pytest.raises(InputError) as error:
        Config.from_hf(hf_config("grouped") | changes)
    for name in names:
        assert name in str(error.value)
