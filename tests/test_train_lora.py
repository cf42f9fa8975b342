import json
import os

import numpy as np
import pytest

import deltanet_ref as dr
from deltanet_ref.train.batches import IGNORED, Example
from deltanet_ref.train.loop import EvalRecord, TrainRecord
from deltanet_ref.train.lora import TrainOptions, prepare, read_rows, train
from deltanet_ref.train.report import format_count, format_peaks, format_record, format_trainable, text_plot
from tests.paths import FIXTURES

WORDS = ["alpha", "beta", "gamma", "delta", "rule", "gate"]
ROWS = [{"text": " ".join(np.random.default_rng(i).choice(WORDS, 9))} for i in range(11)]


def load(name="eq", dtype="float32"):
    return dr.load_model(FIXTURES / name / f"{name}-f32.gguf", dtype=dtype)


def difference(a, b):
    return np.linalg.norm(a - b)


# Adam divides each gradient by its own size, so what float32 loses in the smallest of them counts in full: 3e-5 seen
@pytest.mark.parametrize("dtype, limit", [("float64", 1e-9), ("float32", 3e-4)])
@pytest.mark.parametrize("name", ["eq", "grouped"])
def test_two_packed_steps_equal_peft_and_torch(name, dtype, limit):
    model = dr.load_model(FIXTURES / name / "hf", dtype=dtype)
    adapter = dr.load_adapter(FIXTURES / name / "lora", model)
    before = {key: array.copy() for key, array in adapter.tensors.items()}
    after = dr.load_adapter(FIXTURES / "train" / f"{name}-two-steps", model).tensors
    ids = json.loads((FIXTURES / name / "golden" / "tokens.json").read_text())
    examples = [Example(np.array(ids[case]), np.array(ids[case]), case) for case in ("t65", "t7")]
    examples[0].labels[:20] = IGNORED
    report = train(model, adapter, examples, steps=2, batch_size=2, lr=1e-2, schedule="constant", weight_decay=0.02)
    losses = json.loads((FIXTURES / "train" / f"{name}-two-steps" / "losses.json").read_text())
    assert report.losses == pytest.approx(losses, rel=limit)
    for key, array in adapter.tensors.items():
        update = difference(after[key], before[key])
        assert difference(array, after[key]) <= limit * update, key


def test_training_lowers_the_loss_and_leaves_the_base_alone():
    model = load()
    adapter = dr.new_adapter(model, rank=3, alpha=6, seed=1)
    base = {name: np.array(model.weights[name]) for name in model.weights}
    report = train(model, adapter, ROWS, steps=12, batch_size=5, lr=0.02, val_fraction=0.2)
    assert report.losses[-1] < 0.5 * report.losses[0]
    assert report.val_losses[-1][1] < 0.5 * report.val_losses[0][1]
    assert all(np.array_equal(base[name], model.weights[name]) for name in base)
    assert [attached.adapter for attached in model.adapters.values()] == [adapter]
    assert report.trainable_parameters == sum(array.size for array in adapter.tensors.values())
    assert report.total_parameters == sum(array.size for array in base.values())
    assert json.loads(json.dumps(report.to_dict()))["steps"] == 12


def test_same_seed_gives_the_same_adapter_file_and_another_seed_another(tmp_path):
    def file(seed):
        model = load()
        adapter = dr.new_adapter(model, rank=2, alpha=4, seed=seed)
        train(model, adapter, ROWS, steps=4, batch_size=3, lr=0.01, seed=seed)
        adapter.save_gguf(tmp_path / "a.gguf")
        return (tmp_path / "a.gguf").read_bytes()

    assert file(5) == file(5) != file(6)


def test_seed_decides_the_order_of_the_examples():
    def losses(seed):
        model = load()
        adapter = dr.new_adapter(model, rank=2, alpha=4, seed=1)
        return train(model, adapter, ROWS, steps=4, batch_size=3, lr=0.01, seed=seed).losses

    assert losses(5) == losses(5) != losses(6)


def test_accumulation_equals_the_larger_batch():
    def factors(**options):
        model = load(dtype="float64")
        adapter = dr.new_adapter(model, rank=2, alpha=4, seed=3)
        train(model, adapter, ROWS[:6], steps=3, lr=0.01, **options)
        return adapter.tensors

    whole, parts = factors(batch_size=6), factors(batch_size=2, grad_accumulation=3)
    for name in whole:  # 1e-14 of the gradient, divided by its own size in Adam
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-9)


def test_adapter_trains_beside_another_and_keeps_its_own_scale_and_name():
    model = load()
    other, own = dr.new_adapter(model, rank=2, alpha=4, seed=1), dr.new_adapter(model, rank=3, alpha=6, seed=2)
    model.attach(other, name="other")
    model.attach(own, scale=0.5, name="own")
    before = {name: array.copy() for name, array in other.tensors.items()}
    train(model, own, ROWS, steps=2, lr=0.01)
    assert all(np.array_equal(before[name], other.tensors[name]) for name in before)
    assert np.any(own.tensors["blk.0.attn_qkv.weight.lora_b"])
    assert (model.adapters["own"].scale, model.adapters["own"].trainable) == (0.5, True)


