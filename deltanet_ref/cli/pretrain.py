"""deltanet-ref pretrain: train a small model from scratch."""

import os
from pathlib import Path

from deltanet_ref.backends import CPU_BACKENDS
from deltanet_ref.cli.options import add_output_arguments, add_type_argument, check_output, flag
from deltanet_ref.errors import InputError
from deltanet_ref.formats.files import ensure_writable, read_text
from deltanet_ref.formats.tokenizer import Tokenizer
from deltanet_ref.train.pretrain import (
    TYPES,
    PretrainOptions,
    file_metadata,
    pretrain,
    starting_model,
    stored_tensors,
    write_model,
)
from deltanet_ref.train.report import Console

EPILOG = """\
CORPUS is UTF-8 text with a blank line between documents. The tokenizer is Hugging Face's tokenizer.json, with
tokenizer_config.json (its eos_token ends a document) and chat_template.jinja in the same directory.

example (bench/tiny_model/README.md documents how the model of `deltanet-ref demo` was made):
  deltanet-ref pretrain training.txt --tokenizer tokenizer/ --valid held-out.txt -o tiny.gguf --type q8_0 --minutes 30
"""

# field of PretrainOptions: type, help; the defaults are those of PretrainOptions
OPTIONS = {
    "batch_size": (int, "sequences in a step"),
    "seq_len": (int, "tokens of a sequence"),
    "lr": (float, "peak learning rate; decays to a tenth along a cosine"),
    "warmup": (int, "steps of linear warmup"),
    "weight_decay": (float, "weight decay of the matrices"),
    "dropout": (float, "probability that a sequence does without a feature, in training"),
    "clip": (float, "maximum norm of the gradient"),
    "seed": (int, "random seed of the weights and the order of the text"),
    "eval_every": (int, "steps between evaluations on --valid, 0 for only the first and last"),
    "save_every": (int, "steps between saves of the unfinished model, 0 for none"),
    "log_every": (int, "steps between log lines"),
    "threads": (int, "CPU threads that share a batch"),
    "hidden": (int, "width of the residual stream"),
    "layers": (int, "blocks; every fourth is softmax attention"),
    "ffn": (int, "width of the feed-forward"),
    "heads": (int, "attention heads"),
    "kv_heads": (int, "key/value heads of attention"),
    "head_dim": (int, "features of an attention head"),
    "delta_key_heads": (int, "key heads of the delta rule"),
    "delta_value_heads": (int, "value heads of the delta rule"),
    "delta_head_dim": (int, "features of a delta rule head, key and value"),
    "conv_kernel": (int, "taps of the causal convolution"),
    "rope_theta": (float, "base of the rotary frequencies"),
    "rotary": (float, "fraction of an attention head that is rotated"),
    "context": (int, "context length that the file states, in tokens"),
}


def add_arguments(parser):
    parser.epilog = EPILOG
    parser.add_argument("corpus", metavar="CORPUS.txt", type=Path, help="the text to train on")
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH", type=Path, help="tokenizer.json, or its directory"
    )
    parser.add_argument("--valid", metavar="TEXT.txt", type=Path, help="held-out text to evaluate on")
    add_output_arguments(parser, "MODEL.gguf", "the model to write", type=Path)
    add_type_argument(parser, TYPES, f"type of the matrices: {', '.join(TYPES)} (default f32)", default="f32")
    parser.add_argument("--name", default="tiny", metavar="TEXT", help="general.name of the file (default tiny)")
    parser.add_argument("--description", default="", metavar="TEXT", help="general.description of the file")
    parser.add_argument("--license", default="", metavar="TEXT", help="general.license of the file")
    parser.add_argument(
        "--start", metavar="MODEL.gguf", type=Path, help="continue from this model instead of a new one"
    )
    parser.add_argument(
        "--backend",
        choices=CPU_BACKENDS,
        default="numba",
        metavar="NAME",
        help=f"{' or '.join(CPU_BACKENDS)} (default numba)",
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    length.add_argument(
        "--minutes", type=float, metavar="X", help="as many steps as fit in this time, estimated from the first batches"
    )
    for name, (kind, text) in OPTIONS.items():
        default = getattr(PretrainOptions, name)
        parser.add_argument(
            flag(name),
            type=kind,
            default=default,
            metavar={int: "N", float: "X"}[kind],
            help=f"{text} (default {default})",
        )


def run(args):
    options = PretrainOptions(**{name: getattr(args, name) for name in ("steps", "minutes", *OPTIONS)})
    if args.output.suffix != ".gguf":
        raise InputError(f"{args.output}: the name of a model must end in .gguf")
    check_output(args, inputs=(args.corpus, args.valid, args.start))
    ensure_writable(args.output)
    directory = args.tokenizer.parent if args.tokenizer.is_file() else args.tokenizer
    tokenizer = Tokenizer.from_hf(directory)
    model = starting_model(options, tokenizer, args.start, args.backend)
    stored_tensors(model, args.type)  # refuses a type that does not fit before training, not after it
    metadata = file_metadata(directory, tokenizer, name=args.name, description=args.description, license=args.license)
    text = read_corpus(args.corpus)
    valid = read_corpus(args.valid) if args.valid else ""

    def save():
        write_model(args.output, model, args.type, metadata)

    history = pretrain(model, text, options, valid=valid, console=Console(), save=save)
    save()
    print(
        f"Saved {args.output} ({os.path.getsize(args.output) / 1e6:.2f} MB) after {len(history.losses)} steps, "
        f"{history.tokens:,} tokens, {history.seconds:.0f} s"
    )
    return 130 if history.interrupted else 0


def read_corpus(path):
    """A non-empty UTF-8 text file. Raises InputError."""
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path}: is empty")
    return text
