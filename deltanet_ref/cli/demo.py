"""deltanet-ref demo: adapt the embedded model to a dialect that it never read, and show what changed."""

import time
from pathlib import Path

from rich.console import Console as Terminal
from rich.markup import escape
from rich.table import Table

from deltanet_ref.cli.convert import is_adapter
from deltanet_ref.cli.options import add_output_arguments, check_output
from deltanet_ref.demo import demo
from deltanet_ref.formats.files import ensure_writable
from deltanet_ref.formats.gguf import read_gguf
from deltanet_ref.train.report import Console, format_count

EPILOG = f"""\
Takes less than a minute on two free cores, longer if other programs use them. The first run also compiles the kernels,
once: about 20 seconds more.

example:
  deltanet-ref demo -o scots.gguf
  deltanet-ref generate {demo.MODEL} --adapter scots.gguf -p "And the king said"
"""

NEXT = f"""
The same with a real model (any quantisation of Qwen3.5-0.8B as GGUF; your own rows {{"text": ...}} instead of these):
  deltanet-ref train Qwen3.5-0.8B-Q8_0.gguf {demo.ADAPT} -o scots-0.8B.gguf --rank 16 --batch-size 2 --steps 60
  deltanet-ref generate Qwen3.5-0.8B-Q8_0.gguf --adapter scots-0.8B.gguf -p "And the king said"
  llama-cli -m Qwen3.5-0.8B-Q8_0.gguf --lora scots-0.8B.gguf -p "And the king said"
"""


def add_arguments(parser):
    parser.epilog = EPILOG
    add_output_arguments(
        parser,
        "ADAPTER.gguf",
        "the adapter to write (default scots.gguf)",
        replaces="an adapter",
        type=Path,
        required=False,
        default=Path("scots.gguf"),
    )


def run(args):
    check_output(args, inputs=(demo.MODEL,), replaces=is_adapter)
    ensure_writable(args.output)
    import deltanet_ref as dr

    start, terminal = time.perf_counter(), Terminal(highlight=False, soft_wrap=True)
    model = dr.load_model(demo.MODEL)
    about = read_gguf(demo.MODEL).metadata
    terminal.print(f"[bold]The model[/]: {about['general.name']}, {describe(model)}\n{about['general.description']}\n")
    terminal.print("Measuring it (the first run also compiles the kernels, once)")
    before, text_before = demo.measure(model), demo.continuation(model)

    terminal.print(
        f"\n[bold]Adapting it[/] to Scots: LoRA of rank {demo.RANK} on every linear layer, trained on {demo.ADAPT.name}"
    )
    adapter, report = demo.adapt(model, demo.RANK, Console())
    adapter.save_gguf(args.output)
    after, text_after = demo.measure(model), demo.continuation(model)

    terminal.print(f"\n{report.text_plot(height=5)}\n")
    terminal.print(figures(before, after))
    for when, text in ("before", text_before), ("after", text_after):
        terminal.print(f"\n[bold]{when}[/]: [dim]{demo.PROMPT}[/]{escape(text)}")
    size = args.output.stat().st_size / 1e6
    terminal.print(
        f"\nWrote {args.output} ({size:.2f} MB), a GGUF adapter for llama.cpp; "
        f"{time.perf_counter() - start:.0f} s in total, {report.tokens_per_second:.0f} tokens/s in training"
    )
    terminal.print(NEXT, markup=False)
    return 130 if report.interrupted else 0


def describe(model):
    """Its size and its layers, in one line."""
    parameters = sum(w.size for w in model.weights.values())
    delta = model.config.layer_types.count("linear_attention")
    return (
        f"{format_count(parameters)} parameters in {demo.MODEL.stat().st_size / 1e6:.1f} MB; {delta} layers of "
        f"Gated DeltaNet, {len(model.config.layer_types) - delta} of softmax attention, {model.config.vocab_size} "
        "tokens"
    )


def figures(before, after):
    table = Table("bits per byte on held-out passages", "before", "after", "change")
    for name in before:
        table.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}", f"{after[name] - before[name]:+.3f}")
    return table
