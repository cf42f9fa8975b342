"""Adapters that we write, read by the real llama.cpp (xllamacpp) and switched between requests."""
import numpy as np
import pytest

import deltanet_ref as dr
from tests.delta_rule import relative
from tests.paths import FIXTURES
from tests.peers.llama import Llama

AGREEMENT = 1.5e-6        # relative RMS of log-probabilities: llama.cpp in float32 against our float64 on the same file
LENGTHS = (1, 7, 65, 200)
SCALES = ((0, 0), (1, 0), (0.5, 0), (0.5, -0.25))         # of two adapters


def our_log_probabilities(model, ids):
    x = model.prefill(ids)[0]
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def written_adapter(model, path, seed):
    """An adapter on every linear tensor, B far from zero."""
    adapter, rng = dr.new_adapter(model, rank=3, alpha=5, seed=seed), np.random.default_rng(seed)
    for name, x in adapter.tensors.items():
        if name.endswith("lora_b"):
            adapter.tensors[name] = rng.standard_normal(x.shape).astype(np.float32) * 0.2
    adapter.save_gguf(path)
    return path


def with_adapters(model, paths, scales, ids):
    names = [model.attach(dr.load_adapter(path, model), scale=scale) for path, scale in zip(paths, scales) if scale]
    row = our_log_probabilities(model, ids)
    for name in names:
        model.detach(name)
    return row


def is_shown(model, row):
    """llama.cpp reports no probabilities for a reply without text: half a character, or a control token."""
    text = model.tokenizer.token_bytes(int(row.argmax()))
    return int(row.argmax()) < 440 and text.isascii() and text.decode().isprintable()


@pytest.mark.parametrize("name", ["eq", "grouped"])
def test_llama_cpp_loads_our_adapters_and_agrees_at_every_scale(name, tmp_path):
    file = FIXTURES / name / f"{name}-f32.gguf"
    model = dr.load_model(file, dtype="float64")
    paths = [written_adapter(model, tmp_path / f"{seed}.gguf", seed) for seed in (1, 2)]
    llama, rng = Llama(file, paths), np.random.default_rng(3)
    for length in LENGTHS:
        rows = {}
        while not rows or not all(is_shown(model, row) for row in rows.values()):
            ids = rng.integers(0, 440, length)
            rows = {scales: with_adapters(model, paths, scales, ids) for scales in SCALES}
        for scales, ours in rows.items():
            theirs = llama.log_probabilities(ids, model.config.vocab_size, scales)
            assert relative(theirs, ours) < AGREEMENT, (length, scales)
            assert scales == (0, 0) or relative(ours, rows[0, 0]) > 1000 * AGREEMENT, "the adapter has no effect"
