"""Conversions compared with the official converters' files, and round trips that change no bit."""

import json
import shutil

import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType as Type, GGUFReader, quants as gguf_quants
from safetensors.numpy import load_file, save_file

from deltanet_ref import load_model
from deltanet_ref.cli.main import main
from deltanet_ref.errors import InputError
from deltanet_ref.formats.gguf import read_gguf, write_gguf
from deltanet_ref.formats.safetensors import read_safetensors, write_safetensors
from deltanet_ref.lora.adapter import open_adapter
from deltanet_ref.model.convert import open_base, write_base
from deltanet_ref.model.tensors import expected_tensors
from tests.paths import FIXTURES
from tests.test_adapter import edit_peft, random_adapter, small_model
from tests.test_load import random_hf_tensors, random_tensors, small_config, write_hf, write_model

MODELS = ["eq", "grouped"]


def stored(path):
    """name -> (type, shape, bytes) of a GGUF or safetensors file."""
    if path.suffix == ".gguf":
        return {t.name: (t.type.name, t.shape, t.raw.tobytes()) for t in read_gguf(path).tensors.values()}
    file = read_safetensors(path)
    return {name: (file.stored(name).dtype, file.shape(name), file.stored(name).raw.tobytes()) for name in file}


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


# ---- base models


@pytest.mark.parametrize(
    "model, choice, official",
    [
        ("eq", "f32", "eq-f32"),
        ("grouped", None, "grouped-f32"),
        ("grouped", "f16", "grouped-f16"),
        ("grouped", "q8_0", "grouped-q8_0"),
    ],
)
def test_an_hf_directory_becomes_the_official_converters_bytes(model, choice, official, tmp_path):
    write_base(open_base(FIXTURES / model / "hf"), tmp_path / "a.gguf", choice)
    ours, theirs = read_gguf(tmp_path / "a.gguf"), read_gguf(FIXTURES / model / f"{official}.gguf")
    assert stored(ours.path) == stored(theirs.path)
    differing = {
        key
        for key in ours.metadata.keys() | theirs.metadata.keys()
        if np.ndim(theirs.metadata.get(key)) == 0 and ours.metadata.get(key) != theirs.metadata.get(key)
    }
    assert differing == {"general.name", "general.size_label"}  # the directory's name, and a label for people
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"):
        assert list(ours.metadata[key]) == list(theirs.metadata[key])


def test_bf16_is_the_gguf_packages(tmp_path):
    write_base(open_base(FIXTURES / "eq" / "hf"), tmp_path / "a.gguf", "bf16")
    for tensor in GGUFReader(FIXTURES / "eq" / "eq-f32.gguf").tensors:
        kind, shape, raw = stored(tmp_path / "a.gguf")[tensor.name]
        matrix = len(shape) == 2 and "conv1d" not in tensor.name
        assert kind == ("BF16" if matrix else "F32")
        assert raw == gguf_quants.quantize(tensor.data, Type.BF16 if matrix else Type.F32).tobytes()


@pytest.mark.parametrize("model", MODELS)
def test_a_gguf_file_becomes_the_hf_directory_that_it_was_made_from(model, tmp_path):
    """Except norms and A_log, which the file holds as 1 + w and -exp(A_log), rounded to float32."""
    assert convert(FIXTURES / model / f"{model}-f32.gguf", "-o", tmp_path / "hf") == 0
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "hf", FIXTURES / model / "hf"))
    assert set(ours) == set(theirs)
    for name, x in theirs.items():
        if x.ndim > 1 or name.endswith(("dt_bias", "linear_attn.norm.weight")):
            assert ours[name].tobytes() == x.tobytes(), name
        # 1 + w below 2 is rounded to 2^-24; relative 2^-24 of exp(A_log) and of A_log itself, absolute in A_log
        np.testing.assert_allclose(ours[name], x, rtol=6e-8, atol=1.2e-7, err_msg=name)
    ours, theirs = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "hf", FIXTURES / model / "hf")
    )
    unsaid = {"attention_dropout", "initializer_range", "transformers_version", "use_cache"}
    assert {key for key in theirs if ours.get(key) != theirs[key]} == unsaid


