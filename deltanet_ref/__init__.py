"""deltanet_ref: a reference engine for Qwen3.5 (Gated DeltaNet) without autodiff.

    model = load_model("model.gguf")                       or an HF directory
    adapter = new_adapter(model, rank=16)
    train(model, adapter, "data.jsonl", steps=100)
    adapter.save_gguf("adapter.gguf")                      llama.cpp loads it

notation.py has the conventions, ops/ the mathematics, model/ the network.
"""

from pathlib import Path

from deltanet_ref.backends import get_backend
from deltanet_ref.errors import InputError
from deltanet_ref.formats.gguf import read_gguf
from deltanet_ref.formats.tokenizer import Tokenizer, load_tokenizer
from deltanet_ref.lora.adapter import load_adapter, new_adapter
from deltanet_ref.model.generate import generate
from deltanet_ref.model.load import weights_from_gguf, weights_from_hf
from deltanet_ref.model.qwen35 import Qwen35
from deltanet_ref.train.lora import train
from deltanet_ref.version import __version__

__all__ = [
    "InputError",
    "generate",
    "get_backend",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "new_adapter",
    "train",
]


def load_model(path: str | Path, backend: str = "auto", dtype: str = "float32", weights: str = "auto") -> Qwen35:
    """Open a model: a .gguf file, or an HF directory (config.json and safetensors).

    backend  "numpy" (the definition), "numba" (kernels for the CPU), "cuda" (kernels for an NVIDIA card),
             "cuda-emulated" (the same on the CPU, for tests), or "auto": cuda where there is a card, else numba
    dtype    "float32" or "float64", of all computation, or with cuda "float32" or "bfloat16" (matrices and activations;
             states, gates, statistics, adapters and their gradients are float32); a GGUF's tensors stay as stored until
             they are used
    weights  of a GGUF: "mapped" (decoded at each use), "expanded" (decoded once and kept), or "auto": mapped where the
             backend decodes fast (numba: all common types), the others expanded if they fit in half of the available
             memory; with cuda all are expanded if they fit in half of the card's
    returns  Qwen35 (model.config, model.logits, model.loss_and_grads, ...); model.notes lists what was left out
    raises   InputError that lists everything wrong with the file; at the first use of a tensor that is not finite, too
    """
    ops = get_backend(backend, dtype)
    path = Path(path)
    if path.is_dir():
        config, tensors, notes = weights_from_hf(path, dtype, ops)
        tokenizer = Tokenizer.from_hf(path) if (path / "tokenizer.json").exists() else None
    else:
        file = read_gguf(path)
        config, tensors, notes = weights_from_gguf(file, dtype, ops, weights)
        tokenizer = Tokenizer.from_gguf(file) if "tokenizer.ggml.tokens" in file.metadata else None
    if backend == "auto" and ops.device:
        notes = [*notes, f"backend {ops.name}: {ops.device}"]
    return Qwen35(config, tensors, tokenizer=tokenizer, notes=notes)
