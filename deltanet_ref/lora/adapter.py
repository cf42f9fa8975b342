"""LoRA adapters: y = x W^T + scale (x A^T) B^T with A (r, in), B (out, r), scale = alpha / r (Hu et al. 2021, eq. 3).

Factors carry GGUF's names and V-head order: what is trained is what llama.cpp loads.
"""
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.formats.gguf import read_gguf, write_gguf
from deltanet_ref.formats.quants import dequantize
from deltanet_ref.lora.bridge import one_alpha, read_peft, reorder, write_peft
from deltanet_ref.model.config import ARCHITECTURE, Config
from deltanet_ref.model.load import listing
from deltanet_ref.model.tensors import linear_tensors

# metadata that an adapter carries along: name here -> GGUF key
_CARRIED = {"task_name": "adapter.lora.task_name", "prompt_prefix": "adapter.lora.prompt_prefix",
            "invocation_tokens": "adapter.alora.invocation_tokens"}


@dataclass
class Adapter:
    """The factors of a LoRA adapter, for one shape of base model."""

    config: Config
    tensors: dict              # "<weight>.lora_a" (r, in), "<weight>.lora_b" (out, r); entries may be replaced
    alpha: float
    metadata: dict = field(default_factory=dict)      # task_name, prompt_prefix, invocation_tokens: those given
    notes: list = field(default_factory=list)         # what reading it changed

    @property
    def targets(self):
        """Names of the adapted weights, in network order."""
        return [name for name in linear_tensors(self.config) if f"{name}.lora_a" in self.tensors]

    def rank(self, target):
        """r of one adapted weight."""
        return self.tensors[f"{target}.lora_a"].shape[0]

    def scale(self, target):
        """alpha / r, the factor before B A."""
        return self.alpha / self.rank(target)

    def save_gguf(self, path):
        """Writes the GGUF adapter that llama.cpp loads: float32 factors; the file appears only when it is whole.

        Raises InputError when a factor was replaced by one that does not fit, or the path cannot be written.
        """
        check_factors("the adapter", self.tensors, self.config)
        metadata = {"general.architecture": ARCHITECTURE, "general.type": "adapter", "adapter.type": "lora",
                    "adapter.lora.alpha": np.float32(self.alpha)}
        for name, value in self.metadata.items():
            metadata[_CARRIED[name]] = np.array(value, np.uint32) if name == "invocation_tokens" else value
        factors = _in_network_order(self.tensors, self.config)
        write_gguf(path, metadata, {name: np.asarray(x, np.float32) for name, x in factors.items()})

    def save_peft(self, directory):
        """Writes a PEFT directory with the V heads in HF's grouped order. Raises InputError as save_gguf.

        Task name and prompt prefix have no place there.
        """
        check_factors("the adapter", self.tensors, self.config)
        factors = reorder(_in_network_order(self.tensors, self.config), self.config, to="grouped")
        write_peft(directory, factors, self.alpha, self.config, self.metadata.get("invocation_tokens"))


def new_adapter(model, rank=16, alpha=32, targets=None, seed=0):
    """Makes an adapter that changes nothing yet: A uniform in +-1 / sqrt(in) (PEFT's Kaiming initialisation), B zero.

    targets: names of weights to adapt, or one string with commas: "attn_qkv" or "in_proj_qkv" for that weight in every
    layer, "blk.0.attn_qkv.weight" for one; None for all linear layers. The factors have the model's dtype.
    Raises InputError for names that the model does not have, and a rank or alpha that is not positive.
    """
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
        raise InputError(f"rank is {rank!r}, it must be a positive integer")
    if not 0 < alpha < np.inf:
        raise InputError(f"alpha is {alpha!r}, it must be a positive number")
    rng, tensors = np.random.default_rng(seed), {}
    for spec in _chosen(linear_tensors(model.config), targets):
        out, width = spec.shape
        tensors[f"{spec.name}.lora_a"] = (rng.uniform(-1, 1, (rank, width)) / width ** 0.5).astype(model.dtype)
        tensors[f"{spec.name}.lora_b"] = np.zeros((out, rank), model.dtype)
    return Adapter(model.config, tensors, float(alpha))


def load_adapter(path, model):
    """Reads a GGUF adapter or a PEFT directory (adapter_config.json) for this model -> Adapter in the model's dtype.

    Raises InputError: not a LoRA adapter, another architecture, or every factor that is missing, unknown or misshapen.
    """
    path, config, notes, metadata = Path(path), model.config, [], {}
    if path.is_dir():
        factors, alphas, tokens, strangers = read_peft(path, config)
        if tokens:
            metadata["invocation_tokens"] = list(tokens)
    else:
        factors, alphas, metadata, strangers = _read_gguf_adapter(path, config)
    check_factors(path, factors, config, strangers)
    alpha, factors, folded = one_alpha({name: np.asarray(x, np.float64) for name, x in factors.items()}, alphas)
    factors = {name: x.astype(model.dtype) for name, x in _in_network_order(factors, config).items()}
    if folded:
        notes.append(f"the scales differ between tensors: alpha is {alpha:g} now, the difference went into lora_b of "
                     f"{len(folded)} of {len(alphas)} tensors")
    if path.is_dir():
        factors = reorder(factors, config, to="tiled")
    if "invocation_tokens" in metadata:
        notes.append("an activated LoRA (invocation tokens): its tokens are kept, but it acts on every position here")
    return Adapter(config, factors, alpha, metadata, notes)


