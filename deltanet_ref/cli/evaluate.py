"""deltanet-ref eval: how well a model, with or without adapters, predicts a data set."""

import json

from deltanet_ref.cli.model import add_adapter_argument, add_model_arguments, load
from deltanet_ref.cli.options import add_switch, progress
from deltanet_ref.errors import InputError, counted

EPILOG = """\
Of a directory, test.jsonl is used, else valid.jsonl, else train.jsonl.

example:
  deltanet-ref eval Qwen3.5-0.8B-Q8_0.gguf held-out.jsonl
  deltanet-ref eval Qwen3.5-0.8B-Q8_0.gguf held-out.jsonl --adapter scots.gguf
"""


def add_arguments(parser):
    parser.epilog = EPILOG
    add_model_arguments(parser)
    parser.add_argument(
        "data", metavar="DATA", help="a .jsonl file, or a directory of .jsonl files, with rows as for train"
    )
    add_adapter_argument(parser)
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="examples in a batch (default 4)")
    parser.add_argument(
        "--seq-len", type=int, metavar="N", help="maximum tokens of an example (default: the model's context)"
    )
    add_switch(parser, "truncate", False, "cut longer examples instead of refusing them")
    add_switch(parser, "mask_prompt", True, "count completions and answers only, not prompts")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args):
    if args.batch_size < 1:
        raise InputError(f"--batch-size is {args.batch_size}, it must be at least 1")
    from deltanet_ref.train.data import encode_dataset, read_dataset, sequence_limit
    from deltanet_ref.train.evaluate import evaluate

    splits = read_dataset(args.data)
    rows = next(splits[split] for split in ("test", "valid", "train") if split in splits)
    model = load(args)
    context = model.config.max_position_embeddings
    examples = encode_dataset(
        rows,
        model.tokenizer,
        mask_prompt=args.mask_prompt,
        seq_len=sequence_limit(args.seq_len, context, default=context),
        truncate=args.truncate,
    )
    with progress("evaluating") as on_batch:
        result = evaluate(model, examples, args.batch_size, on_batch)
    if args.json:
        print(json.dumps(result._asdict()))
    else:
        sizes = {"example": len(examples), "token": result.tokens, "byte": result.bytes}
        print(
            f"{', '.join(counted(n, noun) for noun, n in sizes.items())}\n"
            f"loss          {result.loss:.4f} nats per token\n"
            f"perplexity    {result.perplexity:.4g}\n"
            f"bits per byte {result.bits_per_byte:.4f}"
        )
