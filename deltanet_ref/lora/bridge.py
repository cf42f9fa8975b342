"""LoRA factors between GGUF and PEFT: names, the order of the V heads, one scale for all targets or one for each.

Anything a plain LoRA cannot express (DoRA magnitudes, whole modules, biases, factors of other tensors) is reported.

The update of a weight is scale B A with A (r, in) and B (out, r): to permute the weight's rows, permute B's rows; to
permute its columns, permute A's columns. The product is never formed.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType

from deltanet_ref.errors import InputError, shown
from deltanet_ref.formats.files import atomic_write, read_json
from deltanet_ref.formats.quants import quantize
from deltanet_ref.formats.safetensors import read_safetensors, write_safetensors
from deltanet_ref.model.config import Config
from deltanet_ref.model.load import listing, text_model_name
from deltanet_ref.model.tensors import linear_tensors, v_head_index

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FACTOR_TYPES = ("F32", "F16", "BF16")
_TEXTS = ("task_name", "prompt_prefix")
_PEFT_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")

# fields of adapter_config.json that, unless empty, ask for more than scale B A on linear layers -> their kind in --drop
_BEYOND_LORA = {
    "use_dora": "dora",
    "lora_bias": "bias",
    "bias": "bias",
    "modules_to_save": "modules_to_save",
    **{
        field: field
        for field in (
            "trainable_token_indices",
            "target_parameters",
            "layer_replication",
            "use_qalora",
            "use_bdlora",
            "arrow_config",
            "kasa_config",
            "monteclora_config",
        )
    },
}
# A regular expression from a file may take exponential time: anything but plain names is matched in a process with a
# time limit.
_PLAIN_PATTERN = re.compile(r"[\w.-]*")
_PATTERN_SECONDS = 5
_MATCH = r"""
import json, re, sys
patterns, modules = json.load(sys.stdin)
print(json.dumps([[m for m in modules if re.fullmatch(p, m)] for p in patterns]))
"""
_NOTHING = (None, False, "none", [], {})
# initialisations that also change the base weights: the factors alone do not reproduce the model
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class StoredAdapter(NamedTuple):
    """An adapter as read from its file."""

    factors: dict  # "<weight>.lora_a" (r, in) and "<weight>.lora_b" (out, r) under GGUF names -> array
    types: dict  # the same names -> "F32", "F16" or "BF16"; absent when stored in another type
    alphas: dict  # target -> alpha, with scale = alpha / r
    order: str  # of the V heads: "grouped" or "tiled"
    metadata: dict  # task_name, prompt_prefix, invocation_tokens, as far as present
    unexpected: list  # other than factors of the model's linear layers: names, "field = value" of the settings
    dropped: list  # those of them that --drop names


def reorder(factors: dict, config: Config, *, to: str) -> dict:
    """Permutes LoRA factors to the V-head order `to`: "tiled" (GGUF) or "grouped" (HF, PEFT).

    factors: "<weight>.lora_a" (r, in) and "<weight>.lora_b" (out, r) -> array. Returns a new dict; factors of weights
    without V heads are the same arrays.
    """
    linear, moved = linear_tensors(config), {}
    for name, x in factors.items():
        target, factor = name.rsplit(".", 1)
        spec = linear[target]
        axis = {"lora_b": 0, "lora_a": 1}[factor]  # the same in the factor and in the weight
        moves = spec.v_heads is not None and spec.v_heads.axis == axis
        moved[name] = np.take(x, v_head_index(spec, config, to=to), axis=axis) if moves else x
    return moved


def common_alpha(factors: dict, alphas: dict) -> tuple[float, dict, list]:
    """Chooses the single alpha that a GGUF adapter has, with scale = alpha / r for every target.

    factors: float64. alphas: target -> the alpha it needs. The most common one is kept; B of every other target is
    multiplied by the quotient. Returns alpha, factors, the targets changed.
    """
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    folded = [target for target in alphas if alphas[target] != alpha]
    scaled = {f"{target}.lora_b": factors[f"{target}.lora_b"] * (alphas[target] / alpha) for target in folded}
    return alpha, factors | scaled, folded


def read_peft(directory: Path | str, config: Config, drop: Sequence[str] = ()) -> StoredAdapter:
    """Reads a PEFT LoRA directory; the alphas include rank_pattern, alpha_pattern and use_rslora.

    drop: as for split_dropped. Raises InputError for a directory that cannot be read or contradicts itself.
    """
    directory = Path(directory)
    peft = read_json(directory / PEFT_CONFIG)
    if peft.get("peft_type") != "LORA":
        raise InputError(f"{directory}/{PEFT_CONFIG} does not describe a LoRA adapter (peft_type LORA)")
    if str(peft.get("init_lora_weights")).lower().startswith(_BASE_CHANGING):
        raise InputError(
            f"{directory}: init_lora_weights = {shown(peft['init_lora_weights'])} also changes the base "
            "weights: export it from PEFT as a plain LoRA first"
        )
    if not (directory / PEFT_WEIGHTS).is_file():
        raise InputError(f"{directory}/{PEFT_WEIGHTS} does not exist: save the adapter with safetensors")
    by_hf_name = {spec.hf_name: name for name, spec in linear_tensors(config).items()}
    stored = read_safetensors(directory / PEFT_WEIGHTS)
    factors, types, modules, wrong_ranks = {}, {}, {}, []
    unexpected = [f"{field} = {shown(peft[field])}" for field in _BEYOND_LORA if peft.get(field) not in _NOTHING]
    for key in stored:
        match = _PEFT_KEY.fullmatch(key)
        target = match and by_hf_name.get(text_model_name(match["module"]) + ".weight")
        if target is None:
            unexpected.append(key)
            continue
        name = f"{target}.lora_{match['factor'].lower()}"
        factors[name] = stored[key]
        if stored.stored(key).dtype in FACTOR_TYPES:
            types[name] = stored.stored(key).dtype
        modules[target] = match["module"]
    scales = _ranks_and_alphas(peft, set(modules.values()), directory)
    for target, module in modules.items():
        r, shape = scales[module][0], np.shape(factors.get(f"{target}.lora_a", np.empty((scales[module][0], 0))))
        if shape[:1] != (r,):
            wrong_ranks.append(f"lora_A of {module} is {shape}, {PEFT_CONFIG} has r = {r}")
    if wrong_ranks:
        raise InputError(f"{directory} contradicts itself; " + listing("ranks differ", wrong_ranks))
    metadata = {name: stored.metadata[name] for name in _TEXTS if name in stored.metadata}
    if tokens := peft.get("alora_invocation_tokens"):
        metadata["invocation_tokens"] = invocation_tokens(tokens, f"{directory}/{PEFT_CONFIG}")
    alphas = {target: scales[module][1] for target, module in modules.items()}
    return StoredAdapter(factors, types, alphas, "grouped", metadata, *split_dropped(unexpected, drop))


def invocation_tokens(values, where: Path | str) -> list[int]:
    """Checks token ids from a file. Raises InputError unless they are a list of integers in 0..2^32 - 1."""
    if not isinstance(values, list) or not all(type(i) is int and 0 <= i < 2**32 for i in values):
        raise InputError(f"{where}: the invocation tokens are {shown(values)}, not token ids")
    return values


def drop_kind(entry: str) -> str:
    """Classify an adapter entry that is not a LoRA factor of a linear layer; returns the name that --drop uses for it.

    entry: the name of a tensor, or "field = value" of adapter_config.json.
    """
    field, equals, _ = entry.partition(" = ")
    if equals and field in _BEYOND_LORA:
        return _BEYOND_LORA[field]
    parts = entry.split(".")
    if any(part.startswith("lora_magnitude_vector") for part in parts):
        return "dora"
    if parts[-1] == "bias":
        return "bias"
    end = next((i for i, part in enumerate(parts) if part.startswith("lora_")), 0)
    if module := [part for part in parts[:end] if part != "weight"]:
        return module[-1]
    return "trainable_token_indices" if "token_adapter" in parts else "modules_to_save"


def split_dropped(entries: Sequence[str], drop: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split into (kept, dropped); --drop matches by kind (drop_kind) or by any dotted part of the name."""
    dropped = [name for name in entries if drop_kind(name) in drop or any(part in drop for part in name.split("."))]
    return [name for name in entries if name not in dropped], dropped


