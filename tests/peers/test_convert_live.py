"""Converted and merged models in HF, PEFT and llama.cpp, and our quantisers against ggml on fresh values."""

import ctypes
import json

import gguf
import numpy as np
import pytest
import torch
import xllamacpp.xllamacpp
from gguf import GGMLQuantizationType as Type
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import deltanet_ref as dr
from deltanet_ref.cli.main import main
from deltanet_ref.formats.quants import quantize
from deltanet_ref.lora import llama_cpp
from deltanet_ref.lora.merge import merge
from deltanet_ref.lora.verify import log_softmax
from deltanet_ref.model.convert import open_base, write_base
from deltanet_ref.model.generate import invocation
from tests.paths import FIXTURES
from tests.peers.hf_models import ATTENTION, DELTA, random_model
from tests.peers.llama import Llama
from tests.peers.test_llama_live import FLOAT32
from tests.tolerances import relative

MODELS = ["eq", "grouped"]
TOKENS = [17, 401, 3, 3, 250, 88, 9, 444, 120, 61, 5]


def ours(path):
    return log_softmax(dr.load_model(path, dtype="float64").logits(np.array([TOKENS])))[0, -1]


@pytest.mark.parametrize("model", MODELS)
def test_a_model_merged_by_peft_and_converted_is_the_same_here_and_in_llama_cpp(model, tmp_path):
    """The documented path for models that were fine-tuned elsewhere."""
    hf = AutoModelForCausalLM.from_pretrained(FIXTURES / model / "hf", dtype=torch.float32)
    peft = PeftModel.from_pretrained(hf, FIXTURES / model / "lora").merge_and_unload()
    peft.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(FIXTURES / model / "hf").save_pretrained(tmp_path / "merged")
    assert main(["convert", str(tmp_path / "merged"), "-o", str(tmp_path / "a.gguf")]) == 0
    live = dr.load_model(FIXTURES / model / f"{model}-f32.gguf", dtype="float64")
    live.attach(dr.load_adapter(FIXTURES / model / "lora", live))
    expected = log_softmax(live.logits(np.array([TOKENS])))[0, -1]
    assert relative(ours(tmp_path / "a.gguf"), expected) < FLOAT32
    assert relative(Llama(tmp_path / "a.gguf").log_probabilities(TOKENS), expected) < FLOAT32


@pytest.mark.parametrize("model", MODELS)
def test_hf_loads_the_directory_that_we_write_and_gives_our_logits(model, tmp_path):
    write_base(open_base(FIXTURES / model / f"{model}-f32.gguf"), tmp_path / "hf")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = hf(torch.tensor([TOKENS])).logits.numpy()
    wide = dr.load_model(FIXTURES / model / f"{model}-f32.gguf", dtype="float64").logits(np.array([TOKENS]))
    assert relative(theirs, wide) < 3 * FLOAT32  # HF in float32 was seen up to 1.1e-6 from float64
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (tmp_path / "hf", FIXTURES / model / "hf")]
    for text in ("A ship, 42 times.", "<|im_start|>user\nwhat?<|im_end|>", "caf\u00e9 <think>x</think>"):
        one, two = (t(text)["input_ids"] for t in tokenizers)
        assert one == two
    chat = [{"role": "user", "content": "what?"}]
    one, two = (t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for t in tokenizers)
    assert one == two and tokenizers[0].eos_token == "<|im_end|>"


OPTIONS = [
    dict(r=3, lora_alpha=6),
    dict(
        r=4,
        lora_alpha=7,
        use_rslora=True,
        alpha_pattern={"mlp.down_proj": 11},
        rank_pattern={"q_proj": 2, r"layers\.1\..*up_proj": 5},
    ),
]


