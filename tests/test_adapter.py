"""LoRA adapters: PEFT and GGUF files hold the same factors and the same update; bad files are refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType
from safetensors.numpy import load_file, save_file

from deltanet_ref import ops
from deltanet_ref.errors import InputError
from deltanet_ref.formats.gguf import read_gguf, write_gguf
from deltanet_ref.lora.adapter import load_adapter, new_adapter
from deltanet_ref.lora.bridge import reorder
from deltanet_ref.model.config import Config
from deltanet_ref.model.tensors import linear_tensors
from tests.paths import FIXTURES
from tests.test_load import small_config, tile

MODELS = ["eq", "grouped"]
ADAPTER = {"general.architecture": "qwen35", "general.type": "adapter", "adapter.type": "lora"}


def model_of(config, dtype="float32"):
    """The parts of a model that an adapter needs."""
    return SimpleNamespace(config=config, dtype=np.dtype(dtype), backend=ops)


def fixture_model(name, dtype="float32"):
    return model_of(Config.from_hf(json.loads((FIXTURES / name / "hf" / "config.json").read_text())), dtype)


def small_model(dtype="float32", **changes):
    return model_of(small_config(**changes), dtype)


def random_adapter(model, seed=0, **options):
    adapter, rng = new_adapter(model, **options), np.random.default_rng(seed)
    for name, x in adapter.tensors.items():
        adapter.tensors[name] = rng.standard_normal(x.shape).astype(model.dtype)
    return adapter


def same(ours, other):
    assert list(ours.tensors) == list(other.tensors) and ours.alpha == other.alpha and ours.metadata == other.metadata
    for name, x in ours.tensors.items():
        assert x.dtype == other.tensors[name].dtype
        np.testing.assert_array_equal(x, other.tensors[name], err_msg=name)


def edit_peft(source, target, weights=None, **changes):
    """Copies a PEFT directory, with other weights or settings."""
    target.mkdir()
    settings = json.loads((source / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(settings | changes))
    save_file(weights or load_file(source / "adapter_model.safetensors"), target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_peft_directory_becomes_the_file_of_the_official_converter(name, dtype):
    adapter = load_adapter(FIXTURES / name / "lora", fixture_model(name, dtype))
    official = {t.name: t.data for t in GGUFReader(FIXTURES / name / "lora.gguf").tensors}
    assert set(adapter.tensors) == set(official) and adapter.alpha == 8.0 and adapter.notes == []
    for tensor, want in official.items():
        assert adapter.tensors[tensor].dtype == dtype
        np.testing.assert_array_equal(adapter.tensors[tensor], want, err_msg=tensor)
    same(adapter, load_adapter(FIXTURES / name / "lora.gguf", fixture_model(name, dtype)))


@pytest.mark.parametrize("H_k, ratio", [(4, 1), (3, 2), (2, 3)])
def test_permuted_factors_are_the_permuted_update(H_k, ratio):
    """With factors of small integers every product is exact, so the dense updates are compared bit for bit."""
    model = small_model(H_k=H_k, ratio=ratio)
    adapter, rng = new_adapter(model, rank=3), np.random.default_rng(1)
    grouped = {name: rng.integers(-9, 10, x.shape).astype(np.float32) for name, x in adapter.tensors.items()}
    tiled = reorder(grouped, model.config, to="tiled")
    moved = {"attn_qkv": (5, 2 * H_k * 8), "attn_gate": (5, 0), "ssm_alpha": (1, 0), "ssm_beta": (1, 0)}
    for target in linear_tensors(model.config):
        before, after = (f[f"{target}.lora_b"] @ f[f"{target}.lora_a"] for f in (grouped, tiled))
        short = target.split(".")[2]
        if short in moved:
            before = tile(before, H_k, ratio, *moved[short])
        elif short == "ssm_out":
            before = tile(before.T, H_k, ratio, 5).T
        np.testing.assert_array_equal(after, before, err_msg=target)
    back = reorder(tiled, model.config, to="grouped")
    for name, x in grouped.items():
        np.testing.assert_array_equal(back[name], x)


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_gguf_to_peft_and_back_changes_no_bit(ratio, tmp_path):
    model = small_model(ratio=ratio)
    adapter = random_adapter(model, rank=5, alpha=7.5)
    adapter.metadata = {"invocation_tokens": [3, 66, 1]}
    adapter.save_peft(tmp_path / "peft")
    from_peft = load_adapter(tmp_path / "peft", model)
    same(adapter, from_peft)
    from_peft.save_gguf(tmp_path / "a.gguf")
    same(adapter, load_adapter(tmp_path / "a.gguf", model))


def test_several_ranks_and_a_choice_of_layers_survive_both_formats(tmp_path):
    model = small_model()
    adapter = random_adapter(model, rank=5, alpha=7.5, targets="blk.0.attn_qkv.weight, ffn_up, blk.2.attn_q")
    a, b = (f"blk.3.ffn_up.weight.lora_{f}" for f in "ab")
    adapter.tensors[a], adapter.tensors[b] = adapter.tensors[a][:2].copy(), adapter.tensors[b][:, :2].copy()
    assert adapter.scale("blk.3.ffn_up.weight") == 7.5 / 2 and adapter.scale("blk.2.attn_q.weight") == 7.5 / 5
    adapter.save_gguf(tmp_path / "a.gguf")
    adapter.save_peft(tmp_path / "peft")
    same(adapter, load_adapter(tmp_path / "a.gguf", model))
    same(adapter, load_adapter(tmp_path / "peft", model))
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == {"layers.3.mlp.up_proj": 2} and settings["r"] == 5
    assert "layers.0.linear_attn.in_proj_qkv" in settings["target_modules"]


def test_the_gguf_file_holds_what_llama_cpp_asks_for(tmp_path):
    adapter = random_adapter(small_model("float64"), rank=2, alpha=3)
    adapter.metadata = {"task_name": "scots", "prompt_prefix": "Say: ", "invocation_tokens": [5, 9]}
    adapter.save_gguf(tmp_path / "a.gguf")
    file = GGUFReader(tmp_path / "a.gguf")
    fields = {f.name: (f.types, f.contents()) for f in file.fields.values() if not f.name.startswith("GGUF.")}
    string, u32 = GGUFValueType.STRING, GGUFValueType.UINT32
    assert fields == {
        "general.architecture": ([string], "qwen35"),
        "general.type": ([string], "adapter"),
        "adapter.type": ([string], "lora"),
        "adapter.lora.alpha": ([GGUFValueType.FLOAT32], 3.0),
        "adapter.lora.task_name": ([string], "scots"),
        "adapter.lora.prompt_prefix": ([string], "Say: "),
        "adapter.alora.invocation_tokens": ([GGUFValueType.ARRAY, u32], [5, 9]),
    }
    assert {t.tensor_type.name for t in file.tensors} == {"F32"}
    assert sorted(t.name for t in file.tensors) == sorted(adapter.tensors)
    by_name = {t.name: t for t in file.tensors}
    assert by_name["blk.0.attn_qkv.weight.lora_a"].data.shape == (2, 20)
    assert by_name["blk.0.attn_qkv.weight.lora_b"].data.shape == (62, 2)
    same_again = load_adapter(tmp_path / "a.gguf", small_model())
    assert same_again.metadata == adapter.metadata and "every position" in same_again.notes[0]


def test_unequal_peft_scales_are_folded_into_b(tmp_path):
    """PEFT's documentation: the scale of each target is alpha_t / r_t, or alpha_t / sqrt(r_t) with use_rslora."""
    model = small_model("float64")
    adapter = random_adapter(model, rank=3, alpha=6, targets="in_proj_qkv,down_proj,o_proj")
    adapter.save_peft(tmp_path / "plain")
    alphas = {"blk.0.attn_qkv.weight": 9.0, "blk.1.ffn_down.weight": 4.0, "blk.4.ffn_down.weight": 4.0}
    pattern = {"layers.0.linear_attn.in_proj_qkv": 9, r"layers\.[14]\.mlp\.down_proj": 4}
    for name, rslora, power in (("alphas", False, 1.0), ("rslora", True, 0.5)):
        peft = edit_peft(tmp_path / "plain", tmp_path / name, alpha_pattern=pattern, use_rslora=rslora)
        loaded = load_adapter(peft, model)
        assert len(loaded.notes) == 1 and "3 of 10 tensors" in loaded.notes[0]
        plain = load_adapter(tmp_path / "plain", model)  # float32 on the disk
        for target in plain.targets:
            want = alphas.get(target, 6.0) / 3**power * plain.tensors[f"{target}.lora_b"]
            np.testing.assert_allclose(loaded.scale(target) * loaded.tensors[f"{target}.lora_b"], want, rtol=1e-15 * 8)


