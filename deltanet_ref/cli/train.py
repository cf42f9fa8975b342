"""deltanet-ref train: a LoRA adapter from a model and a JSONL file."""
import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

from deltanet_ref.cli.convert import add_metadata_arguments, given_metadata
from deltanet_ref.cli.model import add_model_arguments, load, refuse_input_as_output
from deltanet_ref.errors import InputError
from deltanet_ref.formats.files import ensure_writable
from deltanet_ref.train.lora import TrainOptions, flag, prepare, run as run_training
from deltanet_ref.train.data import read_dataset
from deltanet_ref.train.memory import keep_freed_memory
from deltanet_ref.train.report import Console, format_peaks, load_matplotlib

METAVARS = {int: "N", float: "X", str: "NAME"}
PLOT_SUFFIXES = (".png", ".svg", ".pdf")

EPILOG = """\
DATA is a .jsonl file, or a directory with train.jsonl and maybe valid.jsonl. A row is one of
  {"text": "..."}
  {"prompt": "...", "completion": "..."}
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"instruction": "...", "input": "...", "output": "..."}
  {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
Conversations go through the model's chat template, and only what the assistant says is trained.

example:
  deltanet-ref train Qwen3.5-0.8B-Q8_0.gguf data.jsonl -o scots.gguf --epochs 2 --val-fraction 0.05
  deltanet-ref generate Qwen3.5-0.8B-Q8_0.gguf --adapter scots.gguf -p "In the beginning"
"""


def add_arguments(parser):
    parser.epilog = EPILOG
    add_model_arguments(parser)
    parser.add_argument("data", metavar="DATA", help="a .jsonl file or a directory of them")
    parser.add_argument("-o", "--output", required=True, metavar="ADAPTER.gguf", help="where the adapter goes")
    parser.add_argument("--rank", type=int, default=16, metavar="N", help="of the update of each matrix (default 16)")
    parser.add_argument("--alpha", type=float, metavar="X",
                        help="the update counts alpha / rank times (default: twice the rank)")
    parser.add_argument("--targets", metavar="NAME,...",
                        help="tensors to adapt, such as attn_qkv,ffn_up (default: all linear ones)")
    add_metadata_arguments(parser)
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the loss curve there (needs matplotlib)")
    for option in fields(TrainOptions):
        kind, text = option.metadata["type"], option.metadata["help"]
        if kind is bool:
            parser.add_argument(flag(option.name), action=argparse.BooleanOptionalAction, default=option.default,
                                help=text)
        else:
            default = "" if option.default is None else f" (default {option.default})"
            parser.add_argument(flag(option.name), type=kind, default=option.default, help=text + default,
                                metavar=METAVARS[kind])


def run(args):
    options = TrainOptions(**{option.name: getattr(args, option.name) for option in fields(TrainOptions)})
    check_outputs(args)
    keep_freed_memory()
    rows = read_dataset(args.data)
    model = load(args)
    from deltanet_ref.lora.adapter import new_adapter

    alpha = 2.0 * args.rank if args.alpha is None else args.alpha
    adapter = new_adapter(model, rank=args.rank, alpha=alpha, targets=args.targets, seed=options.seed)
    adapter.metadata |= given_metadata(args)
    splits = prepare(rows, model, options)

    report = run_training(model, adapter, splits, options, Console(), save=lambda: adapter.save_gguf(args.output))
    adapter.save_gguf(args.output)
    if args.plot:
        report.save_plot(args.plot)
    print(report.text_plot())
    print(format_peaks(report.peak_memory))
    if report.interrupted:
        print(f"Interrupted after {report.steps} steps.", file=sys.stderr)
    print(f"Saved {args.output} ({os.path.getsize(args.output) / 1e6:.2f} MB) after {report.steps} steps, "
          f"{report.tokens} tokens, {report.seconds:.1f} s")
    return 130 if report.interrupted else 0


def check_outputs(args):
    """Refuse, before any work, an output that could not be written at the end or would destroy an input."""
    output = Path(args.output)
    if output.suffix != ".gguf":
        raise InputError(f"{output}: an adapter's name must end in .gguf")
    refuse_input_as_output(output, args.model, args.data)
    ensure_writable(output)
    if args.plot:
        if Path(args.plot).suffix not in PLOT_SUFFIXES:
            raise InputError(f"{args.plot}: a plot's name must end in {', '.join(PLOT_SUFFIXES)}")
        load_matplotlib()
        ensure_writable(args.plot)