def _ranks_and_alphas(peft, modules, directory):
    """module -> (r, alpha), with scale = alpha / r; PEFT's scale with use_rslora is alpha / sqrt(r)."""
    where, scales = f"{directory}/{PEFT_CONFIG}", {}
    ranks, alphas = (
        _by_module(peft, modules, *names, where) for names in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    for module in modules:
        r, alpha = ranks[module], alphas[module]
        if not all(isinstance(x, int | float) and 0 < abs(x) < 2**31 for x in (r, alpha)) or r != int(r) or r < 1:
            raise InputError(
                f"{where}: {module} has rank {shown(r)} and alpha {shown(alpha)}: the rank must be a "
                "positive integer and alpha a number other than 0"
            )
        scales[module] = int(r), alpha * r**0.5 if peft.get("use_rslora") else float(alpha)
    return scales


def _by_module(peft, modules, patterns, default, where):
    """module -> the value of the first pattern that matches the end of its path, else the default (PEFT's documentation
    of rank_pattern)."""
    values = peft.get(patterns) or {}
    if not isinstance(values, dict):
        raise InputError(f"{where}: {patterns} is {shown(values)}, not an object")
    ends = [rf"(.*\.)?({pattern})" for pattern in values]
    if all(map(_PLAIN_PATTERN.fullmatch, values)):
        matched = [[m for m in modules if re.fullmatch(end, m)] for end in ends]
    else:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", _MATCH],
                input=json.dumps([ends, list(modules)]),
                capture_output=True,
                text=True,
                timeout=_PATTERN_SECONDS,
            )
            matched = json.loads(done.stdout)
        except (subprocess.TimeoutExpired, ValueError) as error:
            raise InputError(
                f"{where}: {patterns} cannot be read: it holds an invalid regular expression, or one "
                f"that takes more than {_PATTERN_SECONDS} s; write the modules' names instead"
            ) from error
    return {
        module: next((value for value, found in zip(values.values(), matched) if module in found), peft.get(default, 8))
        for module in modules
    }


