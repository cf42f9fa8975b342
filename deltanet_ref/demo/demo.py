"""deltanet-ref demo: adapt the embedded model to a dialect it never read, and show what changed."""
import time
from pathlib import Path

from rich.console import Console as Terminal
from rich.markup import escape
from rich.table import Table

from deltanet_ref import generate, load_model, new_adapter, train
from deltanet_ref.formats.files import ensure_writable
from deltanet_ref.formats.gguf import read_gguf
from deltanet_ref.train.data import encode_dataset, read_dataset
from deltanet_ref.train.evaluate import evaluate
from deltanet_ref.train.memory import keep_freed_memory
from deltanet_ref.train.report import Console, format_count

HERE = Path(__file__).parent
MODEL = HERE / "king-james.gguf"
ADAPT = HERE / "adapt.jsonl"                        # made by bench/tiny_model/dialect.py, as are the other two
EVALUATE = {"Scots": HERE / "evaluate.jsonl", "plain English": HERE / "evaluate-english.jsonl"}

RANK = 16
TRAINING = dict(epochs=2, batch_size=4, lr=2e-3, warmup=10, seed=0)
PROMPT = "And it came to pass in those days, that the king"
SAMPLING = dict(max_tokens=70, temperature=0.6, top_k=20, top_p=0.9, seed=1)

EPILOG = """\
example:
  deltanet-ref demo -o scots.gguf
  deltanet-ref generate {model} --adapter scots.gguf -p "And the king said"
""".format(model=MODEL)


def add_arguments(parser):
    parser.epilog = EPILOG
    parser.add_argument("-o", "--output", metavar="ADAPTER.gguf", default="scots.gguf", type=Path,
                        help="where the adapter goes (default scots.gguf)")


def run(args):
    ensure_writable(args.output)
    keep_freed_memory()
    start, terminal = time.perf_counter(), Terminal(highlight=False, soft_wrap=True)
    model = load_model(MODEL)
    about = read_gguf(MODEL).metadata
    terminal.print(f"[bold]The model[/]: {about['general.name']}, {describe(model)}\n{about['general.description']}\n")

    before, text_before = measure(model), continuation(model)
    terminal.print(f"[bold]Adapting it[/] to Scots: LoRA of rank {RANK} on every linear layer, on {ADAPT.name}")
    adapter, report = adapt(model, RANK, Console())
    adapter.save_gguf(args.output)
    after, text_after = measure(model), continuation(model)

    terminal.print(f"\n{report.text_plot(height=5)}\n")
    terminal.print(figures(before, after))
    for when, text in ("before", text_before), ("after", text_after):
        terminal.print(f"\n[bold]{when}[/]: [dim]{PROMPT}[/]{escape(text)}")
    size = args.output.stat().st_size / 1e6
    terminal.print(f"\nWrote {args.output} ({size:.2f} MB), a GGUF adapter for llama.cpp; "
                   f"{time.perf_counter() - start:.0f} s in all, {report.tokens_per_second:.0f} tokens/s in training.")
    terminal.print(NEXT.format(adapt=ADAPT), markup=False)


def describe(model):
    """Its size and its layers, in one line."""
    parameters = sum(w.size for w in model.weights.values())
    delta = model.config.layer_types.count("linear_attention")
    return (f"{format_count(parameters)} parameters in {MODEL.stat().st_size / 1e6:.1f} MB; {delta} layers of Gated "
            f"DeltaNet, {len(model.config.layer_types) - delta} of softmax attention, {model.config.vocab_size} tokens")


def adapt(model, rank, console=None):
    """Train a new adapter on the Scots passages; it stays attached. Returns the adapter and the TrainReport."""
    adapter = new_adapter(model, rank=rank, alpha=2 * rank, seed=TRAINING["seed"])
    return adapter, train(model, adapter, ADAPT, console=console, **TRAINING)


def measure(model):
    """name -> bits per byte on the evaluation passages, with whatever is attached."""
    passages = {name: encode_dataset(read_dataset(path)["train"], model.tokenizer) for name, path in EVALUATE.items()}
    return {name: evaluate(model, examples, batch_size=8).bits_per_byte for name, examples in passages.items()}


def continuation(model):
    return "".join(generate(model, PROMPT, **SAMPLING))


def figures(before, after):
    table = Table("bits per byte on passages it never saw", "before", "after", "change")
    for name in before:
        table.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}", f"{after[name] - before[name]:+.3f}")
    return table


NEXT = """
The same with a real model (any quantisation of Qwen3.5-0.8B as GGUF; your own rows {{"text": ...}} instead of these):
  deltanet-ref train Qwen3.5-0.8B-Q8_0.gguf {adapt} -o scots-0.8B.gguf --rank 16 --batch-size 2 --steps 60
  deltanet-ref generate Qwen3.5-0.8B-Q8_0.gguf --adapter scots-0.8B.gguf -p "And the king said"
  llama-cli -m Qwen3.5-0.8B-Q8_0.gguf --lora scots-0.8B.gguf -p "And the king said"
"""
