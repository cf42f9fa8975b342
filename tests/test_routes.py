"""deltanet-ref routes on the embedded model: each loss is the one that eval finds for the files it leaves."""

import json
from types import SimpleNamespace

import pytest

from deltanet_ref.cli.main import main
from deltanet_ref.demo import demo
from deltanet_ref.formats.gguf import read_gguf, write_gguf
from deltanet_ref.train import routes
from tests.test_demo import RECIPE

ADAPTER = RECIPE / "scots-rank4.gguf"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """evaluate.jsonl with 5 passages held out, train.jsonl with 8 of the others."""
    directory = tmp_path_factory.mktemp("data")
    for source, name, rows in (demo.EVALUATE["Scots"], "evaluate.jsonl", 5), (demo.ADAPT, "train.jsonl", 8):
        (directory / name).write_text("".join(source.read_text().splitlines(keepends=True)[:rows]))
    return directory


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """The directory that the command makes, and the losses of its table."""
    output = tmp_path_factory.mktemp("routes") / "made"
    assert (
        main(
            [
                "routes",
                str(demo.MODEL),
                str(ADAPTER),
                str(data / "evaluate.jsonl"),
                "--type",
                "q4_0",
                "--train",
                str(data / "train.jsonl"),
                "--steps",
                "3",
                "--lr",
                "2e-3",
                "-o",
                str(output),
            ]
        )
        == 0
    )
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (output / "routes.md").read_text().splitlines()
    ]
    return output, {row[0]: row[1:] for row in cells[2:]}


def test_every_route_has_the_loss_that_eval_finds_for_its_files(made, data, capsys):
    output, table = made
    base, merged, trained = (str(output / f"{name}-q4_0.gguf") for name in ("base", "merged", "trained"))
    ways = {
        "q8_0 base": [str(demo.MODEL)],
        "q8_0 base + adapter": [str(demo.MODEL), "--adapter", str(ADAPTER)],
        "q4_0 base": [base],
        "q4_0 base + adapter": [base, "--adapter", str(ADAPTER)],
        "merged, then q4_0": [merged],
        "q4_0 base + adapter trained on it": [base, "--adapter", trained],
    }
    assert list(table) == list(ways)
    for name, (model, *adapter) in ways.items():
        assert main(["eval", model, str(data / "evaluate.jsonl"), *adapter, "--json"]) == 0
        assert float(table[name][0]) == pytest.approx(json.loads(capsys.readouterr().out)["loss"], abs=6e-5)  # 4 digits
    losses = {name: float(row[0]) for name, row in table.items()}
    assert losses["q8_0 base + adapter"] < losses["q4_0 base + adapter"] < losses["q4_0 base"]
    assert losses["q4_0 base + adapter trained on it"] < losses["q4_0 base"]
    assert all(
        float(row[3]) == pytest.approx(losses[name] - losses["q8_0 base + adapter"], abs=1.1e-4)
        for name, row in table.items()
    )


def test_the_table_and_the_plot_are_on_the_terminal_and_in_files(made, data, tmp_path, capsys):
    output, _ = made
    assert (output / "routes.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.iterdir()) == [
        "base-q4_0.gguf",
        "merged-q4_0.gguf",
        "routes.md",
        "routes.png",
        "trained-q4_0.gguf",
    ]
    assert read_gguf(output / "base-q4_0.gguf").tensors["blk.0.ffn_up.weight"].type.name == "Q4_0"
    again = tmp_path / "again"
    assert (
        main(
            [
                "routes",
                str(demo.MODEL),
                f"{ADAPTER}=0",
                str(data / "evaluate.jsonl"),
                "--type",
                "q8_0",
                "-o",
                str(again),
            ]
        )
        == 0
    )
    table = (again / "routes.md").read_text()
    assert table in capsys.readouterr().out
    losses = [line.split("|")[2].strip() for line in table.splitlines()[2:]]
    assert len(losses) == 5 and len(set(losses)) == 1  # without --train; nothing changed, nothing quantised anew


@pytest.mark.parametrize(
    "changes, reason",
    [
        (["--train", "evaluate.jsonl"], "is DATA too"),
        (["--train", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--steps", "0"], "--steps is 0"),
        (["--type", "q9"], "q9"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_nothing_left(changes, reason, data, tmp_path, capsys):
    changes = [str(data / word) if word.endswith(".jsonl") else word for word in changes]
    assert (
        main(
            [
                "routes",
                str(demo.MODEL),
                str(ADAPTER),
                str(data / "evaluate.jsonl"),
                *changes,
                "-o",
                str(tmp_path / "made"),
            ]
        )
        == 2
    )
    output = capsys.readouterr()
    assert reason in output.err and "base: loss" not in output.out and not list(tmp_path.iterdir())


def test_a_base_without_a_tokenizer_is_refused(data, tmp_path, capsys):
    file = read_gguf(demo.MODEL)
    metadata = {key: value for key, value in file.metadata.items() if not key.startswith("tokenizer.")}
    write_gguf(tmp_path / "a.gguf", metadata, {t.name: (t.raw, t.type, t.shape) for t in file.tensors.values()})
    assert (
        main(
            [
                "routes",
                str(tmp_path / "a.gguf"),
                str(ADAPTER),
                str(data / "evaluate.jsonl"),
                "-o",
                str(tmp_path / "made"),
            ]
        )
        == 2
    )
    assert "has no tokenizer" in capsys.readouterr().err and not (tmp_path / "made").exists()


def test_an_interrupted_training_is_not_measured(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(routes, "train", lambda *args, **options: SimpleNamespace(interrupted=True))
    assert (
        main(
            [
                "routes",
                str(demo.MODEL),
                str(ADAPTER),
                str(data / "evaluate.jsonl"),
                "--type",
                "q4_0",
                "--train",
                str(data / "train.jsonl"),
                "-o",
                str(tmp_path / "made"),
            ]
        )
        == 130
    )
    assert "trained on it" not in capsys.readouterr().out and not list(tmp_path.iterdir())
