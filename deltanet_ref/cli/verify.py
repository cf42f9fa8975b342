"""deltanet-ref verify: does this adapter match this base model, and what does it change."""

import json
from collections import defaultdict
from dataclasses import asdict

from deltanet_ref.cli.model import add_model_arguments, load, split_scale
from deltanet_ref.errors import InputError, printable, shown
from deltanet_ref.formats.files import read_text

PROMPTS = (
    "The ship left the harbour before the morning.",
    "Question: what is 7 times 6?\nAnswer:",
    "def add(a, b):\n    return a + b\n",
)
LONGEST = 512  # tokens of each prompt that are used, if the model's context is not shorter
LISTED = 20  # names printed of each list

EPILOG = """\
The exit status is 1 when the adapter does not match, has no effect, or was probably made for another base; the likely
cause is printed. A wrong order of the V heads shows only on prompts (-p, --prompts) like the training data. --merged
also compares a merged model with base and adapter. For a GGUF base, llama.cpp's outputs are compared with this engine's
if its Python binding is installed (pip install xllamacpp).

example:
  deltanet-ref verify Qwen3.5-0.8B-Q8_0.gguf scots.gguf -p "Wha are ye?"
  deltanet-ref verify Qwen3.5-0.8B-F16.gguf peft-directory --prompts held-out.txt --merged scots-F16.gguf
"""


def add_arguments(parser):
    parser.epilog = EPILOG
    add_model_arguments(parser)
    parser.add_argument("adapter_file", metavar="ADAPTER[=SCALE]", help="a GGUF adapter or a PEFT directory")
    parser.add_argument(
        "-p",
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help=f"a prompt, of which the first {LONGEST} tokens are used; may be given several times "
        "(default: three short texts)",
    )
    parser.add_argument("--prompts", metavar="FILE", help="a text file with one prompt per line")
    parser.add_argument("--merged", metavar="MODEL", help="also compare this merged model (GGUF or HF)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args):
    import deltanet_ref as dr
    from deltanet_ref.lora.verify import verify, with_llama_cpp, with_merged

    path, scale = split_scale(args.adapter_file)
    lines = [line for line in read_text(args.prompts).splitlines() if line.strip()] if args.prompts else []
    texts = args.prompt + lines or list(PROMPTS)
    model = load(args)
    longest = min(LONGEST, model.config.max_position_embeddings)
    prompts = [ids[:longest] for ids in map(model.tokenizer.encode, texts)]
    if short := [text for text, ids in zip(texts, prompts) if len(ids) < 2]:
        raise InputError(f"the prompt {shown(short[0])} has fewer than two tokens: give a longer one")
    result = verify(model, path, prompts, scale)
    if result.effect is not None:
        adapter = dr.load_adapter(path, model)
        if args.merged:
            merged = dr.load_model(args.merged, backend=args.backend, dtype=args.dtype)
            result = with_merged(result, args.merged, merged, model, adapter, prompts, scale)
        result = with_llama_cpp(result, args.model, model, adapter, prompts, scale)
    if args.json:
        print(json.dumps(asdict(result) | {"passed": not result.problems}, indent=1))
    else:
        print_result(result)
    return 1 if result.problems else 0


def print_result(result):
    """A Verification as text for people."""
    print(f"tensors matched   {len(result.matched)}")
    for title, names in (("unmatched", result.unmatched), ("zero update", result.zero)):
        print(f"{title:17} {len(names)}" + "".join(f"\n  {shown(name)}" for name in names[:LISTED]))
    layers = defaultdict(dict)
    for name, size in result.sizes.items():
        _, layer, tensor, _ = name.split(".")
        layers[int(layer)][tensor] = size
    print("\nrelative size of the update, |scale B A| / |W|")
    for layer in sorted(layers):
        print(f"  layer {layer:<3} " + "  ".join(f"{tensor} {size:.1e}" for tensor, size in layers[layer].items()))
    if effect := result.effect:
        print(
            f"\neffect on {effect.positions} positions\n"
            f"  logits change by      {effect.distance:.2e} (relative)\n"
            f"  KL(base || adapted)   {effect.kl:.3e} nats\n"
            f"  top-1 changes         {100 * effect.top1:.1f} %\n"
            f"  loss of the prompts   {effect.base_loss:.4f} -> {effect.adapted_loss:.4f}\n"
            f"  merged versus live    {effect.merged_distance:.1e}"
        )
    if result.distances:
        print("\nrelative distance of other outputs from these")
    for name, distance in result.distances.items():
        print(f"  {distance:.1e}  {printable(name)}")
    print(f"\nllama.cpp: {result.llama_cpp}")
    print("\n" + ("\n".join(f"FAILED: {printable(problem)}" for problem in result.problems) or "ok"))
