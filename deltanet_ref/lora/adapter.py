"""LoRA adapters: y = x W^T + scale (x A^T) B^T with A (r, in), B (out, r), scale = alpha / r (Hu et al. 2021, eq. 3).

Factors carry GGUF's names and V-head order: what is trained is what llama.cpp loads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deltanet_ref import ops
from deltanet_ref.errors import InputError, shown
from deltanet_ref.formats.gguf import GGUFFile, read_gguf, write_gguf
from deltanet_ref.formats.quants import dequantize, finite
from deltanet_ref.formats.values import is_text
from deltanet_ref.lora.bridge import (
    FACTOR_TYPES,
    StoredAdapter,
    common_alpha,
    drop_kind,
    encoded,
    invocation_tokens,
    read_peft,
    reorder,
    split_dropped,
    write_peft,
)
from deltanet_ref.model.config import ARCHITECTURE, Config
from deltanet_ref.model.load import listing
from deltanet_ref.model.tensors import linear_tensors, wide_dtype

# the metadata of an adapter: name here -> GGUF key
_METADATA_KEYS = {
    "task_name": "adapter.lora.task_name",
    "prompt_prefix": "adapter.lora.prompt_prefix",
    "invocation_tokens": "adapter.alora.invocation_tokens",
}


@dataclass
class Adapter:
    """The factors of a LoRA adapter, for one shape of base model; their arrays live on the backend."""

    config: Config
    tensors: dict  # "<weight>.lora_a" (r, in), "<weight>.lora_b" (out, r); entries may be replaced
    alpha: float
    metadata: dict = field(default_factory=dict)  # task_name, prompt_prefix, invocation_tokens, as far as present
    notes: list = field(default_factory=list)  # what reading changed, one sentence each
    types: dict = field(default_factory=dict)  # factor -> stored type when read: "F32", "F16" or "BF16"
    backend: object = ops  # backends.interface.Backend

    @property
    def targets(self) -> list[str]:
        """Names of the adapted weights, in network order."""
        return [name for name in linear_tensors(self.config) if f"{name}.lora_a" in self.tensors]

    def rank(self, target: str) -> int:
        """r of one adapted weight."""
        return self.tensors[f"{target}.lora_a"].shape[0]

    def scale(self, target: str) -> float:
        """alpha / r, by which B A is multiplied."""
        return self.alpha / self.rank(target)

    def save_gguf(self, path: Path | str, type: str = "f32") -> None:
        """Writes the GGUF adapter that llama.cpp loads, atomically.

        type: "f32", "f16" or "bf16", or "kept" for each factor's type when it was read. Raises InputError when a factor
        was replaced by one that does not match, or when the path cannot be written.
        """
        metadata = {
            "general.architecture": ARCHITECTURE,
            "general.type": "adapter",
            "adapter.type": "lora",
            "adapter.lora.alpha": np.float32(self.alpha),
        }
        for name, value in self.metadata.items():
            metadata[_METADATA_KEYS[name]] = np.array(value, np.uint32) if name == "invocation_tokens" else value
        factors, types = self._to_save(type)
        write_gguf(path, metadata, encoded(factors, types))

    def save_peft(self, directory: Path | str, type: str = "f32", prefix: str = "model.") -> None:
        """Writes a PEFT directory with the V heads in HF's grouped order. type and errors as for save_gguf.

        prefix: of the module paths, "model.language_model." for the multimodal HF model.
        """
        factors, types = self._to_save(type)
        write_peft(
            directory,
            reorder(factors, self.config, to="grouped"),
            types,
            self.alpha,
            self.config,
            metadata=self.metadata,
            prefix=prefix,
        )

    def _to_save(self, type):
        tensors = {name: self.backend.to_host(x) for name, x in self.tensors.items()}
        check_factors("the adapter", tensors, self.config)
        if type.upper() not in (*FACTOR_TYPES, "KEPT"):
            raise InputError(f"LoRA factors cannot be stored as {shown(type)}: use f32, f16, bf16 or kept")
        factors = _in_network_order(tensors, self.config)
        return factors, self.types if type == "kept" else dict.fromkeys(factors, type.upper())


def new_adapter(model, rank: int = 16, alpha: float = 32, targets: str | list | None = None, seed: int = 0) -> Adapter:
    """Creates an adapter whose update is zero: A uniform in +-1 / sqrt(in) (PEFT's Kaiming initialisation), B zero.

    targets: names of weights to adapt, or one string with commas: "attn_qkv" or "in_proj_qkv" for that weight in every
    layer, "blk.0.attn_qkv.weight" for a single one; None for all linear layers. The factors have the model's dtype
    (float32 in a bfloat16 model).
    Raises InputError for names that the model does not have, and a rank or alpha that is not positive.
    """
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
        raise InputError(f"rank is {shown(rank)}, it must be a positive integer")
    if not 0 < alpha < np.inf:
        raise InputError(f"alpha is {shown(alpha)}, it must be a positive number")
    rng, dtype, tensors = np.random.default_rng(seed), wide_dtype(model.dtype), {}
    for spec in _chosen(linear_tensors(model.config), targets):
        out, width = spec.shape
        tensors[f"{spec.name}.lora_a"] = (rng.uniform(-1, 1, (rank, width)) / width**0.5).astype(dtype)
        tensors[f"{spec.name}.lora_b"] = np.zeros((out, rank), dtype)
    return _on_backend(Adapter(model.config, tensors, float(alpha)), model.backend)


def load_adapter(path: Path | str, model) -> Adapter:
    """Reads a GGUF adapter or a PEFT directory (adapter_config.json) for this model, in the dtype of its vectors.

    Raises InputError: not a LoRA adapter, another architecture, or every factor missing, unexpected, misshapen or not
    finite.
    """
    return _on_backend(open_adapter(path, model.config, wide_dtype(model.dtype)), model.backend)


def _on_backend(adapter, backend):
    """The adapter with its arrays moved from NumPy to the backend."""
    tensors = {name: backend.xp.asarray(x) for name, x in adapter.tensors.items()}
    return replace(adapter, tensors=tensors, backend=backend)


def open_adapter(path: Path | str, config: Config, dtype=np.float64, drop: Sequence[str] = ()) -> Adapter:
    """load_adapter for a model given by its config alone.

    drop: kinds of entries to leave out that are not plain LoRA ("dora", "modules_to_save", "bias", "conv1d", ...).
    """
    notes = []
    stored = read_adapter(path, config, drop)
    check_factors(path, stored.factors, config, stored.unexpected)
    factors = {name: np.asarray(x, np.float64) for name, x in stored.factors.items()}
    alpha, factors, folded = common_alpha(factors, stored.alphas)
    with np.errstate(over="ignore"):  # checked next
        factors = {name: x.astype(dtype) for name, x in _in_network_order(factors, config).items()}
    if too_large := [name for name, x in factors.items() if not finite(x)]:
        raise InputError(
            f"{path}: {listing('too large', too_large)}: multiplied by their scales they exceed {np.dtype(dtype)}"
        )
    types = {name: type for name, type in stored.types.items() if name.removesuffix(".lora_b") not in folded}
    if stored.dropped:
        notes.append(listing("left out, as --drop requests", stored.dropped))
    if folded:
        notes.append(
            f"the scales differ between tensors: alpha is now {alpha:g}, and lora_b of {len(folded)} of "
            f"{len(stored.alphas)} tensors was multiplied by the difference"
        )
    if stored.order == "grouped":
        factors = reorder(factors, config, to="tiled")
    if "invocation_tokens" in stored.metadata:
        notes.append("an activated LoRA: generate applies it from its invocation tokens on, all else at every position")
    return Adapter(config, factors, alpha, stored.metadata, notes, types)


def read_adapter(path: Path | str, config: Config, drop: Sequence[str] = ()) -> StoredAdapter:
    """Reads a GGUF adapter or a PEFT directory as stored; the factors are not checked. Raises InputError."""
    path = Path(path)
    return read_peft(path, config, drop) if path.is_dir() else _read_gguf_adapter(path, config, drop)


class FactorMatch(NamedTuple):
    """An adapter's factors compared with a model's linear layers; every list but the first should be empty."""

    matched: list  # targets with both factors, in the right shape
    missing: list  # absent factors whose partner is present
    misshapen: list  # target, its shape and those of its factors
    not_finite: list  # factors that hold NaN or infinity
    unexpected: list  # entries other than factors of the model's linear layers


def match_factors(factors: dict, config: Config, unexpected: Sequence[str] = ()) -> FactorMatch:
    """Compares factors ("<weight>.lora_a", "<weight>.lora_b" -> array) with the linear layers of a model."""
    linear = linear_tensors(config)
    names = {name.rsplit(".", 1)[0]: None for name in factors}
    found = FactorMatch([], [], [], [], [*unexpected, *(name for name in names if name not in linear)])
    for target in (name for name in names if name in linear):
        pair = [f"{target}.lora_a", f"{target}.lora_b"]
        absent = [name for name in pair if name not in factors]
        found.missing.extend(absent)
        found.not_finite.extend(name for name in pair if name in factors and not np.isfinite(factors[name]).all())
        if absent:
            continue
        a, b = (tuple(factors[name].shape) for name in pair)
        out, width = linear[target].shape
        if len(a) == 2 and a[0] >= 1 and a[1] == width and b == (out, a[0]):
            found.matched.append(target)
        else:
            found.misshapen.append(f"{target} {(out, width)} with lora_a {a}, lora_b {b}")
    return found


def check_factors(where: Path | str, factors: dict, config: Config, unexpected: Sequence[str] = ()) -> None:
    """Raises InputError that lists every factor missing, misshapen or not finite, and all unexpected entries."""
    found = match_factors(factors, config, unexpected)
    if not (found.matched or found.missing or found.misshapen):
        reason = (
            "it holds no LoRA factors"
            if not found.unexpected
            else (
                f"none of its tensors, such as {shown(found.unexpected[0])}, belongs to a linear layer of this model: "
                "it was made for another model, or uses other names"
            )
        )
        raise InputError(f"{where} would do nothing: {reason}")
    problems = [
        listing("missing", found.missing),
        listing("other than LoRA factors of this model's linear layers", found.unexpected, most=40),
        listing("misshapen (lora_a is (r, in), lora_b is (out, r))", found.misshapen),
        listing("not finite", found.not_finite),
    ]
    if any(problems):
        kinds = dict.fromkeys(drop_kind(name) for name in found.unexpected)
        remedy = (
            (
                f". Merge it into the base with PEFT, train without these, or convert with --drop {','.join(kinds)} "
                "to leave them out"
            )
            if kinds
            else ""
        )
        raise InputError(f"{where} does not match the model; " + "; ".join(p for p in problems if p) + remedy)


def _in_network_order(factors, config):
    names = (f"{target}.{factor}" for target in linear_tensors(config) for factor in ("lora_a", "lora_b"))
    return {name: factors[name] for name in names if name in factors}


def _read_gguf_adapter(path, config, drop):
    file = read_gguf(path)
    about = file.metadata
    for key, wanted in (("general.type", "adapter"), ("general.architecture", ARCHITECTURE), ("adapter.type", "lora")):
        if not is_text(about.get(key), wanted):
            raise InputError(f"{path}: {key} is {shown(about.get(key))}, a LoRA adapter for this model has {wanted!r}")
    known = {f"{name}.lora_{factor}" for name in linear_tensors(config) for factor in "ab"}
    factors = {
        name: dequantize(tensor.raw, tensor.type, tensor.shape, np.float64)
        for name, tensor in file.tensors.items()
        if name in known
    }
    types = {name: file.tensors[name].type.name for name in factors}
    alpha = about.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not np.isfinite(alpha):
        raise InputError(f"{path}: adapter.lora.alpha is {shown(alpha)}, not a number")
    # with alpha 0, or without one, llama.cpp applies B A unscaled, which is alpha = r
    alphas = {
        name.removesuffix(".lora_a"): alpha or float(math.prod(x.shape[:1]))
        for name, x in factors.items()
        if name.endswith(".lora_a")
    }
    unexpected = [name for name in file.tensors if name not in known]
    return StoredAdapter(
        factors,
        {n: t for n, t in types.items() if t in FACTOR_TYPES},
        alphas,
        "tiled",
        adapter_metadata(file),
        *split_dropped(unexpected, drop),
    )


def adapter_metadata(file: GGUFFile) -> dict:
    """task_name, prompt_prefix and invocation_tokens of a GGUF adapter, as far as present. Raises InputError."""
    found = {name: file.metadata[key] for name, key in _METADATA_KEYS.items() if key in file.metadata}
    for name in found.keys() - {"invocation_tokens"}:
        if not isinstance(found[name], str):
            raise InputError(f"{file.path}: {_METADATA_KEYS[name]} is {shown(found[name])}, not a string")
    if "invocation_tokens" in found:
        found["invocation_tokens"] = invocation_tokens(np.ravel(found["invocation_tokens"]).tolist(), file.path)
    return found


def _chosen(linear, targets):
    """The specs that targets refer to, in network order. Raises InputError that lists the known names."""
    if targets is None:
        return list(linear.values())
    means = {}  # each name that refers to a weight -> its specs
    for spec in linear.values():
        path = spec.hf_name.removesuffix(".weight")
        _, part, module = path.rsplit(".", 2)
        full = spec.name.removesuffix(".weight")
        for name in (full.rsplit(".", 1)[1], full, spec.name, module, f"{part}.{module}", path, spec.hf_name):
            means.setdefault(name, []).append(spec)
    wanted = [name.strip() for name in targets.split(",")] if isinstance(targets, str) else list(targets)
    if unknown := [name for name in wanted if name not in means]:
        short = {name for name in means if "." not in name}
        raise InputError(
            f"unknown LoRA targets {shown(unknown)}: use {', '.join(sorted(short))}, or a tensor's full "
            f"name such as {next(iter(linear))}"
        )
    chosen = {spec.name for name in wanted for spec in means[name]}
    if not chosen:
        raise InputError("the list of LoRA targets is empty: name some, or leave it out for all linear layers")
    return [spec for name, spec in linear.items() if name in chosen]
