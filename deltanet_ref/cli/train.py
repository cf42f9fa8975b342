"""deltanet-ref train: train a LoRA adapter on a JSONL file."""

import os
import sys
from pathlib import Path

from deltanet_ref.cli.convert import add_metadata_arguments, given_metadata, is_adapter
from deltanet_ref.cli.model import add_model_arguments, load
from deltanet_ref.cli.options import add_output_arguments, add_switch, check_output, flag
from deltanet_ref.errors import InputError
from deltanet_ref.formats.files import ensure_writable
from deltanet_ref.train.data import read_dataset
from deltanet_ref.train.lora import DEFAULT_SEQ_LEN, TrainOptions, prepare, run as run_training
from deltanet_ref.train.report import Console, format_peaks, load_matplotlib
from deltanet_ref.train.schedule import SHAPES

PLOT_SUFFIXES = (".png", ".svg", ".pdf")

# field of TrainOptions: type, help; the defaults are those of TrainOptions
OPTIONS = {
    "steps": (int, "optimizer steps"),
    "epochs": (float, "passes over the data, instead of --steps (default 1)"),
    "batch_size": (int, "examples in a batch, packed end to end without padding"),
    "grad_accumulation": (int, "batches in an optimizer step"),
    "seq_len": (int, f"maximum tokens of an example (default: {DEFAULT_SEQ_LEN}, or the model's context)"),
    "truncate": (bool, "cut longer examples instead of refusing them"),
    "checkpoint": (bool, "gradient checkpointing: less memory for long sequences; every block's forward runs twice"),
    "mask_prompt": (bool, "train on completions and answers only, not on prompts"),
    "lr": (float, "peak learning rate"),
    "warmup": (int, "steps of linear warmup"),
    "schedule": (str, f"decay after warmup: {', '.join(SHAPES)}"),
    "weight_decay": (float, "weight decay of AdamW"),
    "clip": (float, "maximum norm of the gradient, 0 for no limit"),
    "seed": (int, "random seed of the adapter's initial values, the order of examples and the validation split"),
    "val_fraction": (float, "fraction of the rows to hold out for validation if there is no valid.jsonl"),
    "eval_every": (int, "steps between validations, 0 for only the first and last"),
    "log_every": (int, "steps between log lines"),
    "save_every": (int, "steps between saves of the unfinished adapter, 0 for none"),
}
METAVARS = {int: "N", float: "X", str: "NAME"}

EPILOG = """\
DATA is a .jsonl file, or a directory with train.jsonl and optionally valid.jsonl. A row is one of
  {"text": "..."}
  {"prompt": "...", "completion": "..."}
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"instruction": "...", "input": "...", "output": "..."}
  {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
Conversations are rendered with the model's chat template; only the assistant's own output is trained.
Ctrl-C ends training after the current step and saves the adapter.

example:
  deltanet-ref train Qwen3.5-0.8B-Q8_0.gguf data.jsonl -o scots.gguf --epochs 2 --val-fraction 0.05
  deltanet-ref generate Qwen3.5-0.8B-Q8_0.gguf --adapter scots.gguf -p "In the beginning"
"""


def add_arguments(parser):
    parser.epilog = EPILOG
    add_model_arguments(parser)
    parser.add_argument("data", metavar="DATA", help="a .jsonl file, or a directory of .jsonl files")
    add_output_arguments(parser, "ADAPTER.gguf", "the adapter to write", replaces="an adapter")
    parser.add_argument(
        "--rank", type=int, default=16, metavar="N", help="rank of the update of each matrix (default 16)"
    )
    parser.add_argument(
        "--alpha", type=float, metavar="X", help="scales the update by alpha / rank (default: twice the rank)"
    )
    parser.add_argument(
        "--targets", metavar="NAME,...", help="tensors to adapt, such as attn_qkv,ffn_up (default: all linear layers)"
    )
    add_metadata_arguments(parser)
    parser.add_argument(
        "--plot",
        metavar="FILE.png",
        help="also plot the loss curve to this file, which is replaced if it exists (needs matplotlib)",
    )
    for name, (kind, text) in OPTIONS.items():
        default = getattr(TrainOptions, name)
        if kind is bool:
            add_switch(parser, name, default, text)
        else:
            parser.add_argument(
                flag(name),
                type=kind,
                default=default,
                metavar=METAVARS[kind],
                help=text if default is None else f"{text} (default {default})",
            )


def run(args):
    options = TrainOptions(**{name: getattr(args, name) for name in OPTIONS})
    check_outputs(args)
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
    print(
        f"Saved {args.output} ({os.path.getsize(args.output) / 1e6:.2f} MB) after {report.steps} steps, "
        f"{report.tokens} tokens, {report.seconds:.1f} s"
    )
    return 130 if report.interrupted else 0


def check_outputs(args):
    """Refuse, before any work, outputs that cannot be written at the end or would destroy a file."""
    output = Path(args.output)
    if output.suffix != ".gguf":
        raise InputError(f"{output}: the name of an adapter must end in .gguf")
    check_output(args, inputs=(args.model, args.data), replaces=is_adapter)
    ensure_writable(output)
    if args.plot:
        if Path(args.plot).suffix not in PLOT_SUFFIXES:
            raise InputError(f"{args.plot}: the name of a plot must end in {', '.join(PLOT_SUFFIXES)}")
        load_matplotlib()
        ensure_writable(args.plot)
