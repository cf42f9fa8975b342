"""Measure the embedded model before and after the demo's training; write results.json and the small adapter here.

    python bench/tiny_model/measure.py

Needs only the package and the committed files. tests/test_demo.py recomputes the figures and compares them.
"""

import hashlib
import json
import lzma
import math
from pathlib import Path

from corpus import HELD_OUT

import deltanet_ref as dr
from deltanet_ref.demo import demo
from deltanet_ref.train.evaluate import mean_loss
from deltanet_ref.train.pretrain import encode_documents, windows

HERE = Path(__file__).parent
WINDOW = 512  # tokens, as in training
SMALL_RANK = 4  # rank of the committed adapter


def bits_per_byte(model, texts):
    """Bits per byte of whole chapters, their end tokens included, in windows of WINDOW tokens without prior context."""
    examples = windows(encode_documents("\n\n".join(texts), model.tokenizer), WINDOW)
    nats = mean_loss(model, examples, batch_size=8) * sum(example.kept for example in examples)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def main():
    model = dr.load_model(demo.MODEL)
    chapters = lzma.decompress((HERE / "held-out.txt.xz").read_bytes()).decode().rstrip("\n").split("\n\n")
    results = {
        "model_sha256": hashlib.sha256(demo.MODEL.read_bytes()).hexdigest(),
        "window": WINDOW,
        "held_out": round(bits_per_byte(model, chapters), 5),
        "held_out_books": {},
    }
    rest = iter(chapters)
    for book, count in HELD_OUT.items():
        results["held_out_books"][book] = round(bits_per_byte(model, [next(rest) for _ in range(count)]), 3)
    results["before"] = rounded(demo.measure(model))
    for key, rank in ("after", demo.RANK), ("after_small_adapter", SMALL_RANK):
        adapter, report = demo.adapt(model, rank)
        results[key] = rounded(demo.measure(model))
        print(f"rank {rank}: {report.seconds:.0f} s, {report.tokens_per_second:.0f} tokens/s")
        model.detach(*model.adapters)
    adapter.save_gguf(HERE / f"scots-rank{SMALL_RANK}.gguf")
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def rounded(figures):
    return {name: round(value, 5) for name, value in figures.items()}


if __name__ == "__main__":
    main()
