"""deltanet-ref info: print what a model or adapter holds."""

import json
import math
from dataclasses import asdict
from pathlib import Path

from deltanet_ref.cli.convert import is_adapter
from deltanet_ref.errors import counted, printable
from deltanet_ref.formats.files import read_json
from deltanet_ref.formats.gguf import GGUFFile, read_gguf
from deltanet_ref.formats.quants import stored_bytes
from deltanet_ref.formats.safetensors import read_safetensors
from deltanet_ref.lora.adapter import adapter_metadata
from deltanet_ref.lora.bridge import PEFT_CONFIG, PEFT_WEIGHTS, invocation_tokens
from deltanet_ref.model.config import ARCHITECTURE

PEFT_SETTINGS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")  # printed where set

EPILOG = """\
example:
  deltanet-ref info Qwen3.5-0.8B-Q8_0.gguf
  deltanet-ref info Qwen3.5-0.8B-Q8_0.gguf --json | python -m json.tool
"""


def add_arguments(parser):
    parser.epilog = EPILOG
    parser.add_argument(
        "model", metavar="MODEL", help="a model or an adapter: a .gguf file, an HF directory or a PEFT directory"
    )
    parser.add_argument("--tensors", action="store_true", help="also list every tensor")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args):
    facts = describe(args.model)
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    print(args.model)
    for key, value in facts.items():
        if key == "tensors":
            continue
        if isinstance(value, dict):
            print(f"{key}:")
            for name, item in value.items():
                print(f"  {name:30} {text(item)}")
        else:
            print(f"{key:32} {text(value)}")
    if args.tensors:
        print("tensors:")
        for tensor in facts["tensors"]:
            print(f"  {printable(tensor['name']):34} {tensor['type']:8} {' x '.join(map(str, tensor['shape']))}")


def describe(path: Path | str) -> dict:
    """All facts about a model or an adapter, ready for JSON; "tensors" comes last. Raises InputError."""
    path = Path(path)
    if is_adapter(path):
        return describe_peft(path) if path.is_dir() else describe_adapter(read_gguf(path))
    import deltanet_ref as dr

    model = dr.load_model(path, backend="numpy", weights="mapped")  # nothing is computed
    tokenizer = model.tokenizer
    stored = [(name, model.weights.stored_type(name), model.weights.shape(name)) for name in model.weights]
    return {
        "architecture": ARCHITECTURE,
        "parameters": sum(math.prod(shape) for _, _, shape in stored),
        "config": asdict(model.config),
        "tokenizer": tokenizer
        and {
            "vocab_size": tokenizer.vocab_size,
            "end_tokens": [tokenizer.decode([token]) for token in sorted(tokenizer.eos_ids)],
        },
        "chat_template": bool(tokenizer and tokenizer.chat_template),
        "notes": model.notes,
    } | tensor_facts([(name, kind.name, shape, stored_bytes(kind, shape)) for name, kind, shape in stored])


def describe_adapter(file: GGUFFile) -> dict:
    """The facts about a LoRA adapter in GGUF. Raises InputError."""
    stored = [(name, tensor.type.name, tensor.shape, tensor.nbytes) for name, tensor in file.tensors.items()]
    factors = [name.removesuffix(".weight.lora_a") for name in file.tensors if name.endswith(".weight.lora_a")]
    return adapter_facts(
        file.metadata.get("general.architecture"),
        file.metadata.get("adapter.lora.alpha"),
        factors,
        ".lora_a",
        stored,
        adapter_metadata(file),
    )


def describe_peft(directory: Path) -> dict:
    """The same facts about a LoRA adapter in a PEFT directory. Raises InputError."""
    config, tensors = read_json(directory / PEFT_CONFIG), read_safetensors(directory / PEFT_WEIGHTS)
    stored = [
        (name, tensors.stored(name).dtype, tensors.shape(name), tensors.stored(name).raw.nbytes) for name in tensors
    ]
    factors = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    metadata = {name: tensors.metadata[name] for name in ("task_name", "prompt_prefix") if name in tensors.metadata}
    if tokens := config.get("alora_invocation_tokens"):
        metadata["invocation_tokens"] = invocation_tokens(tokens, directory / PEFT_CONFIG)
    metadata |= {name: config[name] for name in PEFT_SETTINGS if config.get(name)}
    return adapter_facts(
        config.get("base_model_name_or_path"), config.get("lora_alpha"), factors, ".lora_A.weight", stored, metadata
    )


def adapter_facts(base, alpha, factors, suffix_of_a, stored, metadata):
    return {
        "architecture": f"LoRA adapter for {base if isinstance(base, str) else 'an unnamed base'}",
        "parameters": sum(math.prod(shape) for _, _, shape, _ in stored),
        "alpha": float(alpha) if isinstance(alpha, int | float) and abs(alpha) < 2**31 else None,
        "ranks": sorted({math.prod(shape[:1]) for name, _, shape, _ in stored if name.endswith(suffix_of_a)}),
        "targets": sorted({name.rpartition(".")[2] for name in factors}),
        **metadata,
    } | tensor_facts(stored)


def tensor_facts(stored):
    """Sums by type, and the list, of (name, type, shape, bytes)."""
    types = {}
    for _, kind, shape, nbytes in stored:
        sums = types.setdefault(kind, {"tensors": 0, "parameters": 0, "bytes": 0})
        sums["tensors"] += 1
        sums["parameters"] += math.prod(shape)
        sums["bytes"] += nbytes
    return {
        "bytes": sum(sums["bytes"] for sums in types.values()),
        "types": types,
        "tensors": [{"name": name, "type": kind, "shape": list(shape)} for name, kind, shape, _ in stored],
    }


def text(value):
    """A value on one line."""
    if isinstance(value, dict):
        return ", ".join(counted(item, name.removesuffix("s")) for name, item in value.items())
    if isinstance(value, list | tuple):
        return printable("; ".join(map(str, value)) or "none")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else printable(str(value))
