"""Pretraining: the new weights, the batches, gradients shared out among threads, and the command from text to GGUF."""

import numpy as np
import pytest

import deltanet_ref as dr
from deltanet_ref import ops
from deltanet_ref.cli.main import main
from deltanet_ref.formats.gguf import read_gguf
from deltanet_ref.model.config import Config
from deltanet_ref.model.qwen35 import Qwen35
from deltanet_ref.model.tensors import expected_tensors
from deltanet_ref.ops.elementwise import softplus
from deltanet_ref.train import pretrain as library
from deltanet_ref.train.batches import Example, pack
from deltanet_ref.train.initial import new_model
from deltanet_ref.train.parallel import ParallelModel
from deltanet_ref.train.pretrain import PretrainOptions, encode_documents, starting_model, stream_batches, windows
from tests.paths import FIXTURES

CONFIG = Config(
    vocab_size=53,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=1,
    linear_num_value_heads=3,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    partial_rotary_factor=0.25,
    mrope_section=(1, 1, 0),
    tie_word_embeddings=True,
    layer_types=("linear_attention",) * 3 + ("full_attention",),
    max_position_embeddings=128,
)
TOKENIZER = FIXTURES / "eq" / "hf"
TEXT = "In the beginning was the word.\nAnd the word was with them.\n\n" + "\n\n".join(
    f"The {animal} said to the {other}, Be still."
    for animal in ("fox", "hen", "cow", "owl")
    for other in ("ant", "bee", "eel")
)
SMALL = """--hidden 32 --ffn 32 --heads 2 --kv-heads 1 --head-dim 16 --delta-key-heads 1 --delta-value-heads 2
    --delta-head-dim 16 --batch-size 3 --seq-len 24 --warmup 2""".split()


def random_batch(lengths=(9, 14, 5)):
    rng = np.random.default_rng(5)
    return pack([Example(tokens, tokens, "") for tokens in (rng.integers(0, CONFIG.vocab_size, n) for n in lengths)])


def parallel_model(threads=2, dropout=0.0):
    return ParallelModel(Qwen35(CONFIG, new_model(CONFIG, 3, ops, "float64")), threads, dropout, seed=7)


def test_a_new_model_has_every_tensor_and_the_stated_distributions():
    config = Config(**vars(CONFIG) | {"hidden_size": 240, "linear_num_value_heads": 300, "vocab_size": 500})
    weights = new_model(config, 1, ops)
    assert {name: w.shape for name, w in weights.items()} == {n: s.shape for n, s in expected_tensors(config).items()}
    assert all(w.dtype == np.float32 for w in weights.values())
    decay, step = -weights["blk.0.ssm_a"], softplus(weights["blk.0.ssm_dt.bias"])
    assert 1 <= decay.min() < 2 and 15 < decay.max() <= 16
    assert 0.00099 < step.min() < 0.002 and 0.05 < step.max() < 0.101
    assert abs(np.median(step) - 0.01) < 0.003  # log-uniform: the middle is the geometric mean
    assert weights["token_embd.weight"].std() == pytest.approx(0.02, rel=0.02)  # 120,000 draws: 0.2 %, times ten
    assert weights["blk.1.ssm_out.weight"].std() == pytest.approx(0.02 / 8**0.5, rel=0.02)
    assert np.abs(weights["blk.2.ssm_conv1d.weight"]).max() <= 0.5
    assert (weights["blk.3.attn_q_norm.weight"] == 1).all()


def test_windows_predict_every_token_of_a_document_once():
    documents = [np.arange(100, 100 + n) for n in (2, 7, 8, 23)]
    for example in (examples := windows(documents, seq_len=8)):
        assert len(example.tokens) <= 8
    predicted = np.concatenate([example.labels[1:] for example in examples])
    np.testing.assert_array_equal(predicted, np.concatenate([document[1:] for document in documents]))


def test_documents_are_parted_by_blank_lines_and_framed_by_the_end_token():
    tokenizer = dr.load_tokenizer(TOKENIZER)
    documents = encode_documents("one\ntwo\n\n\n\nthree\n", tokenizer)
    end = "<|im_end|>"  # the eos_token of this tokenizer's configuration
    assert [tokenizer.decode(document) for document in documents] == [f"{end}one\ntwo{end}", f"{end}three{end}"]