@pytest.mark.parametrize("model", MODELS)
def test_the_tokenizer_files_encode_as_hf_does(model, tmp_path):
    assert convert(FIXTURES / model / f"{model}-f32.gguf", "-o", tmp_path / "hf") == 0
    ours, theirs = (
        tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        for path in (tmp_path / "hf", FIXTURES / model / "hf")
    )
    texts = [case["text"] for case in json.loads((FIXTURES / "tokens.json").read_text())]
    assert len(texts) > 10
    for text in texts:
        assert ours.encode(text).ids == theirs.encode(text).ids
    assert ours.decode(ours.encode("tide <think> and time").ids, skip_special_tokens=False) == "tide <think> and time"
    ours, theirs = (path / "chat_template.jinja" for path in (tmp_path / "hf", FIXTURES / model / "hf"))
    assert ours.read_bytes() == theirs.read_bytes()
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>" and settings["pad_token"] == "<|endoftext|>"


@pytest.mark.parametrize("ratio, tied", [(1, True), (2, False), (3, False)])
def test_gguf_to_hf_and_back_changes_no_bit_of_a_matrix(ratio, tied, tmp_path):
    config = small_config(2, ratio, tied=tied)
    write_model(tmp_path / "a.gguf", config, random_tensors(config))
    write_base(open_base(tmp_path / "a.gguf"), tmp_path / "hf")
    write_base(open_base(tmp_path / "hf"), tmp_path / "b.gguf")
    before, after = stored(tmp_path / "a.gguf"), stored(tmp_path / "b.gguf")
    assert list(before) == list(after)
    for name, spec in expected_tensors(config).items():
        if spec.value in ("same", "squeeze"):
            assert before[name] == after[name], name
        else:  # two roundings to float32, of w or of log(-ssm_a), at most 4 here
            x, y = (np.frombuffer(t[name][2], np.float32) for t in (before, after))
            np.testing.assert_allclose(y, x, rtol=4 * 6e-8, atol=6e-8, err_msg=name)


def test_a_multimodal_directory_is_converted_to_its_text_model_with_a_note(tmp_path, capsys):
    config = small_config()
    hf = random_hf_tensors(config)
    write_hf(tmp_path / "text", config, hf)
    extra = {"visual.patch.weight": np.ones((2, 3), np.float32), "mtp.fc.weight": np.ones((2, 2), np.float32)}
    write_hf(tmp_path / "multimodal", config, hf | extra, prefix="model.language_model.", wrapped=True)
    for name in ("text", "multimodal"):
        assert convert(tmp_path / name, "-o", tmp_path / f"{name}.gguf") == 0
    assert stored(tmp_path / "text.gguf") == stored(tmp_path / "multimodal.gguf")
    assert "1 vision tensor skipped" in (err := capsys.readouterr().err) and "multi-token prediction" in err


def test_a_directory_in_bf16_keeps_its_bytes_both_ways(tmp_path):
    write_base(open_base(FIXTURES / "grouped" / "hf"), tmp_path / "bf16", "bf16")
    write_base(open_base(tmp_path / "bf16"), tmp_path / "a.gguf")
    write_base(open_base(tmp_path / "a.gguf"), tmp_path / "again")
    before, after = (stored(tmp_path / name / "model.safetensors") for name in ("bf16", "again"))
    matrices = [name for name, (kind, _, _) in before.items() if kind == "BF16"]
    assert len(matrices) == 33 and all(before[name] == after[name] for name in matrices)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


# ---- adapters


@pytest.mark.parametrize("model", MODELS)
def test_a_peft_directory_becomes_the_official_converters_tensors(model, tmp_path):
    assert convert(FIXTURES / model / "lora", "-o", tmp_path / "a.gguf", "--base", FIXTURES / model / "hf") == 0
    assert stored(tmp_path / "a.gguf") == stored(FIXTURES / model / "lora.gguf")
    theirs = read_gguf(FIXTURES / model / "lora.gguf").metadata
    ours = read_gguf(tmp_path / "a.gguf").metadata
    assert ours == {key: theirs[key] for key in ours}