def test_rslora_alone_needs_no_folding(tmp_path):
    model = small_model()
    adapter = random_adapter(model, rank=3, alpha=6)
    adapter.save_peft(tmp_path / "plain")
    loaded = load_adapter(edit_peft(tmp_path / "plain", tmp_path / "rslora", use_rslora=True), model)
    assert loaded.notes == [] and loaded.alpha == 6 * 3**0.5
    for name, x in adapter.tensors.items():
        np.testing.assert_array_equal(loaded.tensors[name], x)


def test_alpha_zero_means_no_scaling_as_in_llama_cpp(tmp_path):
    model = small_model()
    adapter = random_adapter(model, rank=3, targets="attn_k,ffn_up")
    for alpha in ({"adapter.lora.alpha": 0.0}, {}):
        write_gguf(tmp_path / "a.gguf", ADAPTER | alpha, adapter.tensors)
        loaded = load_adapter(tmp_path / "a.gguf", model)
        assert all(loaded.scale(target) == 1 for target in loaded.targets)


def test_multimodal_module_paths_are_the_same_adapter(tmp_path):
    source = FIXTURES / "grouped" / "lora"
    weights = {
        key.replace(".model.layers.", ".model.language_model.layers."): x
        for key, x in load_file(source / "adapter_model.safetensors").items()
    }
    assert all("language_model" in key for key in weights)
    model = fixture_model("grouped")
    same(load_adapter(source, model), load_adapter(edit_peft(source, tmp_path / "mm", weights), model))


