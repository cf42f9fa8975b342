"""deltanet-ref info: what is in a model or adapter file."""
import json
import math
from dataclasses import asdict
from pathlib import Path

from deltanet_ref.errors import printable

EPILOG = """\
example:
  deltanet-ref info Qwen3.5-0.8B-Q8_0.gguf
  deltanet-ref info Qwen3.5-0.8B-Q8_0.gguf --json | python -m json.tool
"""


def add_arguments(parser):
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL",
                        help="a .gguf file (an adapter too), or a directory with config.json and safetensors")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
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


def describe(path):
    """All that is known of the file, ready for JSON; "tensors" comes last."""
    path = Path(path)
    if not path.is_dir():
        from deltanet_ref.formats.gguf import read_gguf
        from deltanet_ref.formats.values import is_text

        file = read_gguf(path)
        if is_text(file.metadata.get("general.type"), "adapter"):
            return describe_adapter(file)
    import deltanet_ref as dr

    model = dr.load_model(path, backend="numpy", weights="mapped")        # nothing is computed
    tokenizer = model.tokenizer
    stored = [(name, model.weights.stored_type(name), model.weights.shape(name)) for name in model.weights]
    return {
        "architecture": "qwen35",
        "parameters": sum(math.prod(shape) for _, _, shape in stored),
        "config": asdict(model.config),
        "tokenizer": tokenizer and {
            "vocab_size": tokenizer.vocab_size,
            "end_tokens": [tokenizer.decode([token]) for token in sorted(tokenizer.eos_ids)],
        },
        "chat_template": bool(tokenizer and tokenizer.chat_template),
        "notes": model.notes,
    } | tensor_facts(stored)


def describe_adapter(file):
    """The facts of a LoRA adapter in GGUF."""
    from deltanet_ref.lora.adapter import adapter_metadata

    factors = {name: tensor.shape for name, tensor in file.tensors.items()}
    alpha = file.metadata.get("adapter.lora.alpha")
    return {
        "architecture": f"LoRA adapter for {file.metadata.get('general.architecture', 'an unnamed architecture')}",
        "parameters": sum(math.prod(shape) for shape in factors.values()),
        "alpha": alpha if isinstance(alpha, float) else None,
        "ranks": sorted({math.prod(shape[:1]) for name, shape in factors.items() if name.endswith(".lora_a")}),
        "targets": sorted({name.removesuffix(".weight.lora_a").rpartition(".")[2] for name in factors
                           if name.endswith(".lora_a")}),
        **adapter_metadata(file),
    } | tensor_facts([(name, tensor.type, tensor.shape) for name, tensor in file.tensors.items()])


def tensor_facts(stored):
    """Sums by type, and the list, of (name, type, shape)."""
    from deltanet_ref.formats.quants import stored_bytes

    types = {}
    for _, kind, shape in stored:
        sums = types.setdefault(kind.name, {"tensors": 0, "parameters": 0, "bytes": 0})
        sums["tensors"] += 1
        sums["parameters"] += math.prod(shape)
        sums["bytes"] += stored_bytes(kind, shape)
    return {"bytes": sum(sums["bytes"] for sums in types.values()), "types": types,
            "tensors": [{"name": name, "type": kind.name, "shape": list(shape)} for name, kind, shape in stored]}


def text(value):
    """One line for a person."""
    if isinstance(value, dict):
        return ", ".join(f"{item:,} {name}" for name, item in value.items())
    if isinstance(value, list):
        return printable("; ".join(map(str, value)) or "none")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else printable(str(value))