@pytest.mark.parametrize("H_k, H_v, tied", [(3, 9, True), (2, 6, False), (5, 5, False), (1, 4, True)])
def test_other_shapes_and_adapters_of_peft_are_the_same_in_hf_here_and_in_llama_cpp(H_k, H_v, tied, tmp_path):
    """HF directory and PEFT adapters converted; both adapters live, switched in one llama.cpp, and merged."""
    shape = dict(
        vocab_size=480,
        hidden_size=96,
        intermediate_size=160,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        linear_num_key_heads=H_k,
        linear_num_value_heads=H_v,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        layer_types=[DELTA, ATTENTION, DELTA, DELTA],
        rope_parameters=dict(rope_type="default", rope_theta=1e5, partial_rotary_factor=0.25, mrope_section=[2, 1, 1]),
    )
    random_model(shape, seed=H_v).save_pretrained(tmp_path / "hf")
    AutoTokenizer.from_pretrained(FIXTURES / "eq" / "hf").save_pretrained(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), "-o", str(tmp_path / "base.gguf")]) == 0
    wide = []
    for i, options in enumerate(OPTIONS):
        hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
        peft = get_peft_model(hf, LoraConfig(target_modules="all-linear", **options)).eval()
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for module in peft.modules():
                if getattr(module, "lora_B", None):
                    module.lora_B["default"].weight.normal_(std=0.1, generator=generator)
            theirs = log_softmax(peft(torch.tensor([TOKENS])).logits.numpy()[0])[-1]
        peft.save_pretrained(tmp_path / f"peft{i}")
        assert (
            main(
                [
                    "convert",
                    str(tmp_path / f"peft{i}"),
                    "-o",
                    str(tmp_path / f"{i}.gguf"),
                    "--base",
                    str(tmp_path / "base.gguf"),
                ]
            )
            == 0
        )
        merge(tmp_path / "base.gguf", [(tmp_path / f"peft{i}", 1.0)], tmp_path / f"merged{i}.gguf")
        live = dr.load_model(tmp_path / "base.gguf", dtype="float64")
        live.attach(dr.load_adapter(tmp_path / f"{i}.gguf", live))
        wide.append(log_softmax(live.logits(np.array([TOKENS]))[0])[-1])
        assert relative(theirs, wide[i]) < 3 * FLOAT32
        assert relative(ours(tmp_path / f"merged{i}.gguf"), wide[i]) < FLOAT32
    llama = Llama(tmp_path / "base.gguf", [tmp_path / "0.gguf", tmp_path / "1.gguf"])
    for scales, log_probabilities in (([1.0, 0.0], wide[0]), ([0.0, 1.0], wide[1]), ([1.0, 0.0], wide[0])):
        assert relative(llama.log_probabilities(TOKENS, scales), log_probabilities) < FLOAT32
    assert relative(wide[0], wide[1]) > 1e-2


# llama.cpp rounds activations too: relative distances of log-probabilities measured on this prompt, three times each
ROUNDING = {
    "f32": FLOAT32,
    "f16": 2e-3,
    "q8_0": 2.5e-2,
    "q6_k": 2.5e-2,
    "q5_k": 3e-2,
    "q4_k_m": 3e-2,
    "q4_k": 3e-2,
    "q4_0": 3e-2,
}


@pytest.mark.parametrize("choice", ROUNDING)
def test_llama_cpp_reads_every_type_that_we_write(choice, tmp_path):
    """A model whose rows are whole superblocks, so that no type falls back."""
    write_base(open_base(FIXTURES / "quant" / "quant-q8_0.gguf"), tmp_path / "a.gguf", choice)
    theirs = Llama(tmp_path / "a.gguf").log_probabilities(TOKENS)
    assert relative(theirs, ours(tmp_path / "a.gguf")) < ROUNDING[choice]


def ggml(x, kind):
    """ggml's own blocks, by the function that llama-quantize calls, without an importance matrix."""
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros(x.size // block * size, np.uint8)
    library.ggml_quantize_chunk(int(kind), x.ctypes.data, out.ctypes.data, 0, *x.shape, None)
    return out


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.Q5_K, Type.Q6_K])
@pytest.mark.parametrize("draw", ["normal", "heavy tails", "one sign", "small"])
def test_our_blocks_are_as_close_as_ggmls(kind, draw):
    rng = np.random.default_rng(5)
    x = {
        "normal": lambda s: rng.standard_normal(s),
        "heavy tails": lambda s: rng.standard_t(4, s),
        "one sign": lambda s: rng.random(s) + 0.5,
        "small": lambda s: 1e-3 * rng.standard_normal(s),
    }[draw]((24, 1024))
    x = np.ascontiguousarray(x, np.float32)
    error = {
        name: np.sqrt(np.mean((gguf.quants.dequantize(raw.reshape(len(x), -1), kind) - x) ** 2))
        for name, raw in (("ours", quantize(x, kind)), ("ggml", ggml(x, kind)))
    }
    assert error["ours"] <= 1.02 * error["ggml"]
    if kind == Type.Q8_0:
        assert np.array_equal(quantize(x, kind), ggml(x, kind))


def test_verify_compares_with_llama_cpp(tmp_path, capfd):
    base, lora = FIXTURES / "grouped" / "grouped-f32.gguf", FIXTURES / "grouped" / "lora"
    assert main(["verify", str(base), f"{lora}=0.5", "-p", "a ship"]) == 0
    out, err = capfd.readouterr()
    assert "\nllama.cpp: compared\n" in out and not err


def test_verify_lets_llama_cpp_round_on_a_quantised_base_and_still_sees_another_adapter(tmp_path, capfd, monkeypatch):
    """One that changes less than llama.cpp's rounding of activations passes; one that acts otherwise does not."""
    base = FIXTURES / "quant" / "quant-Q4_K_M.gguf"
    model = dr.load_model(base)
    adapter = dr.new_adapter(model, rank=2, alpha=4, seed=3)
    rng = np.random.default_rng(8)
    for name, size in (("weak", 1e-4), ("strong", 0.2)):
        for target in adapter.targets:
            b = adapter.tensors[f"{target}.lora_b"]
            adapter.tensors[f"{target}.lora_b"] = (size * rng.standard_normal(b.shape)).astype(b.dtype)
        adapter.save_gguf(tmp_path / f"{name}.gguf")
    for name in ("weak", "strong"):
        assert main(["verify", str(base), str(tmp_path / f"{name}.gguf"), "-p", "a ship", "--json"]) == 0
        report = json.loads(capfd.readouterr().out)
        distance = report["distances"]["llama.cpp, base and adapter"]
        assert (report["effect"]["distance"] < distance) == (name == "weak")
    real = llama_cpp.log_probabilities
    monkeypatch.setattr(
        llama_cpp, "log_probabilities", lambda base, adapter, prompts, scales: real(base, adapter, prompts, [0.0, 0.5])
    )
    assert main(["verify", str(base), str(tmp_path / "strong.gguf"), "-p", "a ship"]) == 1
    assert "llama.cpp, base and adapter computes something else" in capfd.readouterr().out


