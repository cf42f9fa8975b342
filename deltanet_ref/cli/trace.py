"""deltanet-ref trace: write every named tensor of a forward, and optionally of its backward, to a file."""
from pathlib import Path

from deltanet_ref.cli.model import add_adapter_argument, add_model_arguments, load
from deltanet_ref.errors import InputError

EPILOG = """\
docs/trace.md lists the names, so that other implementations can write the same file. The default backend is numpy.

example:
  deltanet-ref trace model.gguf --tokens 17,401,3,250 --backward -o ours.safetensors
  deltanet-ref trace model.gguf -p "A text to read." --dtype float64 -o ours.safetensors
  deltanet-ref diff ours.safetensors theirs.safetensors
"""


def add_arguments(parser):
    parser.epilog = EPILOG
    add_model_arguments(parser)
    parser.set_defaults(backend="numpy")
    add_adapter_argument(parser)
    add_token_arguments(parser)
    parser.add_argument("--backward", action="store_true",
                        help="also write the gradients of activations and parameters; the loss is the cross-entropy of "
                             "each next token")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the .safetensors file to write")


def run(args):
    from deltanet_ref import __version__
    from deltanet_ref.oracle.trace import trace, write_trace

    if not args.output.endswith(".safetensors"):
        raise InputError(f"-o {args.output}: must end in .safetensors")
    if not Path(args.output).absolute().parent.is_dir():
        raise InputError(f"-o {args.output}: its directory does not exist")
    model = load(args)
    tokens = read_tokens(args, model)
    result = trace(model, tokens, backward=args.backward, name=args.model, version=f"deltanet_ref {__version__}")
    write_trace(args.output, result)
    print(f"{args.output}: {len(result.tensors)} tensors of {len(tokens)} tokens, {args.dtype}, "
          f"loss {result.tensors['loss']:.6g}")


def add_token_arguments(parser, required=True):
    given = parser.add_mutually_exclusive_group(required=required)
    given.add_argument("--tokens", metavar="ID,ID,...", help="token ids, separated by commas")
    given.add_argument("-p", "--prompt", metavar="TEXT", help="text, encoded by the model's tokenizer")


def read_tokens(args, model):
    """Token ids from --tokens or --prompt, a list of int. Raises InputError when there are none."""
    if args.tokens is None:
        if model.tokenizer is None:
            raise InputError("the model has no tokenizer: give --tokens")
        ids = model.tokenizer.encode(args.prompt)
    else:
        try:
            ids = [int(word) for word in args.tokens.split(",")]
        except ValueError:
            raise InputError(f"--tokens {args.tokens}: write ids separated by commas, such as 17,401,3") from None
    if not ids:
        raise InputError("the prompt is empty")
    return ids
