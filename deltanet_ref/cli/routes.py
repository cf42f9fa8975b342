"""deltanet-ref routes: quantise below an adapter, after merging it, or before training it?"""

from argparse import Namespace
from pathlib import Path

from deltanet_ref.cli.model import add_model_arguments, load, split_scale
from deltanet_ref.cli.options import add_type_argument
from deltanet_ref.errors import InputError
from deltanet_ref.formats.files import atomic_directory, ensure_new_directory

EPILOG = """\
Evaluates on DATA: the base, alone and with the adapter; the quantised base, alone and with the adapter; the merged and
then quantised model; and, with --train, a new adapter trained on the quantised base with the rank, alpha and targets of
the given one. Writes the models, the new adapter, routes.md and routes.png to DIR (needs matplotlib).

example:
  deltanet-ref routes Qwen3.5-0.8B-F16.gguf scots.gguf held-out.jsonl --train data.jsonl --steps 200 -o routes
"""


def add_arguments(parser):
    from deltanet_ref.model.convert import CHOICES
    from deltanet_ref.train.lora import TrainOptions

    parser.epilog = EPILOG
    add_model_arguments(parser)
    parser.add_argument("adapter_file", metavar="ADAPTER[=SCALE]", help="a GGUF adapter or a PEFT directory")
    parser.add_argument("data", metavar="DATA", help="a .jsonl file to evaluate on, with rows as for train")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="the directory to create")
    add_type_argument(
        parser, CHOICES, f"type of the quantised models: {', '.join(CHOICES)} (default q4_k_m)", default="q4_k_m"
    )
    parser.add_argument(
        "--train", metavar="TRAIN.jsonl", help="also train an adapter on the quantised base, on this data"
    )
    training = parser.add_argument_group("options of --train")
    training.add_argument("--steps", type=int, default=100, metavar="N", help="optimizer steps (default 100)")
    training.add_argument(
        "--batch-size",
        type=int,
        default=TrainOptions.batch_size,
        metavar="N",
        help=f"examples in a step (default {TrainOptions.batch_size})",
    )
    training.add_argument(
        "--lr", type=float, default=TrainOptions.lr, metavar="X", help=f"peak learning rate (default {TrainOptions.lr})"
    )
    training.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed of the adapter's initial values and the order of examples (default 0)",
    )


def run(args):
    from deltanet_ref.train.data import encode_dataset, read_dataset
    from deltanet_ref.train.lora import TrainOptions
    from deltanet_ref.train.report import Console, load_matplotlib
    from deltanet_ref.train.routes import as_markdown, compare_routes, save_plot

    load_matplotlib()
    ensure_new_directory(args.output)
    path, scale = split_scale(args.adapter_file)
    options = {name: getattr(args, name) for name in ("steps", "batch_size", "lr", "seed")}
    rows = [row for split in read_dataset(args.data).values() for row in split]
    TrainOptions(**options)  # refuses bad options before any work
    if args.train:
        if Path(args.train).resolve() == Path(args.data).resolve():
            raise InputError(f"{args.train}: is DATA too; the loss on training data says little: give two files")
        read_dataset(args.train)

    def load_one(path):
        return load(Namespace(**vars(args) | {"model": path}))

    def examples(model):
        return encode_dataset(rows, model.tokenizer, seq_len=model.config.max_position_embeddings)

    with atomic_directory(args.output) as directory:
        routes = compare_routes(
            load_one,
            args.model,
            path,
            scale,
            examples,
            directory,
            type=args.type,
            training=args.train,
            console=Console(),
            **options,
        )
        table = as_markdown(routes)
        (directory / "routes.md").write_text(table, "utf-8")
        save_plot(routes, directory / "routes.png")
    print(f"\n{table}\nWrote the models, routes.md and routes.png to {args.output}")
