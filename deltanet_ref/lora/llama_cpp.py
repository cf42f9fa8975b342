"""llama.cpp in this process, through its Python binding xllamacpp, an optional dependency."""

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from deltanet_ref.formats.tokenizer import load_tokenizer
from deltanet_ref.lora.adapter import Adapter

INSTALL = "pip install xllamacpp"
ERRORS_ONLY = 1  # level of llama.cpp's log, which it writes to stderr; it uses 3 unless told otherwise


def installed() -> bool:
    """Whether the binding can be imported."""
    return importlib.util.find_spec("xllamacpp") is not None


def log_probabilities(
    base: Path | str, adapter: Adapter, prompts: Sequence[Sequence[int]], scales: Sequence[float]
) -> np.ndarray:
    """Runs base and adapter in llama.cpp -> natural log-probabilities (scales, prompts, V) of the token after each
    prompt, float64.

    base: a GGUF file. The adapter acts on every position, at each of the scales in turn (0: the base alone). The KV
    cache is float32, without flash attention. Raises RuntimeError when llama.cpp fails (its error log is on stderr),
    ModuleNotFoundError when the binding is not installed.
    """
    import xllamacpp

    vocabulary, (letter,) = adapter.config.vocab_size, load_tokenizer(base).encode("a")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "adapter.gguf"
        replace(adapter, metadata={}).save_gguf(path)  # with invocation tokens it would act from these on only
        p = xllamacpp.CommonParams()
        p.verbosity = ERRORS_ONLY
        p.model.path, p.n_ctx, p.n_parallel, p.warmup = str(base), max(256, 2 * max(map(len, prompts))), 1, False
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0)]
        server, rows = xllamacpp.Server(p), np.full((len(scales), len(prompts), vocabulary), -np.inf)
        for row, (scale, prompt) in zip(rows.reshape(-1, vocabulary), product(scales, prompts)):
            reply = server.handle_completions(
                {  # forces the reply "a": one without text comes without probabilities
                    "prompt": [int(t) for t in prompt],
                    "n_predict": 1,
                    "temperature": -1.0,
                    "n_probs": vocabulary,
                    "logit_bias": [[letter, 1000.0]],
                    "cache_prompt": False,
                    "post_sampling_probs": False,
                    "lora": [{"id": 0, "scale": float(scale)}],
                }
            )
            reply = json.loads(reply) if isinstance(reply, str) else reply
            if "choices" not in reply:
                raise RuntimeError(str(reply.get("error", reply)))
            for entry in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
    return rows