def check_factors(where, factors, config, strangers=()):
    """Raises InputError that lists every factor missing, misshapen or not finite, and names of no linear tensor."""
    linear = linear_tensors(config)
    names = {name.rsplit(".", 1)[0]: None for name in factors}
    strangers = [*strangers, *(name for name in names if name not in linear)]
    targets = [name for name in names if name in linear]
    if not targets:
        reason = "it holds no LoRA factors" if not strangers else (
            f"none of its tensors, such as {strangers[0]!r}, belongs to a linear layer of this model: it was made for "
            "another model, or under other names")
        raise InputError(f"{where} would do nothing: {reason}")
    missing, misshapen, infinite = [], [], []
    for target in targets:
        pair = [f"{target}.lora_a", f"{target}.lora_b"]
        absent = [name for name in pair if name not in factors]
        missing += absent
        infinite += [name for name in pair if name in factors and not np.isfinite(factors[name]).all()]
        if absent:
            continue
        a, b = (tuple(factors[name].shape) for name in pair)
        out, width = linear[target].shape
        if len(a) != 2 or a[0] < 1 or a[1] != width or b != (out, a[0]):
            misshapen.append(f"{target} {(out, width)} with lora_a {a}, lora_b {b}")
    problems = [listing("missing", missing), listing("for no linear layer of this model", strangers),
                listing("misshapen (lora_a is (r, in), lora_b is (out, r))", misshapen),
                listing("not finite", infinite)]
    if any(problems):
        raise InputError(f"{where} does not fit the model; " + "; ".join(p for p in problems if p))


def _in_network_order(factors, config):
    names = (f"{target}.{factor}" for target in linear_tensors(config) for factor in ("lora_a", "lora_b"))
    return {name: factors[name] for name in names if name in factors}


def _read_gguf_adapter(path, config):
    """Factors, target -> alpha, carried metadata and strange names of a GGUF adapter."""
    file = read_gguf(path)
    about = file.metadata
    for key, wanted in (("general.type", "adapter"), ("general.architecture", ARCHITECTURE), ("adapter.type", "lora")):
        if about.get(key) != wanted:
            raise InputError(f"{path}: {key} is {about.get(key)!r}, a LoRA adapter for this model has {wanted!r}")
    known = {f"{name}.lora_{factor}" for name in linear_tensors(config) for factor in "ab"}
    factors = {name: dequantize(tensor.raw, tensor.type, tensor.shape, np.float64)
               for name, tensor in file.tensors.items() if name in known}
    alpha = about.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not np.isfinite(alpha):
        raise InputError(f"{path}: adapter.lora.alpha is {alpha!r}, not a number")
    # alpha 0, or none: llama.cpp applies B A as it is, which is alpha = r
    alphas = {name.removesuffix(".lora_a"): alpha or float(x.shape[0]) for name, x in factors.items()
              if name.endswith(".lora_a")}
    metadata = {name: about[key] for name, key in _CARRIED.items() if key in about}
    if "invocation_tokens" in metadata:
        metadata["invocation_tokens"] = np.ravel(metadata["invocation_tokens"]).tolist()
    return factors, alphas, metadata, [name for name in file.tensors if name not in known]


def _chosen(linear, targets):
    """The specs that the user's names mean, in network order; raises InputError that lists the known names."""
    if targets is None:
        return list(linear.values())
    means = {}                  # every name under which a weight is known -> its specs
    for spec in linear.values():
        path = spec.hf_name.removesuffix(".weight")
        _, part, module = path.rsplit(".", 2)
        full = spec.name.removesuffix(".weight")
        for name in (full.rsplit(".", 1)[1], full, spec.name, module, f"{part}.{module}", path, spec.hf_name):
            means.setdefault(name, []).append(spec)
    wanted = [name.strip() for name in targets.split(",")] if isinstance(targets, str) else list(targets)
    if unknown := [name for name in wanted if name not in means]:
        short = {name for name in means if "." not in name}
        raise InputError(f"LoRA targets {unknown} are unknown: use {', '.join(sorted(short))}, or a tensor's full name "
                         f"such as {next(iter(linear))}")
    chosen = {spec.name for name in wanted for spec in means[name]}
    if not chosen:
        raise InputError("the list of LoRA targets is empty: name some, or leave it out for all linear layers")
    return [spec for name, spec in linear.items() if name in chosen]