def test_an_epoch_takes_no_token_twice_and_each_epoch_has_its_own_order():
    documents = [np.array([0, *range(10 * i, 10 * i + 9), 0]) for i in range(1, 13)]  # a stream of 12 x 10 tokens
    batches = stream_batches(documents, batch_size=2, seq_len=7, seed=4)  # 8 batches from any offset
    epochs = [np.concatenate([next(batches).tokens[0] for _ in range(8)]) for _ in range(2)]
    for tokens in epochs:
        texts = tokens[tokens > 0]
        assert len(tokens) == 8 * 2 * 7 and len(set(texts)) == len(texts)
    assert epochs[0].tolist() != epochs[1].tolist()
    again = stream_batches(documents, batch_size=2, seq_len=7, seed=4)
    np.testing.assert_array_equal(next(again).tokens[0], epochs[0][:14])


def test_threads_share_the_gradient_of_the_whole_batch():
    parallel, batch = parallel_model(), random_batch()
    loss, grads = parallel.loss_and_grads(batch)
    model = parallel.model
    whole_loss, whole = model.loss_and_grads(batch.tokens, batch.labels, cu_seqlens=batch.cu_seqlens)
    assert loss == pytest.approx(whole_loss, rel=1e-13)  # float64, some hundred additions in another order
    for name, gradient in whole.items():
        if name.endswith("ssm_a"):
            name, gradient = name.replace("ssm_a", "A_log"), model.weights[name] * gradient
        np.testing.assert_allclose(grads.pop(name), gradient, rtol=1e-10, atol=1e-14, err_msg=name)
    assert not grads


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_number_of_threads_does_not_change_a_bit(dropout):
    results = [parallel_model(threads, dropout).loss_and_grads(random_batch()) for threads in (1, 3)]
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        np.testing.assert_array_equal(gradient, results[1][1][name])


@pytest.mark.parametrize(
    "name",
    """blk.0.A_log blk.1.ffn_down.weight blk.2.ssm_out.weight blk.3.attn_output.weight
                                    blk.1.attn_norm.weight output_norm.weight token_embd.weight""".split(),
)
def test_gradients_under_dropout_are_those_of_the_loss_under_the_same_dropout(name):
    batch, direction = random_batch(), None

    def loss_at(step):
        parallel = parallel_model(dropout=0.4)  # the same seed: the same draw
        parameter = parallel.parameters[name]
        parameter += step * direction
        return parallel.loss_and_grads(batch)[0]

    gradient = parallel_model(dropout=0.4).loss_and_grads(batch)[1][name]
    direction = 0.02 * np.random.default_rng(6).standard_normal(gradient.shape)  # as large as the weights
    h = 1e-3  # fourth order: errors of about h^4 and 1e-16 / h, both 1e-12
    slope = (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) / (12 * h)
    assert np.vdot(gradient, direction) == pytest.approx(slope, rel=1e-7, abs=1e-11)


def test_dropout_zeroes_the_stated_part_and_keeps_the_mean():
    scales = parallel_model(dropout=0.25)._dropout_scales(np.random.default_rng(0))
    values = np.concatenate([scale for scale in scales.values()])
    assert set(values) == {0.0, 1 / 0.75}
    assert abs(values.mean() - 1) < 4 * (0.25 / 0.75 / len(values)) ** 0.5  # four standard errors


def pretrain(tmp_path, *options, text=TEXT):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(text)
    return main(
        ["pretrain", str(corpus), "--tokenizer", str(TOKENIZER), "-o", str(tmp_path / "tiny.gguf"), *SMALL, *options]
    )


def test_pretrain_learns_a_text_and_writes_a_model_that_loads(tmp_path, capsys):
    assert (
        pretrain(
            tmp_path,
            "--steps",
            "40",
            "--lr",
            "0.02",
            "--valid",
            str(tmp_path / "corpus.txt"),
            "--type",
            "q8_0",
            "--name",
            "animals",
            "--license",
            "CC0-1.0",
            "--eval-every",
            "0",
            "--save-every",
            "15",
        )
        == 0
    )
    bits = [float(line.split()[2]) for line in capsys.readouterr().out.splitlines() if "bits per byte" in line]
    assert bits[-1] < 0.5 * bits[0]
    file = read_gguf(tmp_path / "tiny.gguf")
    assert (file.metadata["general.name"], file.metadata["general.license"]) == ("animals", "CC0-1.0")
    for name, tensor in file.tensors.items():
        assert tensor.type.name == ("F32" if len(tensor.shape) == 1 or "conv1d" in name else "Q8_0"), name
    model = dr.load_model(tmp_path / "tiny.gguf")
    assert "".join(dr.generate(model, "The fox said to", max_tokens=3, temperature=0)).startswith(" the")


