"""What is fuzzed: every reader of a file from outside, with small good files as seeds.

A Target passes the bytes of one file to everything in the package that reads such a file; the other files of its
directory are good. A reader returns or raises InputError: anything else, a RuntimeWarning included, is a bug.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType as Type

from deltanet_ref import ops
from deltanet_ref.cli.convert import is_adapter
from deltanet_ref.cli.info import describe
from deltanet_ref.errors import InputError
from deltanet_ref.formats import tokenizer as tokenizers
from deltanet_ref.formats.gguf import StringArray, read_gguf, write_gguf
from deltanet_ref.formats.quants import dequantize, quantize
from deltanet_ref.formats.safetensors import read_safetensors, write_safetensors
from deltanet_ref.formats.tokenizer import load_tokenizer, tokenizer_metadata
from deltanet_ref.lora.adapter import Adapter, open_adapter
from deltanet_ref.lora.bridge import PEFT_CONFIG, PEFT_WEIGHTS
from deltanet_ref.lora.verify import verify
from deltanet_ref.model.config import Config
from deltanet_ref.model.convert import hf_config, open_base, write_base
from deltanet_ref.model.load import weights_from_gguf, weights_from_hf
from deltanet_ref.model.qwen35 import Qwen35
from deltanet_ref.model.tensors import expected_tensors, hf_shape, linear_tensors
from deltanet_ref.model.weights import Weights
from deltanet_ref.train.data import encode_dataset, read_dataset

CONFIG = Config(
    vocab_size=12,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=3,
    linear_value_head_dim=5,
    linear_conv_kernel_dim=4,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    partial_rotary_factor=0.25,
    mrope_section=(1, 0, 0),
    layer_types=("linear_attention", "full_attention"),
    tie_word_embeddings=True,
    max_position_embeddings=64,
)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
TURNS = [{"role": "user", "content": "ab ba"}, {"role": "assistant", "content": "bab"}]
TOKENIZER = {
    "added_tokens": [
        {"id": 9, "content": "<|im_end|>", "special": True},
        {"id": 10, "content": "<think>", "special": False},
    ],
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": tokenizers.PRE_TOKENIZERS["qwen35"]}},
    "model": {
        "type": "BPE",
        "vocab": {t: i for i, t in enumerate(["a", "b", "Ġ", "ab", "Ġab", "ba", "Ċ", ":", "u"])},
        "merges": [["a", "b"], ["Ġ", "ab"], "b a"],
    },
}
TOKENIZER_CONFIG = {
    "eos_token": {"content": "<|im_end|>"},
    "pad_token": "<think>",
    "bos_token": None,
    "chat_template": [{"name": "default", "template": TEMPLATE}],
}


class Target(NamedTuple):
    """One kind of file."""

    seeds: Callable  # directory with good files of all kinds -> list of bytes
    readers: Callable  # (directory for one run, bytes) -> list of functions without arguments


def read(target, directory, raw):
    """Pass raw to every reader of a target -> whether one of them accepted it. Raises anything but InputError."""
    accepted = False
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for reader in TARGETS[target].readers(directory, raw):
            try:
                reader()
                accepted = True
            except InputError as error:
                if not str(error) or "\n" in str(error):
                    raise AssertionError(f"no clear line: {str(error)!r}") from error
    return accepted


def good_tensors():
    """GGUF name -> array of the small model."""
    rng = np.random.default_rng(0)
    return {
        name: -np.ones(spec.shape, np.float32)
        if name.endswith("ssm_a")
        else rng.standard_normal(spec.shape).astype(np.float32)
        for name, spec in expected_tensors(CONFIG).items()
    }


def make_good_files(directory):
    """model.gguf, quantised.gguf, adapter.gguf, hf/ and peft/ of one small model."""
    rng, directory = np.random.default_rng(1), Path(directory)
    directory.mkdir(exist_ok=True)
    metadata = CONFIG.to_gguf_metadata() | tokenizer_metadata(TOKENIZER, TEMPLATE, CONFIG.vocab_size)
    write_gguf(directory / "model.gguf", metadata, good_tensors())
    kinds = [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.Q6_K, Type.MXFP4]
    write_gguf(
        directory / "quantised.gguf",
        {"flags": [True, False], "i64": np.int64(-3), "words": ["a", ""]},
        {kind.name: (quantize(rng.standard_normal((1, 256)), kind), kind, (1, 256)) for kind in kinds},
    )
    factors = {
        f"{name}.lora_{factor}": rng.standard_normal(shape).astype(np.float32)
        for name, spec in linear_tensors(CONFIG).items()
        for factor, shape in (("a", (2, spec.shape[1])), ("b", (spec.shape[0], 2)))
    }
    adapter = Adapter(CONFIG, factors, 3.0, {"task_name": "t", "prompt_prefix": "p", "invocation_tokens": [1, 2]})
    adapter.save_gguf(directory / "adapter.gguf")
    adapter.save_peft(directory / "peft", "f16")
    (directory / "hf").mkdir()
    write_safetensors(
        directory / "hf" / "model.safetensors",
        {spec.hf_name: np.ones(hf_shape(spec), np.float32) for spec in expected_tensors(CONFIG).values()},
    )
    for name, value in (
        ("config.json", hf_config(CONFIG, "float32")),
        ("tokenizer.json", TOKENIZER),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        (directory / "hf" / name).write_text(json.dumps(value))


# ---- readers: each uses what it reads, so that faults which show only in use are found too


def contents(path):
    file = read_gguf(path)
    for value in file.metadata.values():
        list(value) if isinstance(value, StringArray) else repr(value)
    for tensor in file.tensors.values():
        dequantize(tensor.raw, tensor.type, tensor.shape)


def tokenize(path):
    tokenizer = load_tokenizer(path)
    tokenizer.decode(tokenizer.encode("ab<think> ba<|im_end|>"))
    tokenizer.decode(range(tokenizer.vocab_size))
    assert isinstance(tokenizer.eos_ids, set)
    converse(tokenizer)


def converse(tokenizer):
    assert isinstance(tokenizer.apply_chat_template(TURNS, add_generation_prompt=True), str)


def model(path):
    load = weights_from_hf if path.is_dir() else lambda path, *how: weights_from_gguf(read_gguf(path), *how)
    _, weights, _ = load(path, "float32", ops)
    for name in weights:
        assert weights[name].shape == weights.shape(name)


def adapter(path):
    is_adapter(path)
    read = open_adapter(path, CONFIG, np.float32)
    assert all(np.isfinite(read.tensors[name]).all() for name in read.tensors)
    assert all(isinstance(read.metadata.get(name, ""), str) for name in ("task_name", "prompt_prefix"))
    assert all(isinstance(token, int) for token in read.metadata.get("invocation_tokens", []))


def convert_model(path):
    """To both forms, in float16, which may not hold the values."""
    for output in (path.parent / "converted.gguf", path.parent / "converted"):
        write_base(open_base(path), output, "f16")
        output.unlink() if output.is_file() else shutil.rmtree(output)


@cache
def base():
    return Qwen35(CONFIG, Weights(CONFIG, good_tensors(), np.float32, ops))


def verify_adapter(path):
    verify(base(), path, [[1, 2, 3], [4, 5]])


def information(path):
    json.dumps(describe(path))


# a template of the letters in the vocabulary
ROWS_TEMPLATE = (
    "{% for m in messages %}{{ 'a' if m.role == 'assistant' else 'b' }}:{{ m.content }}{{ eos_token }}{% endfor %}"
)
ROWS = (
    {"text": "ab ba"},
    {"prompt": "ab", "completion": " ab"},
    {"instruction": "ba", "input": "a", "output": "b"},
    {"messages": TURNS, "tools": [{"name": "a"}]},
    {
        "messages": [
            {"role": "system", "content": "a"},
            TURNS[0],
            TURNS[1] | {"reasoning_content": "a", "tool_calls": []},
        ]
    },
    {"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "b"}]},
)


def rows(path):
    tokenizer = load_tokenizer(path.parent / "hf")
    tokenizer.chat_template = ROWS_TEMPLATE
    for mask_prompt in (True, False):
        encode_dataset(read_dataset(path)["train"], tokenizer, mask_prompt=mask_prompt, seq_len=64, truncate=True)


def arrays(path):
    tensors = read_safetensors(path)
    for name in tensors:
        assert tensors[name].shape == tensors.shape(name)


# ---- targets


def gguf_readers(directory, raw):
    path = directory / "raw.gguf"
    path.write_bytes(raw)
    readers = contents, tokenize, model, convert_model, adapter, verify_adapter, information
    return [partial(reader, path) for reader in readers]


def safetensors_readers(directory, raw):
    weights = [directory / "hf" / "model.safetensors", directory / "peft" / PEFT_WEIGHTS]
    for path in weights:
        path.write_bytes(raw)
    return [
        partial(arrays, weights[0]),
        partial(model, weights[0].parent),
        partial(convert_model, weights[0].parent),
        partial(adapter, weights[1].parent),
        partial(verify_adapter, weights[1].parent),
        partial(information, weights[1].parent),
    ]


def directory_readers(name, readers, directory, raw):
    path = directory / name
    path.write_bytes(raw)
    return [partial(reader, path.parent) for reader in readers]


def template_readers(directory, raw):
    tokenizer = load_tokenizer(directory / "hf")
    tokenizer.chat_template = raw.decode("utf-8", "replace")
    return [partial(converse, tokenizer)]


def files(*names):
    return lambda good: [(good / name).read_bytes() for name in names]


def in_directory(name, *readers):
    return Target(files(name), partial(directory_readers, name, readers))


def index_seed(good):
    names = read_safetensors(good / "hf")
    return [json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}).encode()]


TARGETS = {
    "gguf": Target(files("model.gguf", "quantised.gguf", "adapter.gguf"), gguf_readers),
    "safetensors": Target(files("hf/model.safetensors", f"peft/{PEFT_WEIGHTS}"), safetensors_readers),
    "index": Target(index_seed, partial(directory_readers, "hf/model.safetensors.index.json", [model])),
    "config": in_directory("hf/config.json", model, convert_model, information),
    "adapter_config": in_directory(f"peft/{PEFT_CONFIG}", adapter, verify_adapter, information),
    "tokenizer": in_directory("hf/tokenizer.json", tokenize, convert_model),
    "tokenizer_config": in_directory("hf/tokenizer_config.json", tokenize, convert_model),
    "template": Target(
        lambda good: [TEMPLATE.encode(), b"{% macro f(x) %}{{ x }}{% endmacro %}{{ f(tools) }}"], template_readers
    ),
    "rows": Target(
        lambda good: [json.dumps(row).encode() for row in ROWS],
        partial(directory_readers, "rows.jsonl", [lambda directory: rows(directory / "rows.jsonl")]),
    ),
}