def test_a_new_adapter_covers_all_linear_layers_and_changes_nothing_yet():
    model = small_model()
    adapter = new_adapter(model)
    assert adapter.targets == list(linear_tensors(model.config))
    delta, attention = ([t.split(".")[2] for t in adapter.targets if t.startswith(f"blk.{i}.")] for i in (0, 1))
    assert delta == ["attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_out", "ffn_gate", "ffn_up", "ffn_down"]
    assert attention == ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    assert adapter.alpha == 32 and {adapter.rank(t) for t in adapter.targets} == {16}
    for target, spec in linear_tensors(model.config).items():
        a, b = (adapter.tensors[f"{target}.lora_{f}"] for f in "ab")
        assert a.shape == (16, spec.shape[1]) and b.shape == (spec.shape[0], 16) and not b.any()
        bound = spec.shape[1] ** -0.5
        assert a.dtype == b.dtype == np.float32 and 0.9 * bound < np.abs(a).max() <= bound * (1 + 1e-6)
        # standard deviation of a uniform distribution; 16 * 20 samples at least: 3 % standard error
        assert abs(a.std() / (bound / 3**0.5) - 1) < 0.15


def test_the_seed_decides_a_new_adapter():
    model = small_model()
    same(new_adapter(model, seed=5), new_adapter(model, seed=5))
    one, other = (new_adapter(model, seed=seed).tensors["blk.0.ssm_out.weight.lora_a"] for seed in (5, 6))
    assert not np.array_equal(one, other)
    wide = new_adapter(small_model("float64"), seed=5).tensors["blk.0.ssm_out.weight.lora_a"]
    assert wide.dtype == np.float64
    np.testing.assert_allclose(one, wide, rtol=2e-7)  # two roundings to float32