def write_peft(
    directory: Path | str,
    factors: dict,
    types: dict,
    alpha: float,
    config: Config,
    *,
    metadata: dict,
    prefix: str = "model.",
) -> None:
    """Writes a PEFT LoRA directory: adapter_model.safetensors and adapter_config.json.

    factors: in grouped order, under GGUF names; types: name -> "F32", "F16" or "BF16", F32 for the rest; scale =
    alpha / r. prefix: of the module paths, "model." for the text-only HF model, "model.language_model." for the
    multimodal one. metadata: PEFT has no fields for task_name and prompt_prefix; they go into the header of the
    weights. Raises InputError when the directory cannot be written.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory}: the directory cannot be created: {error.strerror}") from None
    paths = {
        name: spec.hf_name.removesuffix(".weight").removeprefix("model.")
        for name, spec in linear_tensors(config).items()
    }
    tensors = {}
    for name, (raw, type, shape) in encoded(factors, types).items():
        target, factor = name.rsplit(".", 1)
        tensors[f"base_model.model.{prefix}{paths[target]}.lora_{factor[-1].upper()}.weight"] = raw, type.name, shape
    ranks = {paths[name.removesuffix(".lora_a")]: x.shape[0] for name, x in factors.items() if name.endswith(".lora_a")}
    r = Counter(ranks.values()).most_common(1)[0][0]
    short = {path.rsplit(".", 1)[1] for path in ranks}
    everywhere = len(ranks) == sum(path.rsplit(".", 1)[1] in short for path in paths.values())
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(short if everywhere else ranks),
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != r},
        "use_rslora": False,
        "alora_invocation_tokens": metadata.get("invocation_tokens"),
    }
    texts = {name: metadata[name] for name in _TEXTS if name in metadata}
    write_safetensors(directory / PEFT_WEIGHTS, tensors, {"format": "pt"} | texts)
    with atomic_write(directory / PEFT_CONFIG) as temporary:
        temporary.write_text(json.dumps(peft, indent=2) + "\n", "utf-8")


def encoded(factors: dict, types: dict) -> dict:
    """name -> (bytes, type, shape) of each factor. types: name -> "F32", "F16" or "BF16"; F32 for the rest."""
    kinds = {name: GGMLQuantizationType[types.get(name, "F32")] for name in factors}
    return {name: (quantize(x, kinds[name]), kinds[name], x.shape) for name, x in factors.items()}
