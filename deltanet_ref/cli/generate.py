"""deltanet-ref generate: the continuation of a text, as it comes."""
import sys
import time

from deltanet_ref.cli.model import add_adapter_argument, add_model_arguments, load
from deltanet_ref.errors import InputError
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
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file with that text")
    add_adapter_argument(parser)
    parser.add_argument("--chat", action="store_true", help="ask the prompt as a user, in the model's chat template")
    parser.add_argument("--no-thinking", action="store_true",
                        help="with --chat: let the template close the think block, as in training data that has none")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="most tokens to produce (default 128)")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="X",
                        help="0 takes the likeliest token (default 0.7)")
    parser.add_argument("--top-k", type=int, default=20, metavar="N",
                        help="sample among the k likeliest, 0 for all (default 20)")
    parser.add_argument("--top-p", type=float, default=0.8, metavar="X",
                        help="and among the likeliest that reach p together (default 0.8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")


def run(args):
    prompt = args.prompt if args.prompt_file is None else read_text(args.prompt_file)
    model = load(args)
    if args.chat:
        if model.tokenizer.chat_template is None:
            raise InputError(f"{args.model}: has no chat template; leave --chat out")
        thinking = {"enable_thinking": False} if args.no_thinking else {}
        question = {"role": "user", "content": prompt_prefix(model) + prompt}
        prompt = model.tokenizer.encode(model.tokenizer.apply_chat_template([question], add_generation_prompt=True,
                                                                            **thinking))
    import deltanet_ref as dr

    start, pieces = time.perf_counter(), []
    for piece in dr.generate(model, prompt, max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k,
                             top_p=args.top_p, seed=args.seed):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    seconds, count = time.perf_counter() - start, len(model.tokenizer.encode("".join(pieces)))
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.2f} tokens/s, reading the prompt included",
          file=sys.stderr)
