"""GGUF files of the real models' shapes with random weights, for measurements; llama.cpp loads them too.

    python bench/models.py 0.8B Q4_K_M              # build/models/0.8B-Q4_K_M.gguf, made unless it is there

A type's blocks are a million random values, quantised once and repeated with a period that is no multiple of a row. The
vocabulary is the real one, from the tests' fixtures.
"""

import argparse
import gzip
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Type

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from deltanet_ref.formats.gguf import read_gguf, write_gguf  # noqa: E402 (needs the path)
from deltanet_ref.formats.quants import quantize, stored_bytes  # noqa: E402
from deltanet_ref.model.config import Config  # noqa: E402
from deltanet_ref.model.convert import type_of_matrix  # noqa: E402
from deltanet_ref.model.tensors import expected_tensors  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DIRECTORY = ROOT / "build" / "models"
VOCABULARY = ROOT / "tests" / "fixtures" / "realvocab.gguf.gz"
SMALL = dict(
    num_hidden_layers=24,
    hidden_size=1024,
    intermediate_size=3584,
    num_attention_heads=8,
    num_key_value_heads=2,
    linear_num_value_heads=16,
)
SHAPES = {
    "0.8B": SMALL,
    "2B": SMALL | dict(hidden_size=2048, intermediate_size=6144),
    "4B": dict(
        num_hidden_layers=32,
        hidden_size=2560,
        intermediate_size=9216,
        num_attention_heads=16,
        num_key_value_heads=4,
        linear_num_value_heads=32,
    ),
    "tiny": SMALL | dict(num_hidden_layers=4, hidden_size=256, intermediate_size=512),
}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K", "Q4_K_M")
PERIOD = 1_000_003  # values, or the next whole number of blocks


def config_of(shape):
    """The Config of a published model's text part."""
    s = SHAPES[shape]
    return Config(
        **s,
        vocab_size=248_320,
        head_dim=256,
        linear_num_key_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6,
        rope_theta=1e7,
        partial_rotary_factor=0.25,
        mrope_section=(11, 11, 10),
        tie_word_embeddings=True,
        layer_types=tuple(
            "full_attention" if i % 4 == 3 else "linear_attention" for i in range(s["num_hidden_layers"])
        ),
        max_position_embeddings=32768,
    )


def random_gguf(shape, type):
    """Path of the file of a shape in a type (one of TYPES), made unless it is there."""
    path = DIRECTORY / f"{shape}-{type}.gguf"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    config, rng, drawn = config_of(shape), np.random.default_rng(0), {}
    metadata = config.to_gguf_metadata() | vocabulary() | {"general.name": f"random {shape}"}
    tensors = {}
    for name, spec in expected_tensors(config).items():
        if spec.linear or name == "token_embd.weight":
            kind = type_of_matrix("q4_k_m", spec, config) if type == "Q4_K_M" else Type[type]
            what = kind, spec.shape[1] ** -0.5
            if what not in drawn:
                drawn[what] = random_blocks(*what, rng)
            tensors[name] = (repeated(drawn[what], stored_bytes(kind, spec.shape)), kind, spec.shape)
        else:
            tensors[name] = small_tensor(name, rng.standard_normal(spec.shape, np.float32))
    write_gguf(path, metadata, tensors)
    return path


def random_blocks(kind, scale, rng):
    """Stored bytes of about PERIOD normal values."""
    block, _ = GGML_QUANT_SIZES[kind]
    values = rng.standard_normal(-(-PERIOD // block) * block, np.float32) * np.float32(scale)
    return quantize(values.reshape(-1, block), kind)


def repeated(raw, size):
    return lambda: np.resize(raw, size)


def small_tensor(name, x):
    """Standard normal numbers as a trained model's tensor of that name might look."""
    if name.endswith("ssm_a"):
        return -np.exp(x)
    if name.endswith("ssm_dt.bias"):
        return x - 4
    return 1 + 0.1 * x if x.ndim == 1 else x * np.float32(x.shape[1] ** -0.5)


def vocabulary():
    """The tokenizer's part of the metadata."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        with gzip.open(VOCABULARY) as compressed:
            shutil.copyfileobj(compressed, file)
        file.flush()
        return {key: value for key, value in read_gguf(file.name).metadata.items() if key.startswith("tokenizer.")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", choices=TYPES)
    print(random_gguf(**vars(parser.parse_args())))