@pytest.mark.parametrize("H_k, ratio", [(4, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("types", ["F32", "F16", "BF16", "mixed"])
def test_peft_to_gguf_to_peft_changes_no_byte(H_k, ratio, types, tmp_path):
    """For every target of the architecture; each factor keeps its type."""
    model = small_model(H_k=H_k, ratio=ratio)
    config, base = model.config, tmp_path / "base.gguf"
    write_model(base, config, random_tensors(config))
    adapter = random_adapter(model, rank=3, alpha=5)
    kinds = ["F32", "F16", "BF16"] if types == "mixed" else [types]
    adapter.types = {name: kinds[i % len(kinds)] for i, name in enumerate(adapter.tensors)}
    adapter.save_peft(tmp_path / "one", "kept", "model.language_model.")
    assert convert(tmp_path / "one", "-o", tmp_path / "a.gguf", "--base", base) == 0
    assert (
        convert(tmp_path / "a.gguf", "-o", tmp_path / "two", "--base", base, "--prefix", "model.language_model.") == 0
    )
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert {kind for kind, _, _ in stored(tmp_path / "a.gguf").values()} == set(kinds)


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_gguf_to_peft_to_gguf_changes_no_byte_of_the_file(ratio, tmp_path):
    model = small_model(ratio=ratio)
    write_model(tmp_path / "base.gguf", model.config, random_tensors(model.config))
    adapter = random_adapter(model, rank=2, alpha=3.5)
    adapter.metadata = {"task_name": "scots", "prompt_prefix": "Say: ", "invocation_tokens": [5, 9]}
    adapter.save_gguf(tmp_path / "a.gguf", "bf16")
    assert convert(tmp_path / "a.gguf", "-o", tmp_path / "peft", "--base", tmp_path / "base.gguf") == 0
    assert convert(tmp_path / "peft", "-o", tmp_path / "b.gguf", "--base", tmp_path / "base.gguf") == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_unequal_scales_are_multiplied_into_b_in_float64_and_the_rest_keeps_its_bytes(tmp_path, capsys):
    base = FIXTURES / "eq" / "hf"
    pattern = {r"layers\.0\.mlp\.up_proj": 3, "k_proj": 11}
    peft = edit_peft(FIXTURES / "eq" / "lora", tmp_path / "peft", alpha_pattern=pattern, use_rslora=True)
    assert convert(peft, "-o", tmp_path / "a.gguf", "--base", base) == 0
    assert "2 of 31 tensors" in capsys.readouterr().err
    plain, folded = stored(FIXTURES / "eq" / "lora.gguf"), stored(tmp_path / "a.gguf")
    alpha = read_gguf(tmp_path / "a.gguf").metadata["adapter.lora.alpha"]
    assert alpha == np.float32(8 * 4**0.5)  # PEFT's documentation: alpha / sqrt(r), here r = 4
    for target, quotient in (("blk.0.ffn_up", 3 / 8), ("blk.3.attn_k", 11 / 8)):
        b = np.frombuffer(plain.pop(f"{target}.weight.lora_b")[2], np.float32).astype(np.float64)
        ours = np.frombuffer(folded.pop(f"{target}.weight.lora_b")[2], np.float32)
        assert ours.tobytes() == (b * quotient).astype(np.float32).tobytes()
    assert plain == folded


EXTRA = {
    "base_model.model.model.layers.0.linear_attn.conv1d.lora_A.weight": "conv1d",
    "base_model.model.model.layers.0.linear_attn.A_log.lora_B.weight": "A_log",
    "base_model.model.model.layers.1.linear_attn.dt_bias.lora_A.weight": "dt_bias",
    "base_model.model.model.embed_tokens.lora_embedding_A": "embed_tokens",
    "base_model.model.lm_head.weight": "modules_to_save",
    "base_model.model.model.layers.3.self_attn.q_proj.lora_magnitude_vector.weight": "dora",
    "base_model.model.model.layers.3.self_attn.q_proj.base_layer.bias": "bias",
}
SETTINGS = {"use_dora": True, "modules_to_save": ["lm_head"], "bias": "lora_only"}


def test_entries_that_are_not_plain_lora_are_listed_and_refused_unless_dropped(tmp_path, capsys):
    source, base = FIXTURES / "eq" / "lora", FIXTURES / "eq" / "hf"
    weights = load_file(source / "adapter_model.safetensors") | {key: np.ones((2, 2), np.float32) for key in EXTRA}
    peft = edit_peft(source, tmp_path / "peft", weights, **SETTINGS)
    convert_it = (peft, "-o", tmp_path / "a.gguf", "--base", base)
    assert convert(*convert_it) == 2
    error = capsys.readouterr().err
    for part in ("use_dora = True", "modules_to_save = ['lm_head']", "bias = 'lora_only'", *EXTRA):
        assert part in error
    drop = error.split("--drop ")[1].split()[0]
    assert set(drop.split(",")) == set(EXTRA.values())
    assert convert(*convert_it, "--drop", "dora,modules_to_save,bias,embed_tokens") == 2
    error = capsys.readouterr().err
    for key, kind in EXTRA.items():
        assert (key in error) == (kind in ("conv1d", "A_log", "dt_bias")), key
    assert not (tmp_path / "a.gguf").exists()
    assert convert(*convert_it, "--drop", drop) == 0
    assert "left out, as --drop requests" in capsys.readouterr().err
    assert stored(tmp_path / "a.gguf") == stored(FIXTURES / "eq" / "lora.gguf")


def test_metadata_given_on_the_command_line_is_in_the_adapter(tmp_path):
    base = FIXTURES / "eq" / "eq-f32.gguf"
    assert (
        convert(
            FIXTURES / "eq" / "lora.gguf",
            "-o",
            tmp_path / "a.gguf",
            "--base",
            base,
            "--type",
            "f16",
            "--task-name",
            "scots",
            "--prompt-prefix",
            "Say: ",
            "--invocation",
            "<think>",
        )
        == 0
    )
    fields = {f.name: f.contents() for f in GGUFReader(tmp_path / "a.gguf").fields.values()}
    assert fields["adapter.lora.task_name"] == "scots" and fields["adapter.lora.prompt_prefix"] == "Say: "
    assert fields["adapter.alora.invocation_tokens"] == [453]
    x, y = (
        open_adapter(path, open_base(base).config).tensors
        for path in (FIXTURES / "eq" / "lora.gguf", tmp_path / "a.gguf")
    )
    for name in x:
        np.testing.assert_array_equal(y[name], x[name].astype(np.float16))


def test_types_are_accepted_as_info_prints_them(tmp_path):
    hf, lora = FIXTURES / "grouped" / "hf", FIXTURES / "grouped" / "lora.gguf"
    assert convert(hf, "-o", tmp_path / "a.gguf", "--type", "Q8_0") == 0
    assert stored(tmp_path / "a.gguf") == stored(FIXTURES / "grouped" / "grouped-q8_0.gguf")
    assert convert(lora, "-o", tmp_path / "b.gguf", "--base", hf, "--type", "BF16") == 0
    assert {kind for kind, _, _ in stored(tmp_path / "b.gguf").values()} == {"BF16"}


# ---- what is refused


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["eq/lora", "-o", "{out}/a.gguf"], "needs --base"),
        (["eq/lora", "-o", "{out}/a.gguf", "--base", "eq/lora.gguf"], "not 'model'"),
        (["grouped/lora", "-o", "{out}/a.gguf", "--base", "eq/hf"], "misshapen"),
        (["eq/lora", "-o", "{out}/a.gguf", "--base", "eq/hf", "--type", "q8_0"], "LoRA factors cannot be stored as"),
        (["eq/hf", "-o", "{out}/a", "--type", "q8_0"], "ends in .gguf"),
        (["eq/hf", "-o", "{out}/a.gguf", "--drop", "dora"], "--drop is for adapters"),
        (["eq/hf", "-o", "{out}/none/a.gguf"], "create it first"),
        (["eq/eq-f32.gguf", "-o", "{out}/full"], "exists already"),
        (["eq/golden", "-o", "{out}/a.gguf"], "neither adapter_config.json nor config.json"),
        (["eq/absent.gguf", "-o", "{out}/a.gguf"], "cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, match, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("kept")
    assert convert(*(FIXTURES / a if "/" in a and "{" not in a else a.format(out=tmp_path) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["full", "full/kept.txt"]


def test_an_input_is_not_overwritten(tmp_path, capsys):
    path = shutil.copy(FIXTURES / "eq" / "eq-f32.gguf", tmp_path / "a.gguf")
    assert convert(path, "-o", path, "--type", "f16") == 2 and "is an input too" in capsys.readouterr().err
    assert stored(path) == stored(FIXTURES / "eq" / "eq-f32.gguf")


def test_values_beyond_float16_are_named_and_nothing_is_left(tmp_path):
    config = small_config()
    tensors = random_tensors(config)
    tensors["blk.1.ffn_up.weight"][3, 4] = 70000
    write_model(tmp_path / "a.gguf", config, tensors)
    with pytest.raises(InputError, match="blk.1.ffn_up.weight: values are too large for f16"):
        write_base(open_base(tmp_path / "a.gguf"), tmp_path / "b.gguf", "f16")
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_a_damaged_adapter_in_safetensors_is_refused(tmp_path, capsys):
    peft = edit_peft(FIXTURES / "eq" / "lora", tmp_path / "peft")
    weights = peft / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert convert(peft, "-o", tmp_path / "a.gguf", "--base", FIXTURES / "eq" / "hf") == 2
    assert "not a safetensors file" in capsys.readouterr().err


def test_streamed_bytes_of_the_wrong_size_do_not_become_a_file(tmp_path):
    with pytest.raises(InputError, match="needs 48 bytes, 44 were given"):
        write_gguf(tmp_path / "a.gguf", {}, {"w": (lambda: np.zeros(11, np.float32), Type.F32, (3, 4))})
    assert not list(tmp_path.iterdir())


def test_safetensors_are_the_librarys_bytes(tmp_path):
    rng = np.random.default_rng(2)
    tensors = {
        "z": rng.standard_normal((3, 5)),
        "a": rng.standard_normal((7, 2)).astype(np.float32),
        "i": np.arange(9),
        "h": rng.standard_normal(4).astype(np.float16),
        "b": np.array([True, False, True]),
        "n": np.array(2.5),
    }
    write_safetensors(tmp_path / "ours", tensors, {"é": "ü"})
    save_file(tensors, tmp_path / "theirs", {"é": "ü"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("target", ["again.gguf", "hf"])
@pytest.mark.parametrize("source", ["gguf", "hf"])
def test_a_tensor_that_is_not_finite_is_refused_by_name(tmp_path, source, target):
    """Copied byte for byte or converted, before anything is written."""
    path = tmp_path / ("bad.gguf" if source == "gguf" else "bad")
    if source == "gguf":
        file = read_gguf(FIXTURES / "eq" / "eq-f32.gguf")
        tensors = {name: (t.raw, t.type, t.shape) for name, t in file.tensors.items()}
        raw = np.array(tensors["blk.2.ffn_up.weight"][0]).view(np.float32)
        raw[7] = np.nan
        write_gguf(
            path,
            file.metadata,
            tensors | {"blk.2.ffn_up.weight": (raw.view(np.uint8), *tensors["blk.2.ffn_up.weight"][1:])},
        )
    else:
        shutil.copytree(FIXTURES / "eq" / "hf", path)
        tensors = load_file(path / "model.safetensors")
        tensors["model.layers.2.mlp.up_proj.weight"][3, 1] = -np.inf
        save_file(tensors, path / "model.safetensors")
    with pytest.raises(InputError, match="blk.2.ffn_up.weight holds values that are not finite"):
        write_base(open_base(path), tmp_path / target)
    assert not (tmp_path / target).exists()
    model = load_model(path, backend="numpy")  # and where it is used
    with pytest.raises(InputError, match="blk.2.ffn_up.weight holds values that are not finite"):
        model.logits(np.array([[1, 2]]))
