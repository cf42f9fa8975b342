"""The real PEFT on the real HF model: it reads what we save, and computes what we compute."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import deltanet_ref as dr
from deltanet_ref.lora.bridge import reorder
from deltanet_ref.model.config import Config
from deltanet_ref.model.tensors import linear_tensors
from tests.paths import FIXTURES

MODELS = ["eq", "grouped"]
# PEFT computes in float32, as HF's model casts to it inside. Its distance from our float64 is held against that of our
# own float32 for the same adapter: two float32 passes of different order are within this factor of each other.
FACTOR = 4
TOKENS = np.array([[17, 401, 3, 3, 250, 88, 9, 444, 120, 61, 5]])


def our_models(name):
    """The same HF directory in float64 and in float32."""
    return [dr.load_model(FIXTURES / name / "hf", backend="numpy", dtype=dtype) for dtype in ("float64", "float32")]


def assert_our_logits(theirs, wide, narrow):
    exact, rounded = wide.logits(TOKENS), narrow.logits(TOKENS)
    assert relative(theirs, exact) < FACTOR * relative(rounded, exact)


def hf_model(name):
    return AutoModelForCausalLM.from_pretrained(FIXTURES / name / "hf", dtype=torch.float32).eval()


def random_factors(adapter, seed):
    rng = np.random.default_rng(seed)
    for name, x in adapter.tensors.items():
        adapter.tensors[name] = (0.3 * rng.standard_normal(x.shape)).astype(x.dtype)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def lora_weights(peft_model):
    """What PEFT itself holds: HF path -> (A, B, scaling)."""
    return {
        path.removeprefix("base_model.model."): (
            module.lora_A["default"].weight.detach().numpy(),
            module.lora_B["default"].weight.detach().numpy(),
            module.scaling["default"],
        )
        for path, module in peft_model.named_modules()
        if getattr(module, "lora_A", None)
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [None, ["attn_qkv", "ssm_out", "blk.1.ffn_up", "attn_q"]])
def test_peft_loads_what_we_save_and_gives_our_logits(name, targets, tmp_path):
    wide, narrow = our_models(name)
    adapter = dr.new_adapter(narrow, rank=3, alpha=5, targets=targets, seed=4)
    random_factors(adapter, 8)
    if targets:  # a second rank, which PEFT reads from rank_pattern
        name_a, name_b = "blk.1.ffn_up.weight.lora_a", "blk.1.ffn_up.weight.lora_b"
        adapter.tensors[name_a], adapter.tensors[name_b] = adapter.tensors[name_a][:2], adapter.tensors[name_b][:, :2]
    adapter.save_peft(tmp_path / "peft")
    hf = hf_model(name)
    with torch.no_grad():
        plain = hf(torch.tensor(TOKENS)).logits.numpy()
        peft = PeftModel.from_pretrained(hf, tmp_path / "peft").eval()
        theirs = peft(torch.tensor(TOKENS)).logits.numpy()

    loaded, grouped = lora_weights(peft), reorder(adapter.tensors, narrow.config, to="grouped")
    specs = {t: spec for t, spec in linear_tensors(narrow.config).items() if t in adapter.targets}
    assert sorted(loaded) == sorted(spec.hf_name.removesuffix(".weight") for spec in specs.values())
    for target, spec in specs.items():
        a, b, scaling = loaded[spec.hf_name.removesuffix(".weight")]
        np.testing.assert_array_equal(a, grouped[f"{target}.lora_a"])
        np.testing.assert_array_equal(b, grouped[f"{target}.lora_b"])
        assert scaling == adapter.scale(target)

    assert relative(plain, theirs) > 1e-2  # the adapter does something
    for model in (wide, narrow):
        model.attach(adapter)
    assert_our_logits(theirs, wide, narrow)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.linear_attn\.out_proj": 6}, "alpha_pattern": {"mlp.down_proj": 11}},
    ],
)
def test_we_load_what_peft_saves_and_give_its_logits(name, options, tmp_path):
    hf = hf_model(name)
    torch.manual_seed(3)
    peft = get_peft_model(hf, LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", **options)).eval()
    with torch.no_grad():
        for module in peft.modules():
            if getattr(module, "lora_B", None):
                module.lora_B["default"].weight.normal_(std=0.3)
        theirs = peft(torch.tensor(TOKENS)).logits.numpy()
        with peft.disable_adapter():
            plain = peft(torch.tensor(TOKENS)).logits.numpy()
    peft.save_pretrained(tmp_path / "peft")
    assert relative(plain, theirs) > 1e-2

    wide, narrow = our_models(name)
    adapter = dr.load_adapter(tmp_path / "peft", narrow)
    assert bool(adapter.notes) == ("alpha_pattern" in options)
    adapter.save_gguf(tmp_path / "a.gguf")
    for model in (wide, narrow):
        model.attach(dr.load_adapter(tmp_path / "a.gguf", model))
    assert_our_logits(theirs, wide, narrow)


def test_our_defaults_are_those_of_hf():
    """A config.json that says nothing means the same to HF and to us."""
    theirs = AutoConfig.for_model("qwen3_5_text")
    ours = Config.from_hf({"model_type": "qwen3_5_text"})
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
    ):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert list(ours.layer_types) == theirs.layer_types