@pytest.mark.parametrize(
    "names, expected",
    [
        (["attn_qkv"], ["blk.0.attn_qkv.weight", "blk.3.attn_qkv.weight", "blk.4.attn_qkv.weight"]),
        (["in_proj_qkv"], ["blk.0.attn_qkv.weight", "blk.3.attn_qkv.weight", "blk.4.attn_qkv.weight"]),
        ("self_attn.o_proj,attn_output", ["blk.1.attn_output.weight", "blk.2.attn_output.weight"]),
        (
            ["model.layers.4.linear_attn.out_proj", "blk.1.attn_v.weight", "blk.0.ffn_up"],
            ["blk.0.ffn_up.weight", "blk.1.attn_v.weight", "blk.4.ssm_out.weight"],
        ),
    ],
)
def test_targets_go_by_gguf_and_by_hf_names(names, expected):
    assert new_adapter(small_model(), rank=2, targets=names).targets == expected


@pytest.mark.parametrize(
    "options, match",
    [
        (
            {"targets": ["q_proj", "c_attn", "ssm_conv1d"]},
            r"unknown LoRA targets \['c_attn', 'ssm_conv1d'\]: .*attn_qkv.*in_proj",
        ),
        ({"targets": []}, "empty"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"alpha": 0}, "alpha is 0"),
    ],
)
def test_bad_options_of_a_new_adapter_are_refused(options, match):
    with pytest.raises(InputError, match=match):
        new_adapter(small_model(), **options)


def test_every_problem_of_a_gguf_adapter_is_listed(tmp_path):
    model = small_model()
    tensors = random_adapter(model, rank=3, targets="attn_qkv,ffn_up").tensors
    del tensors["blk.0.attn_qkv.weight.lora_b"]
    tensors["token_embd.weight.lora_a"] = tensors["blk.9.ffn_up.weight.lora_b"] = np.zeros((3, 4), np.float32)
    tensors["blk.1.ffn_up.weight.lora_a"] = tensors["blk.1.ffn_up.weight.lora_a"].T.copy()
    tensors["blk.2.ffn_up.weight.lora_a"][1, 1] = np.nan
    write_gguf(tmp_path / "a.gguf", ADAPTER | {"adapter.lora.alpha": 4.0}, tensors)
    with pytest.raises(InputError) as error:
        load_adapter(tmp_path / "a.gguf", model)
    for part in (
        "1 missing: blk.0.attn_qkv.weight.lora_b",
        "token_embd.weight.lora_a",
        "blk.9.ffn_up.weight.lora_b",
        "blk.1.ffn_up.weight (28, 20) with lora_a (20, 3)",
        "1 not finite: blk.2.ffn_up.weight.lora_a",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "metadata, match",
    [
        ({"general.type": "model"}, "general.type is 'model'"),
        ({"general.architecture": "llama"}, "'llama'"),
        ({"adapter.type": "control_vector"}, "'control_vector'"),
        ({"adapter.lora.alpha": float("inf")}, "alpha is inf"),
    ],
)
def test_gguf_files_that_are_no_adapter_of_this_model_are_refused(metadata, match, tmp_path):
    adapter = random_adapter(small_model(), rank=2)
    write_gguf(tmp_path / "a.gguf", ADAPTER | {"adapter.lora.alpha": 4.0} | metadata, adapter.tensors)
    with pytest.raises(InputError, match=match):
        load_adapter(tmp_path / "a.gguf", small_model())


