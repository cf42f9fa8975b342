"""deltanet-ref trace: write every named tensor of a forward and backward pass to a file."""

from deltanet_ref.cli.model import add_adapter_argument, add_model_arguments, load, print_notes
from deltanet_ref.cli.options import add_output_arguments, check_output
from deltanet_ref.errors import LONGEST_VALUE, InputError, counted, shortened
from deltanet_ref.formats.files import ensure_writable

EPILOG = """\
docs/trace.md lists the names, so that other implementations can write the same file.

example:
  deltanet-ref trace model.gguf --tokens 17,401,3,250 --backward -o ours.safetensors
  deltanet-ref trace model.gguf -p "A text to read." --dtype float64 -o ours.safetensors
  deltanet-ref diff ours.safetensors theirs.safetensors
"""


def add_arguments(parser):
    parser.epilog = EPILOG
    add_model_arguments(parser, backend="numpy")
    add_adapter_argument(parser)
    add_token_arguments(parser)
    parser.add_argument(
        "--backward",
        action="store_true",
        help="also write the gradients of activations and parameters; the loss is the mean "
        "cross-entropy of the next tokens",
    )
    add_output_arguments(parser, "FILE", "the .safetensors file to write", replaces="a trace")


def run(args):
    from deltanet_ref import __version__
    from deltanet_ref.oracle.trace import read_trace, trace, write_trace

    if not args.output.endswith(".safetensors"):
        raise InputError(f"{args.output}: the name of a trace must end in .safetensors")
    check_output(args, inputs=(args.model,), replaces=read_trace)
    ensure_writable(args.output)
    model = load(args)
    tokens = read_tokens(args, model)
    result = trace(model, tokens, backward=args.backward, name=args.model, version=f"deltanet_ref {__version__}")
    write_trace(args.output, result)
    print(
        f"{args.output}: {counted(len(result.tensors), 'tensor')} of {counted(len(tokens), 'token')}, {args.dtype}, "
        f"loss {result.tensors['loss']:.6g}"
    )


def add_token_arguments(parser, required=True):
    given = parser.add_mutually_exclusive_group(required=required)
    given.add_argument("--tokens", metavar="ID,ID,...", help="the token ids to read")
    given.add_argument("-p", "--prompt", metavar="TEXT", help="the text to read, encoded by the model's tokenizer")


def read_tokens(args, model):
    """The ids of --tokens or of --prompt; a note on stderr if they are more than the model's context."""
    if args.tokens is None:
        if model.tokenizer is None:
            raise InputError("the model has no tokenizer: give --tokens")
        ids = model.tokenizer.encode(args.prompt)
    else:
        try:
            ids = [int(word) for word in args.tokens.split(",")]
        except ValueError:
            given = shortened(args.tokens, LONGEST_VALUE)
            raise InputError(f"--tokens {given}: write ids separated by commas, such as 17,401,3") from None
    if not ids:
        raise InputError("the prompt is empty")
    context = model.config.max_position_embeddings
    if len(ids) > context:
        print_notes([f"{counted(len(ids), 'token')} are more than the model's context of {context:,}"])
    return ids
