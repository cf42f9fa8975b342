"""deltanet-ref convert: adapters between GGUF and PEFT, base models between GGUF and HF."""

from pathlib import Path

import numpy as np

from deltanet_ref.cli.model import losses_by_type, print_notes
from deltanet_ref.cli.options import add_output_arguments, add_type_argument, check_output
from deltanet_ref.errors import InputError, counted

PREFIXES = ("model.", "model.language_model.")

EPILOG = """\
SOURCE is an adapter (a GGUF file, or a directory with adapter_config.json) or a base model (a GGUF file, or a directory
with config.json). OUTPUT is a GGUF file if its name ends in .gguf, otherwise a new directory: in PEFT's form for an
adapter, in HF's for a base model. An adapter needs --base, whose shape determines the order of the V heads.

example:
  deltanet-ref convert peft-directory -o scots.gguf --base Qwen3.5-0.8B-Q8_0.gguf
  deltanet-ref convert scots.gguf -o peft-directory --base Qwen3.5-0.8B-Q8_0.gguf
  deltanet-ref convert merged-hf-directory -o merged.gguf --type q8_0
  deltanet-ref convert merged.gguf -o hf-directory --type bf16
"""


def add_arguments(parser):
    from deltanet_ref.model.convert import CHOICES

    parser.epilog = EPILOG
    parser.add_argument("source", metavar="SOURCE", help="an adapter or a base model")
    add_output_arguments(
        parser, "OUTPUT", "a name ending in .gguf, or a new directory", replaces="an adapter (by an adapter)"
    )
    add_type_argument(
        parser,
        CHOICES,
        f"{', '.join(CHOICES)}; adapters and HF directories only the first three (default: each tensor keeps its type)",
    )
    adapter = parser.add_argument_group("adapters")
    adapter.add_argument("--base", metavar="MODEL", help="the base model: a .gguf file or an HF directory")
    adapter.add_argument(
        "--drop",
        metavar="KIND,...",
        default="",
        help="leave out entries that are not plain LoRA: dora, modules_to_save, bias, conv1d, A_log, ...",
    )
    adapter.add_argument(
        "--prefix",
        choices=PREFIXES,
        default=PREFIXES[0],
        metavar="PATH",
        help=f"prefix of the module names in a PEFT directory: {' (default) or '.join(PREFIXES)}",
    )
    add_metadata_arguments(adapter)
    adapter.add_argument(
        "--invocation",
        metavar="TEXT",
        help="make it an activated LoRA, which acts from the last occurrence of TEXT in the prompt on",
    )


def add_metadata_arguments(parser):
    """The options for an adapter's metadata, shared by convert and train; given_metadata reads them."""
    parser.add_argument("--task-name", metavar="TEXT", help="task name to store in the adapter")
    parser.add_argument(
        "--prompt-prefix",
        metavar="TEXT",
        help="text to store in the adapter, which generate prepends to every prompt (training data is used unchanged)",
    )


def given_metadata(args) -> dict:
    """The options of add_metadata_arguments that were given, for Adapter.metadata."""
    return {name: text for name in ("task_name", "prompt_prefix") if (text := getattr(args, name))}


def run(args):
    from_adapter = is_adapter(args.source)
    check_output(args, inputs=(args.source, args.base), replaces=is_adapter if from_adapter else lambda path: False)
    if from_adapter:
        return convert_adapter(args)
    given = [option for option in ("base", "drop", "task_name", "prompt_prefix", "invocation") if getattr(args, option)]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} is for adapters; {args.source} is a base model")
    from deltanet_ref.model.convert import GGUFBase, check_output as check_types, open_base, write_base, writes_gguf

    base = open_base(args.source)
    check_types(base, args.output, args.type)
    if isinstance(base, GGUFBase) != writes_gguf(args.output):
        print_notes(base.notes)
    print(losses_by_type(write_base(base, args.output, args.type)), end="")
    print(f"Wrote {args.output}: {counted(len(base.specs), 'tensor')}")


def is_adapter(path: Path | str) -> bool:
    """Whether a file or directory holds an adapter, by its contents. Raises InputError for a directory without either
    configuration file, and for a file that is not GGUF."""
    from deltanet_ref.formats.gguf import read_gguf
    from deltanet_ref.formats.values import is_text

    path = Path(path)
    if not path.is_dir():
        return is_text(read_gguf(path).metadata.get("general.type"), "adapter")
    found = [name for name in ("adapter_config.json", "config.json") if (path / name).is_file()]
    if not found:
        raise InputError(
            f"{path}: has neither adapter_config.json nor config.json: give the directory of an adapter or of a model"
        )
    return found[0] == "adapter_config.json"


def convert_adapter(args):
    """GGUF or PEFT adapter -> GGUF or PEFT adapter."""
    from deltanet_ref.formats.files import atomic_directory, ensure_new_directory, ensure_writable
    from deltanet_ref.formats.tokenizer import load_tokenizer
    from deltanet_ref.lora.adapter import open_adapter
    from deltanet_ref.model.convert import writes_gguf
    from deltanet_ref.model.load import read_config

    if args.base is None:
        raise InputError("an adapter needs --base MODEL, its base model: a .gguf file or an HF directory")
    to_gguf = writes_gguf(args.output)
    ensure_writable(args.output) if to_gguf else ensure_new_directory(args.output)
    drop = [name.strip() for name in args.drop.split(",") if name.strip()]
    adapter = open_adapter(args.source, read_config(args.base), np.float64, drop)
    adapter.metadata |= given_metadata(args)
    if args.invocation:
        adapter.metadata["invocation_tokens"] = load_tokenizer(args.base).encode(args.invocation)
    print_notes(adapter.notes)
    kind = args.type or "kept"
    if to_gguf:
        adapter.save_gguf(args.output, kind)
    else:
        with atomic_directory(args.output) as temporary:
            adapter.save_peft(temporary, kind, args.prefix)
    ranks = sorted({adapter.rank(target) for target in adapter.targets})
    print(
        f"Wrote {args.output}: {counted(len(adapter.targets), 'adapted tensor')}, rank {', '.join(map(str, ranks))}, "
        f"alpha {adapter.alpha:g}"
    )
