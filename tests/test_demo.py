"""The embedded model and the demo's figures, recomputed from the committed files alone."""

import hashlib
import json
import lzma
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import deltanet_ref as dr
from deltanet_ref.cli.main import main
from deltanet_ref.demo import demo

RECIPE = Path(__file__).parent.parent / "bench" / "tiny_model"
RESULTS = json.loads((RECIPE / "results.json").read_text())
# The recorded figures are rounded to 5e-6; float32 sums in another order (another BLAS, other threads) move a mean
# over 1e4 tokens by less than 1e-6.
TOLERANCE = 2e-5

sys.path.insert(0, str(RECIPE))
from corpus import HELD_OUT  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return dr.load_model(demo.MODEL)


def held_out_chapters():
    return lzma.decompress((RECIPE / "held-out.txt.xz").read_bytes()).decode().rstrip("\n").split("\n\n")


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def nats(model, ids):
    """-log probability of ids[1:], summed in float64 from the logits."""
    logits = model.logits(np.array(ids)[None])[0, :-1].astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    log_z = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    return (log_z - logits[np.arange(len(ids) - 1), ids[1:]]).sum()


def passage_bits_per_byte(model, path):
    """Each passage and its end; its first token has nothing before it and is not counted, nor are its bytes."""
    tokenizer = model.tokenizer
    end = tokenizer.token_id("<|endoftext|>")
    total = spelled = 0
    for text in texts(path):
        ids = tokenizer.encode(text)
        total += nats(model, ids + [end])
        spelled += len(text.encode()) - len(tokenizer.token_bytes(ids[0]))
    return total / math.log(2) / spelled


def test_the_recorded_figures_are_of_the_committed_model():
    assert hashlib.sha256(demo.MODEL.read_bytes()).hexdigest() == RESULTS["model_sha256"]


def test_the_model_reads_whole_held_out_books_below_1_3_bits_per_byte(model):
    end, window = model.tokenizer.token_id("<|endoftext|>"), RESULTS["window"]
    total = 0
    for chapter in held_out_chapters():
        ids = [end, *model.tokenizer.encode(chapter), end]
        total += sum(nats(model, ids[start : start + window]) for start in range(0, len(ids) - 1, window - 1))
    figure = total / math.log(2) / sum(len(chapter.encode()) for chapter in held_out_chapters())
    assert figure < 1.3
    assert figure == pytest.approx(RESULTS["held_out"], abs=TOLERANCE)


@pytest.mark.parametrize("language", demo.EVALUATE)
def test_the_demo_starts_from_the_recorded_figures(model, language):
    figure = passage_bits_per_byte(model, demo.EVALUATE[language])
    assert figure == pytest.approx(RESULTS["before"][language], abs=TOLERANCE)


@pytest.mark.parametrize("language", demo.EVALUATE)
def test_the_committed_small_adapter_gives_the_recorded_figures(language):
    model = dr.load_model(demo.MODEL)
    model.attach(dr.load_adapter(RECIPE / "scots-rank4.gguf", model))
    figure = passage_bits_per_byte(model, demo.EVALUATE[language])
    assert figure == pytest.approx(RESULTS["after_small_adapter"][language], abs=TOLERANCE)


def test_adapting_lowers_scots_by_a_quarter_bit_per_byte_at_least():
    for after in ("after", "after_small_adapter"):
        assert RESULTS["before"]["Scots"] - RESULTS[after]["Scots"] >= 0.25


def test_the_demo_makes_an_adapter_that_lowers_scots(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "TRAINING", dict(steps=6, batch_size=2, lr=2e-3, seed=0))
    monkeypatch.setattr(demo, "SAMPLING", dict(max_tokens=5, temperature=0))
    (tmp_path / "scots.gguf").write_bytes((RECIPE / "scots-rank4.gguf").read_bytes())  # of an earlier run
    assert main(["demo", "-o", str(tmp_path / "scots.gguf")]) == 0
    shown = capsys.readouterr().out
    assert "llama-cli" in shown and f"{RESULTS['before']['Scots']:.3f}" in shown
    model.attach(dr.load_adapter(tmp_path / "scots.gguf", model), name="six steps")
    assert passage_bits_per_byte(model, demo.EVALUATE["Scots"]) < RESULTS["before"]["Scots"] - 0.05
    model.detach("six steps")


def verses(passages):
    return {verse for passage in passages for verse in passage.split("\n") if len(verse) > 40}


def test_no_verse_is_both_adapted_to_and_evaluated_on():
    assert not verses(texts(demo.ADAPT)) & verses(texts(demo.EVALUATE["Scots"]))


def test_the_evaluation_passages_are_held_out_text():
    """So the model never saw them: corpus.py keeps the training text and the held-out text apart by book."""
    assert sum(HELD_OUT.values()) == len(held_out_chapters())
    held_out = verses(held_out_chapters())
    assert verses(texts(demo.EVALUATE["plain English"])) <= held_out
