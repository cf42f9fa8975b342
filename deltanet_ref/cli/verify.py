"""deltanet-ref verify: does this adapter fit this base model, and does it do anything."""
import importlib.util
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np

from deltanet_ref.cli.model import add_model_arguments, load, split_scale
from deltanet_ref.errors import InputError, printable
from deltanet_ref.formats.files import read_text

PROMPTS = ("The ship left the harbour before the morning.", "Question: what is 7 times 6?\nAnswer:",
           "def add(a, b):\n    return a + b\n")
LONGEST = 512            # tokens of a prompt that are looked at

EPILOG = """\
Exit status 1 when the adapter does not match, has no effect or seems to be for another base; the likely cause is named.
Give prompts (-p, --prompts) from the data that it was trained on: only there can be seen whether its heads are in the
base's order. With --merged the outputs of a merged model are compared with those of base and adapter, and where
xllamacpp is installed llama.cpp's as well (its log lines go to stderr).

example:
  deltanet-ref verify Qwen3.5-0.8B-Q8_0.gguf scots.gguf -p "Wha are ye?"
  deltanet-ref verify Qwen3.5-0.8B-F16.gguf peft-directory --prompts held-out.txt --merged scots-F16.gguf
"""


def add_arguments(parser):
    parser.epilog = EPILOG
    add_model_arguments(parser)
    parser.add_argument("adapter_file", metavar="ADAPTER[=SCALE]", help="a GGUF adapter or a PEFT directory")
    parser.add_argument("-p", "--prompt", action="append", default=[], metavar="TEXT",
                        help="a text to look at; may be given several times (default: three short ones)")
    parser.add_argument("--prompts", metavar="FILE", help="a file with such texts, one to a line")
    parser.add_argument("--merged", metavar="MODEL", help="compare with this merged model (GGUF or HF)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args):
    import deltanet_ref as dr
    from deltanet_ref.lora.verify import verify

    path, scale = split_scale(args.adapter_file)
    lines = [line for line in read_text(args.prompts).splitlines() if line.strip()] if args.prompts else []
    texts = args.prompt + lines or list(PROMPTS)
    model = load(args)
    prompts = [ids[:LONGEST] for ids in map(model.tokenizer.encode, texts)]
    if any(len(ids) < 2 for ids in prompts):
        raise InputError("a prompt must have two tokens at least: give longer texts")
    report = verify(model, path, prompts, scale)
    if report.effect is not None:
        report = compare_with_others(report, args, model, dr.load_adapter(path, model), prompts, scale)
    if args.json:
        print(json.dumps(asdict(report) | {"passed": not report.problems}, indent=1))
    else:
        print_report(report)
    return 1 if report.problems else 0


def compare_with_others(report, args, model, adapter, prompts, scale):
    """The report with the distances of a merged model and of llama.cpp."""
    import deltanet_ref as dr
    from deltanet_ref.lora.verify import (LOST, ROUGH, TIMES_ROUNDING, adapted_logits, compare,
                                          llama_log_probabilities, log_softmax)

    if args.merged:
        other = dr.load_model(args.merged, backend=args.backend, dtype=args.dtype)
        if other.config.vocab_size != model.config.vocab_size:
            raise InputError(f"{args.merged}: has a vocabulary of {other.config.vocab_size}, {args.model} one of "
                             f"{model.config.vocab_size}")
        limit, reason = (0, "computes something else") if holds_float32(other) else (
            LOST * report.effect.distance, "computes something else, or its type rounds more than the adapter changes")
        report = compare(report, args.merged, adapted_logits(other, None, prompts),
                         adapted_logits(model, adapter, prompts, scale), limit, reason)
    if importlib.util.find_spec("xllamacpp") and Path(args.model).is_file():
        theirs = llama_log_probabilities(args.model, adapter, prompts, (0.0, scale))
        ours = [log_softmax(np.stack([adapted_logits(model, x, [p], scale)[-1] for p in prompts]))
                for x in (None, adapter)]
        exact = holds_float32(model)
        report = compare(report, "llama.cpp without it", theirs[0], ours[0], 0 if exact else ROUGH)
        rounding = report.others["llama.cpp without it"]
        report = compare(report, "llama.cpp with it", theirs[1], ours[1], 0 if exact else TIMES_ROUNDING * rounding)
    return report


def holds_float32(model):
    """Whether no tensor is stored in less; llama.cpp rounds the activations too where one is."""
    return all(model.weights.stored_type(name).name in ("F32", "F64") for name in model.weights)


def print_report(report):
    print(f"matched    {len(report.matched)} tensors\nunmatched  {len(report.unmatched)}"
          + "".join(f"\n  {printable(name)}" for name in report.unmatched[:20])
          + f"\nzero       {len(report.zero)}" + "".join(f"\n  {name}" for name in report.zero[:20]))
    layers = defaultdict(dict)
    for name, size in report.sizes.items():
        _, layer, tensor, _ = name.split(".")
        layers[int(layer)][tensor] = size
    print("\nrelative size of the update, |scale B A| / |W|")
    for layer in sorted(layers):
        print(f"  layer {layer:<3} " + "  ".join(f"{tensor} {size:.1e}" for tensor, size in layers[layer].items()))
    if effect := report.effect:
        print(f"\neffect on {effect.positions} positions\n"
              f"  logits change by      {effect.distance:.2e} (relative)\n"
              f"  KL(base || adapted)   {effect.kl:.3e} nats\n"
              f"  top-1 changes         {100 * effect.top1:.1f} %\n"
              f"  loss of the prompts   {effect.base_loss:.4f} -> {effect.adapted_loss:.4f}\n"
              f"  merged versus live    {effect.merged_distance:.1e}")
    for name, distance in report.others.items():
        print(f"  {name} versus ours    {distance:.1e}")
    print("\n" + ("\n".join(f"FAILED: {printable(problem)}" for problem in report.problems) or "ok"))
