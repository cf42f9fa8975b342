"""deltanet-ref merge: a base model with adapters merged into its weights."""

from deltanet_ref.cli.model import losses_by_type, split_scale
from deltanet_ref.cli.options import add_output_arguments, add_type_argument, check_output

EPILOG = """\
OUTPUT is a GGUF file if its name ends in .gguf, otherwise a new HF directory. Without --type every tensor keeps its
type, and tensors that no adapter changes are copied byte for byte. For each changed tensor that is re-encoded, "error"
is the relative error of the encoding and "change" the relative change made by the adapters. If the error is larger,
much of the adapter is lost: use a type with more bits, or attach the adapter at run time.

example:
  deltanet-ref merge Qwen3.5-0.8B-F16.gguf --adapter scots.gguf -o scots-F16.gguf
  deltanet-ref merge Qwen3.5-0.8B-F16.gguf --adapter scots.gguf=0.8 --type q4_k_m -o scots-Q4_K_M.gguf
"""


def add_arguments(parser):
    from deltanet_ref.model.convert import CHOICES

    parser.epilog = EPILOG
    parser.add_argument("base", metavar="BASE", help="a .gguf file, or a directory with config.json and safetensors")
    parser.add_argument(
        "--adapter",
        action="append",
        required=True,
        metavar="FILE[=SCALE]",
        help="a GGUF adapter or a PEFT directory, multiplied by SCALE (default 1); may be given several times",
    )
    add_output_arguments(parser, "OUTPUT", "a name ending in .gguf, or a new directory")
    add_type_argument(
        parser,
        CHOICES,
        f"{', '.join(CHOICES)}; HF directories only the first three (default: each tensor keeps its type)",
    )


def run(args):
    from deltanet_ref.lora.merge import merge

    adapters = [split_scale(spec) for spec in args.adapter]
    check_output(args, inputs=(args.base, *(path for path, _ in adapters)))
    losses = merge(args.base, adapters, args.output, args.type)
    changed = [w for w in losses if w.change is not None]
    if changed:
        print(f"{'tensor':32} {'type':5} {'error':>9} {'change':>9}")
    for w in changed:
        print(f"{w.name:32} {w.type.name:5} {w.error:9.2e} {w.change:9.2e}")
    print(losses_by_type(losses), end="")
    print(f"Wrote {args.output}")