SIZES = dict(
    hidden=32,
    ffn=32,
    heads=2,
    kv_heads=1,
    head_dim=16,
    delta_key_heads=1,
    delta_value_heads=2,
    delta_head_dim=16,
    batch_size=3,
    seq_len=24,
    warmup=2,
)


def test_pretraining_from_python_is_silent_and_what_it_saves_is_the_trained_model(tmp_path, capsys):
    tokenizer, saved = dr.load_tokenizer(TOKENIZER), []
    options = PretrainOptions(steps=5, save_every=2, threads=1, **SIZES)
    model = starting_model(options, tokenizer)
    tokens = np.array([tokenizer.encode("The fox said to the hen")])
    history = library.pretrain(model, TEXT, options, save=lambda: saved.append(model.logits(tokens)))
    assert len(history.losses) == 5 and history.losses[-1] < history.losses[0] and len(saved) == 2
    assert not np.array_equal(saved[0], saved[1]) and "".join(capsys.readouterr()) == ""
    metadata = library.file_metadata(TOKENIZER, tokenizer, name="animals", license="")
    library.write_model(tmp_path / "tiny.gguf", model, "f32", metadata)
    np.testing.assert_array_equal(dr.load_model(tmp_path / "tiny.gguf").logits(tokens), model.logits(tokens))
    about = read_gguf(tmp_path / "tiny.gguf").metadata
    assert about["general.name"] == "animals" and "general.license" not in about


@pytest.mark.parametrize(
    "options, reason",
    [
        ({}, "`steps` and `minutes` both set the length of the run: give one"),
        ({"steps": 1, "minutes": 1.0}, "give one"),
        ({"steps": 1, "lr": float("inf")}, "`lr` is inf, it must be above 0"),
        ({"steps": 1, "rotary": 2}, "`rotary` is 2, it must be above 0 and at most 1"),
        ({"steps": 1, "seq_len": 99, "context": 64}, "`seq_len` is 99, more than `context` 64: lower it"),
    ],
)
def test_options_of_pretraining_have_python_names_in_python(options, reason):
    with pytest.raises(dr.InputError, match=reason):
        PretrainOptions(**options)


def test_the_same_seed_gives_the_same_file_on_any_number_of_threads(tmp_path):
    files = []
    for threads in "1", "2":
        assert pretrain(tmp_path, "--steps", "3", "--dropout", "0.2", "--threads", threads, "--force") == 0
        files.append((tmp_path / "tiny.gguf").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--steps", "5", "--hidden", "48", "--type", "q8_0"], "rows of 48 values"),
        (["--steps", "0"], "--steps is 0, it must be at least 1"),
        (["--minutes", "0"], "--minutes is 0.0, it must be above 0"),
        (["--steps", "5", "--dropout", "1"], "--dropout is 1.0, it must be at least 0 and below 1"),
        (["--steps", "5", "--lr", "nan"], "--lr is nan, it must be above 0"),
        (["--steps", "5", "--seq-len", "4000"], "--seq-len is 4000, more than --context 2048: lower it"),
        (
            ["--steps", "5", "--batch-size", "500"],
            "too few for a batch of 500 sequences of 24: lower --batch-size or --seq-len",
        ),
        (["--steps", "5", "-o", "tiny.bin"], "must end in .gguf"),
        (["--steps", "5", "--heads", "3", "--kv-heads", "2"], "3 attention heads"),
    ],
)
def test_what_cannot_work_is_refused_with_one_line_and_no_file(tmp_path, capsys, options, reason):
    assert pretrain(tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert not (tmp_path / "tiny.gguf").exists()


def test_an_empty_corpus_is_refused(tmp_path, capsys):
    assert pretrain(tmp_path, "--steps", "5", text="\n\n") == 2
    assert "is empty" in capsys.readouterr().err
