"""Merged models compared with PEFT's logits, plain NumPy sums, llama-quantize's types and the bytes of the base."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type, GGUFReader, quants as gguf_quants
from safetensors.numpy import load_file

import deltanet_ref as dr
from deltanet_ref.cli.main import main
from deltanet_ref.errors import InputError
from deltanet_ref.formats.gguf import read_gguf, write_gguf
from deltanet_ref.lora.merge import merge
from deltanet_ref.model.convert import open_base, write_base
from tests.paths import FIXTURES
from tests.test_adapter import model_of, random_adapter, small_model
from tests.test_convert import stored
from tests.test_load import random_tensors, small_config, write_model
from tests.test_ops_backward import ONE
from tests.tolerances import (
    STORED,
    assert_close,
    assert_within,
    assert_within_floors,
    relative,
    rounding,
    weight_floors,
)

MODELS = ["eq", "grouped"]


def base(model):
    return FIXTURES / model / f"{model}-f32.gguf"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("output", ["a.gguf", "hf"])
def test_merged_models_give_pefts_logits(model, output, tmp_path):
    """In float64. The limit follows from the files: they hold 1 + w and W + B A rounded to float32, either of which
    moves the logits by up to 1.4e-7 (fixtures/README.md), and the goldens are rounded to float32 (6e-8)."""
    golden, tokens = (FIXTURES / model / "golden" / name for name in ("hf_lora.npz", "tokens.json"))
    tokens, golden = json.loads(tokens.read_text()), np.load(golden)
    for scale, prefix in ((1.0, ""), (0.5, "half/")):
        path = tmp_path / f"{scale}-{output}"
        merge(base(model), [(FIXTURES / model / "lora", scale)], path)
        logits = dr.load_model(path, dtype="float64").logits(np.array([tokens["t65"]]))[0]
        assert_close(f"logits at scale {scale}", logits, golden[f"{prefix}t65/logits"].reshape(logits.shape), 4e-7)


@pytest.mark.parametrize("model", MODELS)
def test_an_hf_directory_is_merged_in_its_own_order_and_the_rest_is_copied(model, tmp_path):
    """W + alpha / r B A with the PEFT directory's own factors, in HF's order: no head is permuted."""
    source = FIXTURES / model / "hf"
    merge(source, [(FIXTURES / model / "lora", 0.5)], tmp_path / "hf")
    before, after, lora = (
        load_file(path)
        for path in (
            source / "model.safetensors",
            tmp_path / "hf/model.safetensors",
            FIXTURES / model / "lora" / "adapter_model.safetensors",
        )
    )
    changed = 0
    for name, w in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in lora:
            a, b = (lora[f"{key}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
            w, changed = (w + 0.5 * 8 / 4 * (b @ a)).astype(np.float32), changed + 1
            assert_within(name, after[name], w, 2 * STORED["float32"] * np.abs(w))  # one unit of float32
        else:
            assert after[name].tobytes() == w.tobytes(), name
    assert changed == 31
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()


def test_several_adapters_add_up(tmp_path):
    model = small_model("float64")
    write_model(tmp_path / "base.gguf", model.config, random_tensors(model.config))
    adapters = [
        random_adapter(model, seed=1, rank=3, alpha=2, targets="attn_qkv,ffn_up"),
        random_adapter(model, seed=2, rank=2, alpha=5, targets="ffn_up,ssm_out"),
    ]
    for i, adapter in enumerate(adapters):
        adapter.save_gguf(tmp_path / f"{i}.gguf")
    merge(tmp_path / "base.gguf", [(tmp_path / "0.gguf", 0.7), (tmp_path / "1.gguf", -1.5)], tmp_path / "m.gguf")
    before, after = ({t.name: t.data for t in GGUFReader(tmp_path / f"{name}.gguf").tensors} for name in ("base", "m"))
    for name, w in before.items():
        w, magnitude = w.astype(np.float64), np.abs(w.astype(np.float64))
        for adapter, scale in zip(adapters, (0.7, -1.5)):
            if f"{name}.lora_a" in adapter.tensors:
                a, b = (np.float32(adapter.tensors[f"{name}.lora_{f}"]).astype(np.float64) for f in "ab")
                w += scale * adapter.alpha / len(a) * (b @ a)
                magnitude += np.abs(scale) * adapter.alpha / len(a) * (np.abs(b) @ np.abs(a))
        assert_within(name, after[name], w, STORED["float32"] * np.abs(w) + rounding(8) * magnitude)


def test_what_no_adapter_changes_is_copied_byte_for_byte(tmp_path):
    """Metadata included, and tensors that do not belong to the text model."""
    config = small_config()
    tensors = random_tensors(config) | {"v.blk.0.weight": np.ones((3, 4), np.float32)}
    file = write_model(tmp_path / "base.gguf", config, tensors, **{"general.name": "mine", "x.list": np.arange(3)})
    model = small_model()
    random_adapter(model, rank=2, targets="ffn_up").save_gguf(tmp_path / "a.gguf")
    merge(tmp_path / "base.gguf", [(tmp_path / "a.gguf", 1.0)], tmp_path / "m.gguf")
    before, after = stored(tmp_path / "base.gguf"), stored(tmp_path / "m.gguf")
    assert list(before) == list(after)
    assert {name for name in before if before[name] != after[name]} == {
        f"blk.{i}.ffn_up.weight" for i in range(config.num_hidden_layers)
    }
    ours = read_gguf(tmp_path / "m.gguf").metadata
    assert ours.keys() == file.metadata.keys() and ours["general.name"] == "mine"


def test_q4_k_m_chooses_the_types_of_llama_quantize(tmp_path):
    source = FIXTURES / "quant" / "quant-q8_0.gguf"
    write_base(open_base(source), tmp_path / "a.gguf", "q4_k_m")
    ours, theirs = read_gguf(tmp_path / "a.gguf"), read_gguf(FIXTURES / "quant" / "quant-Q4_K_M.gguf")
    assert {t.name: t.type for t in ours.tensors.values()} == {t.name: t.type for t in theirs.tensors.values()}
    assert ours.metadata["general.file_type"] == theirs.metadata["general.file_type"]


def test_rows_that_are_no_whole_blocks_fall_back_as_llama_quantize_does(tmp_path):
    config = small_config()  # rows of 20, 28 and 40: no type has blocks for them; 64 in the fixture
    write_model(tmp_path / "base.gguf", config, random_tensors(config))
    write_base(open_base(tmp_path / "base.gguf"), tmp_path / "a.gguf", "q4_k_m")
    assert {t.type for t in read_gguf(tmp_path / "a.gguf").tensors.values()} == {Type.F32, Type.F16}
    write_base(open_base(base("grouped")), tmp_path / "b.gguf", "q5_k")
    types = {name: t.type for name, t in read_gguf(tmp_path / "b.gguf").tensors.items() if t.type != Type.F32}
    assert types.pop("output.weight") == Type.Q8_0 and set(types.values()) == {Type.Q5_1}


@pytest.mark.parametrize("choice", ["f16", "bf16", "q8_0", None])
def test_merged_logits_are_base_and_adapter_to_the_types_rounding(choice, tmp_path):
    """In float32 on both sides. Rounding the weights to a type moves the logits of these random models by about ten
    times the error of the weights (9.2 for q8_0, a property of the model), which is far above float32's rounding.

    In float32 two computations are compared, each within ONE floor factor, and the file rounds the sums once more.
    """
    path = tmp_path / "m.gguf"
    losses = merge(base("grouped"), [(FIXTURES / "grouped" / "lora", 1.0)], path, choice)
    model = dr.load_model(base("grouped"))
    model.attach(dr.load_adapter(FIXTURES / "grouped" / "lora", model))
    tokens = np.array([[17, 401, 3, 3, 250, 88, 9, 444, 120, 61, 5]])
    assert len(losses) == (0 if choice is None else 33)
    merged, live = dr.load_model(path).logits(tokens), model.logits(tokens)
    if choice:
        assert_close(f"logits of {choice}", merged, live, 15 * max(loss.error for loss in losses))
    else:
        floors = weight_floors(dr.load_model(path, dtype="float64"), lambda m: [m.logits(tokens)], np.float32)
        assert_within_floors(["logits"], [merged], [live], floors, 2 * ONE + 1)


def test_the_reported_errors_are_those_of_the_file(tmp_path, capsys):
    quantised, exact = tmp_path / "q.gguf", tmp_path / "x.gguf"
    source, adapter = FIXTURES / "grouped" / "grouped-q8_0.gguf", FIXTURES / "grouped" / "lora"
    losses = merge(source, [(adapter, 1.0)], quantised)
    assert not merge(source, [(adapter, 1.0)], exact, "f32")
    before, meant, after = (
        {t.name: gguf_quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}
        for path in (source, exact, quantised)
    )
    assert len(losses) == 31 and all(loss.type == Type.Q8_0 for loss in losses)
    for loss in losses:
        assert loss.error == pytest.approx(relative(after[loss.name], meant[loss.name]), rel=1e-4)
        assert loss.change == pytest.approx(relative(meant[loss.name], before[loss.name]), rel=1e-4)
    assert (
        main(["merge", str(source), "--adapter", str(adapter), "--type", "Q8_0", "-o", str(tmp_path / "cli.gguf")]) == 0
    )
    out = capsys.readouterr().out
    assert all(f"{loss.name:32} Q8_0  {loss.error:9.2e} {loss.change:9.2e}" in out for loss in losses)
    assert (tmp_path / "cli.gguf").read_bytes() == quantised.read_bytes()


def test_the_peak_memory_is_a_few_tensors(tmp_path):
    """And not the whole model: 12 layers of 0.9 MB each, the largest tensor 0.3 MB."""
    config = replace(small_config(layer_types=["linear_attention"] * 12), hidden_size=256, intermediate_size=288)
    tensors = random_tensors(config)
    write_gguf(tmp_path / "base.gguf", config.to_gguf_metadata(), tensors)
    size, largest = sum(x.nbytes for x in tensors.values()), max(x.nbytes for x in tensors.values())
    adapter = random_adapter(model_of(config), rank=1)
    adapter.save_gguf(tmp_path / "a.gguf")
    del tensors, adapter
    for output, choice in (("m.gguf", None), ("m-f16.gguf", "f16"), ("hf", "bf16")):
        tracemalloc.start()
        merge(tmp_path / "base.gguf", [(tmp_path / "a.gguf", 1.0)], tmp_path / output, choice)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10 * largest < size / 3, (output, peak, largest, size)  # float64 sums, and the adapter itself


# ---- what is refused


def iq4_base(path):
    """A model with one tensor of a type that cannot be written."""
    config = replace(small_config(layer_types=["linear_attention", "full_attention"]), hidden_size=256)
    tensors = random_tensors(config)
    shape = tensors["blk.0.ffn_up.weight"].shape
    tensors["blk.0.ffn_up.weight"] = np.zeros(shape[0] * 136, np.uint8), Type.IQ4_XS, shape
    write_gguf(path, config.to_gguf_metadata(), tensors)
    return model_of(config)


def test_a_changed_tensor_of_a_type_that_is_not_written_is_refused_before_anything_is(tmp_path):
    model = iq4_base(tmp_path / "base.gguf")
    random_adapter(model, rank=2, targets="ffn_up").save_gguf(tmp_path / "a.gguf")
    random_adapter(model, rank=2, targets="ffn_down").save_gguf(tmp_path / "b.gguf")
    with pytest.raises(InputError, match="blk.0.ffn_up.weight IQ4_XS; choose another: f32"):
        merge(tmp_path / "base.gguf", [(tmp_path / "a.gguf", 1.0)], tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
    merge(tmp_path / "base.gguf", [(tmp_path / "b.gguf", 1.0)], tmp_path / "m.gguf")  # another tensor: copied
    assert stored(tmp_path / "m.gguf")["blk.0.ffn_up.weight"] == stored(tmp_path / "base.gguf")["blk.0.ffn_up.weight"]
    merge(tmp_path / "base.gguf", [(tmp_path / "a.gguf", 1.0)], tmp_path / "q.gguf", "q8_0")


def test_an_activated_lora_is_not_merged(tmp_path):
    adapter = random_adapter(small_model(), rank=2)
    adapter.metadata["invocation_tokens"] = [3, 4]
    adapter.save_gguf(tmp_path / "a.gguf")
    write_model(tmp_path / "base.gguf", adapter.config, random_tensors(adapter.config))
    with pytest.raises(InputError, match="activated LoRA"):
        merge(tmp_path / "base.gguf", [(tmp_path / "a.gguf", 1.0)], tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["--adapter", "eq/lora.gguf", "-o", "hf", "--type", "q8_0"], "ends in .gguf"),
        (["--adapter", "grouped/lora.gguf", "-o", "a.gguf"], "misshapen"),
        (["--adapter", "eq/lora.gguf=much", "-o", "a.gguf"], "is not a finite number"),
        (["--adapter", "eq/eq-f32.gguf", "-o", "a.gguf"], "general.type is 'model'"),
        (["--adapter", "eq/lora.gguf", "-o", "a.gguf", "--type", "q3_k"], "invalid choice"),
        (["-o", "a.gguf"], "--adapter"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, match, tmp_path, capsys):
    places = [str(FIXTURES / a) if "/" in a else str(tmp_path / a) if a in ("a.gguf", "hf") else a for a in arguments]
    assert main(["merge", str(base("eq")), *places]) == 2
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