@pytest.mark.parametrize(
    "metadata",
    [
        {"general.type": "m" * 10**6},
        {"adapter.lora.alpha": "4" * 10**6},
        {"adapter.lora.task_name": ["t" * 10**6]},
        {"adapter.alora.invocation_tokens": ["t" * 10**6]},
    ],
)
def test_a_long_value_of_a_file_is_not_repeated_in_full(metadata, tmp_path):
    adapter = random_adapter(small_model(), rank=2)
    write_gguf(tmp_path / "a.gguf", ADAPTER | {"adapter.lora.alpha": 4.0} | metadata, adapter.tensors)
    with pytest.raises(InputError) as error:
        load_adapter(tmp_path / "a.gguf", small_model())
    assert len(str(error.value)) < 600


def test_an_adapter_that_would_do_nothing_is_refused_with_the_likely_cause(tmp_path):
    source = FIXTURES / "eq" / "lora"
    weights = load_file(source / "adapter_model.safetensors")
    weights = {key.replace("model.layers", "transformer.h"): x for key, x in weights.items()}
    with pytest.raises(InputError, match=r"would do nothing.*transformer.h.*another model, or uses other names"):
        load_adapter(edit_peft(source, tmp_path / "other", weights), fixture_model("eq"))
    write_gguf(tmp_path / "empty.gguf", ADAPTER, {})
    with pytest.raises(InputError, match="no LoRA factors"):
        load_adapter(tmp_path / "empty.gguf", fixture_model("eq"))


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"use_dora": True, "modules_to_save": ["lm_head"], "bias": "all"}, ["use_dora", "modules_to_save", "bias ="]),
        ({"init_lora_weights": "pissa_niter_4"}, ["pissa"]),
        ({"peft_type": "IA3"}, ["peft_type"]),
        ({"lora_alpha": 0}, ["alpha 0"]),
        ({"r": 6}, ["is (4, 64)", "r = 6"]),
        ({"rank_pattern": {"(": 3}}, ["cannot be read"]),
    ],
)
def test_what_gguf_cannot_express_is_refused(changes, parts, tmp_path):
    with pytest.raises(InputError) as error:
        load_adapter(edit_peft(FIXTURES / "eq" / "lora", tmp_path / "peft", **changes), fixture_model("eq"))
    for part in parts:
        assert part in str(error.value)


def test_embedding_and_convolution_factors_are_listed_as_unusable(tmp_path):
    source = FIXTURES / "eq" / "lora"
    weights = load_file(source / "adapter_model.safetensors")
    extra = [
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.layers.0.linear_attn.conv1d.lora_B.weight",
    ]
    weights |= {key: np.ones((2, 2), np.float32) for key in extra}
    with pytest.raises(InputError, match="3 other than LoRA factors of this model's linear layers") as error:
        load_adapter(edit_peft(source, tmp_path / "peft", weights), fixture_model("eq"))
    for key in extra:
        assert key in str(error.value)


def test_a_replaced_factor_that_does_not_fit_is_not_written(tmp_path):
    adapter = random_adapter(small_model(), rank=2)
    adapter.tensors["blk.0.ffn_up.weight.lora_b"] = np.ones((28, 3))
    for save, path in ((adapter.save_gguf, tmp_path / "a.gguf"), (adapter.save_peft, tmp_path / "peft")):
        with pytest.raises(InputError, match="misshapen.*blk.0.ffn_up.weight"):
            save(path)
        assert not path.exists()


def test_half_precision_factors_are_read_exactly(tmp_path):
    model = small_model()
    adapter = random_adapter(model, rank=2)
    halves = {name: x.astype(np.float16) for name, x in adapter.tensors.items()}
    write_gguf(tmp_path / "a.gguf", ADAPTER | {"adapter.lora.alpha": 4.0}, halves)
    assert read_gguf(tmp_path / "a.gguf").tensors["blk.0.ssm_out.weight.lora_a"].type.name == "F16"
    for name, x in load_adapter(tmp_path / "a.gguf", model).tensors.items():
        np.testing.assert_array_equal(x, halves[name])
