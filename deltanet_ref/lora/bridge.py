"""LoRA factors between GGUF's form and PEFT's: names, the order of the V heads, one scale for all or one each.

The update of a weight is scale B A with A (r, in) and B (out, r): permuting the weight's rows means permuting B's rows,
permuting its columns means permuting A's columns. The product is never formed.
"""
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.formats.files import atomic_write
from deltanet_ref.formats.safetensors import read_safetensors, write_safetensors
from deltanet_ref.model.load import listing, text_model_name
from deltanet_ref.model.tensors import linear_tensors, v_head_index

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")

# fields of adapter_config.json that make it more than scale B A on linear layers, when they hold anything
_BEYOND_LORA = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
                "layer_replication", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config")
# initialisations that also change the base weights: the factors alone do not carry the model
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def reorder(factors, config, *, to):
    """Brings LoRA factors to the V-head order `to`: "tiled" (GGUF) or "grouped" (HF, PEFT).

    factors: "<weight>.lora_a" (r, in) and "<weight>.lora_b" (out, r) -> array. Returns a new dict; factors of weights
    that have no V heads are the same arrays.
    """
    linear, moved = linear_tensors(config), {}
    for name, x in factors.items():
        target, factor = name.rsplit(".", 1)
        spec = linear[target]
        axis = {"lora_b": 0, "lora_a": 1}[factor]          # of the factor and of the weight alike
        moves = spec.v_heads is not None and spec.v_heads.axis == axis
        moved[name] = np.take(x, v_head_index(spec, config, to=to), axis=axis) if moves else x
    return moved


def one_alpha(factors, alphas):
    """Finds the one alpha of a GGUF adapter: scale = alpha / r for every target.

    factors: float64. alphas: target -> the alpha it needs. The most common one is kept; B of every other target is
    multiplied by the quotient. Returns alpha, factors, the targets changed.
    """
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    folded = [target for target in alphas if alphas[target] != alpha]
    scaled = {f"{target}.lora_b": factors[f"{target}.lora_b"] * (alphas[target] / alpha) for target in folded}
    return alpha, factors | scaled, folded


def read_peft(directory, config):
    """Reads a PEFT LoRA directory as it is: V heads grouped, a scale for each target.

    Returns factors under GGUF names, alphas: target -> alpha with scale = alpha / r (rank_pattern, alpha_pattern and
    use_rslora worked in), invocation tokens or None, and keys that belong to no linear tensor of the model.
    Raises InputError for what is not plain LoRA.
    """
    directory = Path(directory)
    try:
        peft = json.loads((directory / PEFT_CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{directory}/{PEFT_CONFIG} cannot be read: {error}") from None
    if not isinstance(peft, dict) or peft.get("peft_type") != "LORA":
        raise InputError(f"{directory}/{PEFT_CONFIG} does not describe a LoRA adapter (peft_type LORA)")
    beyond = [f"{field} = {peft[field]!r}" for field in _BEYOND_LORA if peft.get(field)]
    if peft.get("bias", "none") != "none":
        beyond.append(f"bias = {peft['bias']!r}")
    if str(peft.get("init_lora_weights")).lower().startswith(_BASE_CHANGING):
        beyond.append(f"init_lora_weights = {peft['init_lora_weights']!r} (it changes the base weights: export it from "
                      "PEFT as a plain LoRA first)")
    if beyond:
        raise InputError(f"{directory} is more than scale B A on linear layers: {'; '.join(beyond)}. Merge it into the "
                         "base model with PEFT, or train without these")
    if not (directory / PEFT_WEIGHTS).is_file():
        raise InputError(f"{directory}/{PEFT_WEIGHTS} does not exist: save the adapter with safetensors")
    by_hf_name = {spec.hf_name: name for name, spec in linear_tensors(config).items()}
    stored = read_safetensors(directory / PEFT_WEIGHTS)
    factors, alphas, strangers, wrong_ranks = {}, {}, [], []
    for key in stored:
        match = _PEFT_KEY.fullmatch(key)
        target = match and by_hf_name.get(text_model_name(match["module"]) + ".weight")
        if target is None:
            strangers.append(key)
            continue
        factors[f"{target}.lora_{match['factor'].lower()}"] = stored[key]
        r, alphas[target] = _rank_and_alpha(peft, match["module"], directory)
        if match["factor"] == "A" and stored.shape(key)[:1] != (r,):
            wrong_ranks.append(f"{key} is {stored.shape(key)}, {PEFT_CONFIG} says r = {r}")
    if wrong_ranks:
        raise InputError(f"{directory} contradicts itself; " + listing("ranks differ", wrong_ranks))
    return factors, alphas, peft.get("alora_invocation_tokens"), strangers


def _rank_and_alpha(peft, module, directory):
    """r and alpha of one module, for scale = alpha / r. PEFT's own scale is alpha / sqrt(r) with use_rslora."""
    def setting(patterns, default):
        # a pattern is a regular expression for the end of the module's path (PEFT's documentation of rank_pattern)
        return next((value for pattern, value in (peft.get(patterns) or {}).items()
                     if re.fullmatch(rf"(.*\.)?({pattern})", module)), peft.get(default, 8))

    try:
        r, alpha = int(setting("rank_pattern", "r")), float(setting("alpha_pattern", "lora_alpha"))
    except (re.error, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{directory}/{PEFT_CONFIG}: rank or alpha of {module} cannot be read: {error}") from None
    if r < 1 or not np.isfinite(alpha) or alpha == 0:
        raise InputError(f"{directory}/{PEFT_CONFIG}: {module} has rank {r} and alpha {alpha}: it would do nothing")
    return r, alpha * r ** 0.5 if peft.get("use_rslora") else alpha


def write_peft(directory, factors, alpha, config, invocation_tokens=None):
    """Writes a PEFT LoRA directory: adapter_model.safetensors (float32) and adapter_config.json.

    factors: in grouped order, under GGUF names; scale = alpha / r. Module paths are those of the text-only HF model.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory} cannot be made a directory: {error.strerror}") from None
    linear = linear_tensors(config)
    paths = {name: spec.hf_name.removesuffix(".weight") for name, spec in linear.items()}
    tensors = {}
    for name, x in factors.items():
        target, factor = name.rsplit(".", 1)
        tensors[f"base_model.model.{paths[target]}.lora_{factor[-1].upper()}.weight"] = np.asarray(x, np.float32)
    ranks = {paths[name.removesuffix(".lora_a")].removeprefix("model."): x.shape[0]
             for name, x in factors.items() if name.endswith(".lora_a")}
    r = Counter(ranks.values()).most_common(1)[0][0]
    short = {path.rsplit(".", 1)[1] for path in ranks}
    everywhere = len(ranks) == sum(path.rsplit(".", 1)[1] in short for path in paths.values())
    peft = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "r": r, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(short if everywhere else ranks),
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != r},
        "use_rslora": False, "alora_invocation_tokens": invocation_tokens,
    }
    write_safetensors(directory / PEFT_WEIGHTS, tensors, {"format": "pt"})
    with atomic_write(directory / PEFT_CONFIG) as temporary:
        temporary.write_text(json.dumps(peft, indent=2) + "\n", "utf-8")