def test_checkpointing_gives_the_same_adapter_to_the_bit():
    def factors(checkpoint):
        model = dr.load_model(FIXTURES / "eq" / "eq-f32.gguf", backend="numba")
        adapter = dr.new_adapter(model, rank=2, alpha=4, seed=3)
        train(model, adapter, ROWS, steps=3, batch_size=3, lr=0.01, checkpoint=checkpoint)
        return adapter.tensors

    plain, checkpointed = factors(False), factors(True)
    assert all(np.array_equal(plain[name], checkpointed[name]) for name in plain)


def test_the_report_separates_the_peaks_of_loading_compiling_and_training():
    for steps, phases in ((1, ["load", "first step"]), (3, ["load", "first step", "later steps"])):
        model = load()
        report = train(model, dr.new_adapter(model, rank=2, targets="attn_qkv"), ROWS, steps=steps)
        assert list(report.peak_memory) == phases and all(peak > 1e6 for peak in report.peak_memory.values())
    assert format_peaks({"load": 610_000_000, "first step": 1_415_000_000}) == (
        "Peak memory: load 0.61 GB, first step 1.42 GB"
    )


def test_epochs_say_how_many_steps():
    for epochs, accumulation, steps in ((1, 1, 3), (2, 1, 6), (0.5, 1, 2), (2, 4, 2), (0.01, 1, 1)):
        model = load()
        report = train(
            model,
            dr.new_adapter(model, rank=2, targets="attn_qkv"),
            ROWS,
            epochs=epochs,
            batch_size=4,
            grad_accumulation=accumulation,
        )
        assert report.steps == steps


def test_validation_rows_come_from_the_directory_or_are_held_out(tmp_path):
    model = load()
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS[:7])))
    (tmp_path / "valid.jsonl").write_text("\n".join(map(json.dumps, ROWS[7:])))
    splits = prepare(read_rows(tmp_path), model, TrainOptions(val_fraction=0.5))
    assert [len(splits[split]) for split in ("train", "valid")] == [7, 4]
    splits = prepare(read_rows(ROWS), model, TrainOptions(val_fraction=0.25))
    sources = [[e.source for e in splits[split]] for split in ("train", "valid")]
    assert [len(s) for s in sources] == [8, 3]
    assert sorted(sources[0] + sources[1]) == sorted(f"row {i}" for i in range(1, 12))
    splits = prepare(read_rows(ROWS), model, TrainOptions())
    assert [len(splits[split]) for split in ("train", "valid")] == [11, 0]


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"lerning_rate": 1}, "unknown options lerning_rate"),
        ({"steps": 0}, "`steps` is 0, it must be at least 1"),
        ({"steps": "many"}, "`steps` is 'many', it must be at least 1"),
        ({"steps": 1, "epochs": 1}, "give one"),
        ({"lr": float("nan")}, "`lr` is nan, it must be above 0"),
        ({"epochs": -1}, "`epochs` is -1"),
        ({"schedule": "cubic"}, "one of constant, linear, cosine"),
        ({"val_fraction": 1.0}, "below 1"),
        ({"val_fraction": 0.99}, "`val_fraction` 0.99 holds out 11 rows, all of them"),
        ({"seq_len": 1025}, "`seq_len` is 1025, it must be from 2 to the model's context of 1024"),
        ({"seq_len": 4}, "row 1: .* tokens are more than `seq_len` 4: .* `truncate=True` .and 10 more"),
    ],
)
def test_bad_option_is_refused_before_training(options, reason):
    model = load()
    adapter = dr.new_adapter(model, rank=2)
    with pytest.raises(dr.InputError, match=reason):
        train(model, adapter, ROWS, **options)
    assert not model.adapters and not any(array.any() for name, array in adapter.tensors.items() if name.endswith("_b"))


def test_log_lines_have_the_form_people_parse():
    assert format_record(TrainRecord(10, 2.3456, 2e-4, 1.5, 1234.5, 6789, 4_200_000_000)) == (
        "Iter 10: Train loss 2.346, Learning Rate 2.000e-04, It/sec 1.500, Tokens/sec 1234.500, Trained Tokens 6789, "
        "Peak mem 4.200 GB"
    )
    assert format_record(EvalRecord(1, 2.5, 0.125)) == "Iter 1: Val loss 2.500, Val took 0.125s"
    assert format_trainable(3_190_000, 755_000_000) == "Trainable parameters: 0.42% (3.19M/755M)"
    assert [format_count(n) for n in (42, 18_528, 999_700, 4_123_456_789)] == ["42", "18.5k", "1000k", "4.12B"]


def test_text_plot_has_one_column_per_value_and_its_range():
    lines = text_plot([4.0, 2.0, 1.0, 0.0], width=4, height=2).split("\n")
    assert [line.split("| ")[-1] for line in lines[:2]] == ["\u2588\u2581", "\u2588\u2588\u2585\u2581"]
    assert lines[0].startswith("   4.000") and lines[1].startswith("   0.000") and lines[-1].endswith("1 to 4")
    assert len(text_plot(list(range(1000)), width=60, height=3).split("\n")[2].split("| ")[1]) == 60
    assert text_plot([1.0])


def test_plot_is_drawn(tmp_path):
    model = load()
    report = train(model, dr.new_adapter(model, rank=2, targets="ffn_up"), ROWS, steps=3, val_fraction=0.2)
    report.save_plot(tmp_path / "loss.svg")
    assert b"<svg" in (tmp_path / "loss.svg").read_bytes()
    assert os.listdir(tmp_path) == ["loss.svg"]
