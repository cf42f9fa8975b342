import itertools

import numpy as np
import pytest

import deltanet_ref as dr
from deltanet_ref.train.batches import IGNORED, Example, in_order, pack, shuffled
from deltanet_ref.train.evaluate import evaluate, mean_loss
from tests.paths import FIXTURES

RNG = np.random.default_rng(2)


def example(n, ignored=0):
    tokens = RNG.integers(0, 440, n).astype(np.int32)
    labels = tokens.copy()
    labels[:ignored] = IGNORED
    return Example(tokens, labels, f"of {n}")


EXAMPLES = [example(n, ignored) for n, ignored in ((5, 2), (67, 30), (3, 0), (12, 11), (2, 0), (19, 1))]


@pytest.fixture(scope="module")
def model():
    model = dr.load_model(FIXTURES / "grouped" / "grouped-f32.gguf", dtype="float64")
    model.attach(dr.load_adapter(FIXTURES / "grouped" / "lora.gguf", model), trainable=True)
    return model


def test_packed_loss_and_gradients_are_the_mean_over_tokens_of_separate_ones(model):
    batch = pack(EXAMPLES)
    loss, gradients = model.loss_and_grads(batch.tokens, batch.labels, cu_seqlens=batch.cu_seqlens, wrt="lora")
    separate = [model.loss_and_grads(e.tokens[None], e.labels[None], wrt="lora") for e in EXAMPLES]
    weights = [e.kept / batch.kept for e in EXAMPLES]
    assert loss == pytest.approx(sum(w * one for w, (one, _) in zip(weights, separate)), rel=1e-13)
    for name, gradient in gradients.items():
        mean = sum(w * grads[name] for w, (_, grads) in zip(weights, separate))
        # float64 sums over at most 108 tokens in another order
        np.testing.assert_allclose(gradient, mean, atol=1e-12 * np.abs(mean).max(), err_msg=name)


def test_kept_counts_what_can_be_predicted():
    assert [e.kept for e in EXAMPLES] == [3, 37, 2, 1, 1, 18]
    batch = pack(EXAMPLES)
    assert batch.kept == 62
    assert batch.cu_seqlens.tolist() == [0, 5, 72, 75, 87, 89, 108]
    assert batch.tokens.shape == batch.labels.shape == (1, 108)


def test_each_epoch_holds_every_example_once_in_an_order_of_its_own():
    def epochs(seed, count=3):
        batches = itertools.islice(shuffled(EXAMPLES, 4, seed), 2 * count)
        return [[tuple(b.tokens[0]) for b in pair] for pair in zip(*[batches] * 2)]

    first = epochs(seed=7)
    assert first == epochs(seed=7)
    assert first != epochs(seed=8)
    assert first[0] != first[1] != first[2]
    for long, short in first:
        assert sorted(long + short) == sorted(tuple(np.concatenate([e.tokens for e in EXAMPLES])))


def test_evaluation_does_not_depend_on_the_batch_size_and_counts_bytes(model):
    losses = [mean_loss(model, EXAMPLES, batch_size) for batch_size in (1, 4, 6)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)
    result = evaluate(model, EXAMPLES, 4)
    labels = [t for e in EXAMPLES for t in e.labels[1:] if t != IGNORED]
    spelled = sum(len(model.tokenizer.token_bytes(t)) for t in labels if t not in model.tokenizer.eos_ids)
    assert (result.tokens, result.bytes) == (62, spelled)
    assert result.perplexity == pytest.approx(np.exp(losses[0]))
    assert result.bits_per_byte == pytest.approx(losses[0] * 62 / spelled / np.log(2))


def test_in_order_leaves_nothing_out():
    assert [b.tokens.size for b in in_order(EXAMPLES, 4)] == [87, 21]