def test_verify_compares_an_activated_lora_on_every_position(tmp_path, capfd):
    activated(tmp_path)
    base = FIXTURES / "grouped" / "grouped-f32.gguf"
    assert main(["verify", str(base), str(tmp_path / "a.gguf"), "-p", "a ship"]) == 0
    out, err = capfd.readouterr()
    assert "\nllama.cpp: compared\n" in out and not err


def test_our_merged_file_is_base_and_adapter_in_llama_cpp(tmp_path):
    base, lora = FIXTURES / "grouped" / "grouped-f32.gguf", FIXTURES / "grouped" / "lora.gguf"
    merge(base, [(lora, 0.7)], tmp_path / "m.gguf")
    merged = Llama(tmp_path / "m.gguf").log_probabilities(TOKENS)
    assert relative(merged, Llama(base, [lora]).log_probabilities(TOKENS, [0.7])) < 2 * FLOAT32


PROMPTS = [[9, 3, 250, 17, 88, 3, 3, 250, 61, 5], [9, 3, 251, 17, 88], [3, 250, 17, 88, 9], [9, 8, 7, 6, 3, 250]]


def activated(tmp_path):
    """The base in float64 and an activated LoRA, saved in both forms."""
    model = dr.load_model(FIXTURES / "grouped" / "grouped-f32.gguf", dtype="float64")
    adapter = dr.load_adapter(FIXTURES / "grouped" / "lora.gguf", model)
    adapter.metadata["invocation_tokens"] = [3, 250]
    adapter.save_gguf(tmp_path / "a.gguf")
    adapter.save_peft(tmp_path / "peft")
    return model, adapter


def in_two_passes(model, adapter, prompt, start):
    """Logits (V,) after the prompt, of which the adapter sees what comes from start on."""
    state = None
    model.adapters.clear()
    if start:
        logits, state = model.prefill(np.array(prompt[:start]))
    if start < len(prompt):
        model.attach(adapter)
        logits, _ = model.prefill(np.array(prompt[start:]), state)
    return logits


@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_activated_lora_acts_where_llama_cpps_server_lets_it_act(prompt, tmp_path):
    """From the token before the last invocation on, nowhere, everywhere."""
    model, adapter = activated(tmp_path)
    theirs = Llama(FIXTURES / "grouped" / "grouped-f32.gguf", [tmp_path / "a.gguf"]).log_probabilities(prompt, [1.0])
    model.attach(adapter, name="a")
    (token,) = dr.generate(model, prompt, max_tokens=1, temperature=0, return_ids=True)
    _, start = invocation(model, prompt)
    assert relative(theirs, log_softmax(in_two_passes(model, adapter, prompt, start)[None])[0]) < FLOAT32
    assert int(np.argmax(theirs)) == token


@pytest.mark.parametrize("prompt", PROMPTS)
def test_peft_activates_it_one_token_later_than_llama_cpp(prompt, tmp_path):
    model, adapter = activated(tmp_path)
    model.attach(adapter, name="a")
    _, start = invocation(model, prompt)
    hf = AutoModelForCausalLM.from_pretrained(FIXTURES / "grouped" / "hf", dtype=torch.float32)
    peft = PeftModel.from_pretrained(hf, tmp_path / "peft").eval()
    with torch.no_grad():
        theirs = peft(input_ids=torch.tensor([prompt])).logits.numpy()[0, -1]
    first = start + 1 if prompt[start + 1 : start + 3] == [3, 250] else start
    assert relative(theirs, in_two_passes(model, adapter, prompt, first)) < 3 * FLOAT32


def test_log_probabilities_are_those_of_the_other_client():
    base, model = FIXTURES / "eq" / "eq-f32.gguf", dr.load_model(FIXTURES / "eq" / "eq-f32.gguf")
    adapter = dr.load_adapter(FIXTURES / "eq" / "lora.gguf", model)
    scales, prompts = (0.5, 0.0), (TOKENS, TOKENS[:4])
    rows = llama_cpp.log_probabilities(base, adapter, prompts, scales)
    llama = Llama(base, [FIXTURES / "eq" / "lora.gguf"])
    for scale, per_scale in zip(scales, rows):
        for tokens, row in zip(prompts, per_scale):
            assert relative(row, llama.log_probabilities(tokens, [scale])) < 1e-6
