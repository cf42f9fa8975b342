"""deltanet-ref generate: continue a text, printed as it is generated."""

import sys
import time
from itertools import chain, islice

from deltanet_ref.cli.model import add_adapter_argument, add_model_arguments, load
from deltanet_ref.cli.options import progress
from deltanet_ref.errors import InputError, counted
from deltanet_ref.formats.files import read_text
from deltanet_ref.model.generate import prompt_prefix

EPILOG = """\
example:
  deltanet-ref generate Qwen3.5-0.8B-Q8_0.gguf -p "In the beginning" --max-tokens 60
  deltanet-ref generate Qwen3.5-0.8B-Q8_0.gguf --chat -p "Who are you?" --adapter scots.gguf=0.8
"""


def add_arguments(parser):
    parser.epilog = EPILOG
    add_model_arguments(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file with the text to continue")
    add_adapter_argument(parser)
    parser.add_argument(
        "--chat", action="store_true", help="send the prompt as a user's message, through the model's chat template"
    )
    parser.add_argument(
        "--no-thinking",
        action="store_true",
        help="with --chat: the template closes the think block, as in training data without one",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="maximum number of tokens to generate (default 128)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        metavar="X",
        help="sampling temperature; 0 takes the most likely token (default 0.7)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=20,
        metavar="N",
        help="sample among the k most likely tokens, 0 for all (default 20)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.8,
        metavar="X",
        help="and among the fewest of these whose probabilities sum to p (default 0.8)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of the sampling (default 0)")


def run(args):
    prompt = args.prompt if args.prompt_file is None else read_text(args.prompt_file)
    model = load(args)
    if args.chat:
        if model.tokenizer.chat_template is None:
            raise InputError(f"{args.model}: has no chat template; leave out --chat")
        thinking = {"enable_thinking": False} if args.no_thinking else {}
        question = {"role": "user", "content": prompt_prefix(model) + prompt}
        prompt = model.tokenizer.encode(
            model.tokenizer.apply_chat_template([question], add_generation_prompt=True, **thinking)
        )
    import deltanet_ref as dr

    start = time.perf_counter()
    with progress("reading the prompt") as on_prefill:
        pieces = dr.generate(
            model,
            prompt,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            on_prefill=on_prefill,
        )
        first = list(islice(pieces, 1))
    for piece in chain(first, pieces):
        print(piece, end="", flush=True)
    print()
    seconds, count = time.perf_counter() - start, len(pieces.ids)
    print(
        f"{counted(count, 'token')} in {seconds:.2f} s, {count / seconds:.2f} tokens/s, including the time to read "
        f"{counted(pieces.prompt_tokens, 'prompt token')}",
        file=sys.stderr,
    )
    if pieces.finish_reason == "context":
        print(
            f"note: the model's context of {model.config.max_position_embeddings:,} tokens is full: generation "
            "stopped there",
            file=sys.stderr,
        )
