"""python -m bench.gpu, tried without a card: it measures what it should, and what fails is a line of the report."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.gpu import __main__ as gpu
from bench.gpu.items import ITEMS
from bench.gpu.measure import Engine, correctness, operator
from bench.gpu.timing import LIMITS
from deltanet_ref.backends.interface import OPERATORS

ROOT = Path(__file__).parents[2]
CEILINGS = dict(device="card", free_bytes=1, bytes_per_s=1e12, flops_per_s=1e14, versions={"numpy": "2"})
TIMES = dict(eager_s=4e-3, graph_s=2e-3)


@pytest.fixture(scope="module")
def engine():
    return Engine("cuda-emulated")


@pytest.mark.parametrize("name", ITEMS)
def test_every_operator_is_right(engine, name):
    found = correctness(engine, name)
    assert found["right"] and all(0 < error < LIMITS[dtype] for dtype, error in found["errors"].items()), found


def test_operators_with_a_kernel_of_their_own_are_measured():
    without = {"linear", "lora", "adamw", "embedding", "gated_delta_rule_step", "cross_entropy"}  # in the step, or tiny
    families = {name.removesuffix("_update").split("_forward")[0].split("_backward")[0] for name in OPERATORS}
    assert families - without - {"to_host", "rope_tables"} == set(ITEMS)


def test_an_operator_is_timed_eagerly_and_as_a_graph_and_its_floor_is_stated(engine):
    found = operator(engine, "swiglu", ITEMS["swiglu"].small)
    bytes_forward = 3 * 37 * 67 * 2
    assert found["floor"]["forward"][0] == bytes_forward and found["floor"]["both"][0] == bytes_forward * 8 // 3
    assert all(found[which][how] > 0 for which in ("forward", "both") for how in ("eager_s", "graph_s"))


def test_a_wrong_operator_is_not_timed(engine, monkeypatch):
    right = engine.backend.swiglu_forward

    def wrong(gate, up):
        y, cache = right(gate, up)
        return (y * 1.1).astype(y.dtype), cache

    monkeypatch.setattr(engine.backend, "swiglu_forward", wrong)
    found = operator(engine, "swiglu", ITEMS["swiglu"].small)
    assert not found["right"] and "forward" not in found


@pytest.mark.parametrize(
    "stderr, status, words",
    [
        ("Traceback ...\nModuleNotFoundError: No module named 'fla'", 1, "not installed"),
        ("cupy.cuda.memory.OutOfMemoryError: Out of memory allocating 5 bytes", 1, "does not fit this card"),
        ("CUDARuntimeError: cudaErrorIllegalAddress", 1, "cudaErrorIllegalAddress"),
        ("", -11, "exit status -11"),
    ],
)
def test_the_report_says_in_a_line_why_a_process_failed(monkeypatch, stderr, status, words):
    done = SimpleNamespace(returncode=status, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)
    runner = gpu.Runner(SimpleNamespace(trial=True, backend="cuda"))
    assert words in runner.measure(kind="operator", name="swiglu", sizes={})["failed"]


def test_what_takes_too_long_is_ended_and_what_comes_after_the_budget_is_skipped(monkeypatch):
    def run(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    runner = gpu.Runner(SimpleNamespace(trial=False, backend="cuda"))
    assert runner.measure(kind="ceilings", sizes={}) == dict(failed="took more than 120 s")
    runner.start -= gpu.BUDGET
    assert runner.measure(kind="ceilings", sizes={}) == dict(failed="no time left")


def test_the_report_has_a_line_for_each_success_and_each_failure():
    timed = dict(right=True, errors={"float32": 1e-7, "bfloat16": 2e-3}, forward=TIMES, both=TIMES,
                 floor=dict(forward=[1e9, 0], both=[0, 1e11]))  # fmt: skip
    eager = dict(eager_s=1e-3)  # of a peer that cannot be captured
    step = dict(right=True, seconds=0.05, tokens_per_s=40960.0, losses=[12.0, 11.0], memory_bytes=2**34)
    record = dict(
        trial=False, commit="abc", date="today", ceilings=CEILINGS, sanitizer={"swiglu": dict(failed="race")},
        operators=dict(swiglu=timed, l2_norm=dict(failed="illegal address"), rope=dict(right=False, errors={"f": 1.0})),
        rules=dict(B1=dict(this=timed, FLA=dict(failed="not installed"), FlashQLA=dict(timed, forward=eager))),
        steps={"B1 L2048": {"this, graph": step, "HF + PEFT": dict(failed="does not fit this card")}},
    )  # fmt: skip
    text = gpu.markdown(record)
    for line in (
        "| swiglu | forward | 2.000 | 4.000 | 1.000 | 50 % | 1.0e-07, 2.0e-03 | race |",
        "| swiglu | forward + backward | 2.000 | 4.000 | 1.000 | 50 % | 1.0e-07, 2.0e-03 | race |",
        "| l2_norm | | FAILED: illegal address | | | | | not run |",
        "| rope | | WRONG, not timed | | | | 1.0e+00 | not run |",
        "| B1 | FLA | not installed | | |",
        "| B1 | FlashQLA | nan, 1.000 | 2.000, 4.000 |  |",
        "| B1 L2048 | this, graph | 50.0 | 40,960 | 16.0 | 12.000, 11.000 | 60,000 |",
        "| B1 L2048 | HF + PEFT | does not fit this card | | | | |",
    ):
        assert line in text.splitlines(), line
    assert "commit abc" in text and "TRIAL" not in text


def test_without_a_card_it_says_what_is_missing_and_exits_with_2():
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "backend 'cuda'" in done.stderr and "Traceback" not in done.stderr
