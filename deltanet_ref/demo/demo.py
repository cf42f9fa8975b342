"""The demo: adapt the embedded model to a dialect that it never read, and measure what changed."""

from pathlib import Path

from deltanet_ref import generate, new_adapter, train
from deltanet_ref.lora.adapter import Adapter
from deltanet_ref.train.data import encode_dataset, read_dataset
from deltanet_ref.train.evaluate import evaluate
from deltanet_ref.train.report import TrainReport

HERE = Path(__file__).parent
MODEL = HERE / "king-james.gguf"
ADAPT = HERE / "adapt.jsonl"  # made by bench/tiny_model/dialect.py, like the two files below
EVALUATE = {"Scots": HERE / "evaluate.jsonl", "plain English": HERE / "evaluate-english.jsonl"}

RANK = 16
TRAINING = dict(epochs=2, batch_size=4, lr=2e-3, warmup=10, seed=0)
PROMPT = "And it came to pass in those days, that the king"
SAMPLING = dict(max_tokens=70, temperature=0.6, top_k=20, top_p=0.9, seed=1)


def adapt(model, rank: int, console=None) -> tuple[Adapter, TrainReport]:
    """Train a new adapter on the Scots passages; it stays attached."""
    adapter = new_adapter(model, rank=rank, alpha=2 * rank, seed=TRAINING["seed"])
    return adapter, train(model, adapter, ADAPT, console=console, **TRAINING)


def measure(model) -> dict[str, float]:
    """name -> bits per byte on the evaluation passages, with the adapters that are attached."""
    passages = {name: encode_dataset(read_dataset(path)["train"], model.tokenizer) for name, path in EVALUATE.items()}
    return {name: evaluate(model, examples, batch_size=8).bits_per_byte for name, examples in passages.items()}


def continuation(model) -> str:
    """The model's continuation of PROMPT, with the adapters that are attached."""
    return "".join(generate(model, PROMPT, **SAMPLING))
