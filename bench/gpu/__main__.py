"""Every kernel of the CUDA backend on the card at hand: checked against float64, timed, and put beside the peers.

    python -m bench.gpu                     everything, within 10 minutes
    python -m bench.gpu --only operators    or rules, steps; several with commas
    python -m bench.gpu --backend cuda-emulated --trial      a trial without a card: its times mean nothing

Needs an NVIDIA card and the extra cuda13 or cuda12. Peers take part where they are installed: flash-linear-attention,
FlashQLA, TransformerEngine, HF transformers with PEFT. A missing peer, a failing kernel or a shape that does not fit
this card is reported, and the rest goes on. With compute-sanitizer on the PATH, each operator runs under it at its
small sizes first. An engine with a wrong result is not timed. Writes bench/results/gpu.json and gpu.md.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu.items import ITEMS, RULES, STEPS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
BUDGET = 570  # seconds in all: what is left when they are over is skipped, and the report says so
PARTS = ("operators", "rules", "steps")
PEERS = {"FLA": "fla", "FlashQLA": "flash_qla", "cuDNN (TransformerEngine)": "cudnn"}
TRIAL_SIZES = dict(L=70, B=1, H_k=1, H_v=2)
SHAPE = "0.8B"
TARGETS = {"B1 L2048": 60_000, "B4 L2048": 80_000}  # tokens per second on an H100


class Runner:
    """Measures things, each in a process of its own, as long as the budget lasts."""

    def __init__(self, args):
        self.args, self.start = args, time.monotonic()

    def measure(self, limit=120, prefix=(), **what) -> dict:
        """The answer of bench.gpu.measure, or {"failed": why}."""
        left = BUDGET - (time.monotonic() - self.start)
        if left < 5 and not self.args.trial:
            return dict(failed="no time left")
        if not what["kind"].startswith("peer"):
            what["backend"] = self.args.backend
        command = [*prefix, sys.executable, "-m", "bench.gpu", "--measure", json.dumps(what)]
        limit = 3600 if self.args.trial else min(limit, left)
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return dict(failed=f"took more than {limit:.0f} s")
        answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode == 0 and answers:
            return json.loads(answers[-1])
        return dict(failed=reason(done))


def reason(done) -> str:
    """In a line: why a process failed."""
    lines = [line for line in (done.stderr + done.stdout).strip().splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit status {done.returncode}"
    for word, meaning in (
        ("ModuleNotFoundError", "not installed"),
        ("ImportError", "not installed"),
        ("OutOfMemory", "does not fit this card"),
    ):
        if word in last:
            return f"{meaning} ({last[:150]})"
    return last[:200]


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", default=",".join(PARTS), metavar="PARTS", help=f"of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--backend", default="cuda", choices=("cuda", "cuda-emulated"))
    parser.add_argument("--trial", action="store_true", help="tiny sizes, nothing is written")
    parser.add_argument("--measure", metavar="JSON", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "bench"))
    if args.measure:
        from bench.gpu.measure import main as measure

        print(json.dumps(measure(json.loads(args.measure))))
        return
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: known are {', '.join(PARTS)}")
    from deltanet_ref.backends import get_backend
    from deltanet_ref.errors import InputError

    try:
        get_backend(args.backend)
    except InputError as error:
        parser.error(str(error))
    record = measure_all(Runner(args), parts, args.trial)
    table = markdown(record)
    print(table)
    if not args.trial:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / "gpu.md").write_text(table)


def measure_all(runner: Runner, parts, trial: bool) -> dict:
    """Everything that is in the report."""
    from delta_rule import commit

    sizes = dict(copy_bytes=1 << 12, product=64) if trial else dict(copy_bytes=1 << 30, product=8192)
    record = dict(
        trial=trial,
        commit=commit(),
        date=datetime.date.today().isoformat(),
        ceilings=runner.measure(kind="ceilings", sizes=sizes),
    )
    if "operators" in parts:
        record["sanitizer"] = {}
        record["operators"] = {}
        for name, item in ITEMS.items():
            note(name)
            if sanitizer := shutil.which("compute-sanitizer"):
                prefix = (sanitizer, "--error-exitcode", "9", "--print-limit", "1")
                record["sanitizer"][name] = runner.measure(kind="correctness", name=name, prefix=prefix)
            main = item.small if trial else item.main
            record["operators"][name] = runner.measure(kind="operator", name=name, sizes=main)
    if "rules" in parts:
        record["rules"] = {}
        for name, rule in RULES.items():
            note(name)
            sizes = rule | TRIAL_SIZES if trial else rule
            engines = {"this": runner.measure(kind="operator", name="gated_delta_rule", sizes=sizes)}
            if not trial:
                for peer, function in PEERS.items():
                    engines[peer] = runner.measure(kind=f"peer-{function}", name=name)
            record["rules"][name] = engines
    if "steps" in parts:
        record["steps"] = {}
        path, steps = step_model(trial), 3 if trial else 13
        for name, (length, sequences) in STEPS.items():
            note(f"LoRA step, {name}")
            size = dict(length=19 if trial else length, sequences=sequences, steps=steps)
            engines = {
                "this, graph": runner.measure(kind="step", path=path, graphs=True, **size),
                "this, eager": runner.measure(kind="step", path=path, graphs=False, **size),
            }
            if not trial:
                engines["HF + PEFT"] = runner.measure(kind="peer-hf-peft", shape=SHAPE, **size)
            record["steps"][name] = engines
    return record


def note(text):
    print(f"... {text}", file=sys.stderr, flush=True)


def step_model(trial):
    """Path of the model whose LoRA step is timed."""
    if trial:
        return str(ROOT / "deltanet_ref" / "demo" / "king-james.gguf")
    from models import random_gguf

    return str(random_gguf(SHAPE, "BF16"))


# ---- the report


def markdown(record) -> str:
    """The report as text."""
    ceilings = record["ceilings"]
    lines = ["# The CUDA backend on a card", ""]
    if record["trial"]:
        lines += ["A TRIAL of this script at tiny sizes: the times below mean nothing.", ""]
    if "failed" in ceilings:
        lines += [f"The ceilings could not be measured: {ceilings['failed']}", ""]
    else:
        lines += [
            f"{ceilings['device']}; measured ceilings: copy {ceilings['bytes_per_s'] / 1e12:.2f} TB/s, product in "
            f"bfloat16 {ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s; commit {record['commit']}, {record['date']}; "
            + ", ".join(f"{name} {number}" for name, number in ceilings["versions"].items()),
            "",
        ]
    if "operators" in record:
        lines += ["## Operators, 0.8B shape, 8192 tokens, bfloat16", "", *operator_table(record), ""]
    if "rules" in record:
        lines += ["## The gated delta rule beside peers, bfloat16", "", *rule_table(record["rules"]), ""]
    if "steps" in record:
        lines += [f"## A LoRA step, {SHAPE} shape, rank 16 on all linear layers", "", *step_table(record["steps"]), ""]
    return "\n".join(lines)


def operator_table(record):
    """Times, and how near they are to the time that bytes and flops need at the measured ceilings."""
    yield "| operator | pass | graph, ms | eager, ms | floor, ms | of the floor | error float32, bfloat16 | sanitizer |"
    yield "|---" * 8 + "|"
    for name, found in record["operators"].items():
        sanitizer = record["sanitizer"].get(name)
        checked = "not run" if sanitizer is None else sanitizer.get("failed", "clean")
        if "failed" in found:
            yield f"| {name} | | FAILED: {found['failed']} | | | | | {checked} |"
            continue
        errors = ", ".join(f"{error:.1e}" for error in found["errors"].values())
        if not found["right"]:
            yield f"| {name} | | WRONG, not timed | | | | {errors} | {checked} |"
            continue
        for which, title in (("forward", "forward"), ("both", "forward + backward")):
            if which in found:
                floor = floor_seconds(found["floor"][which], record["ceilings"])
                graph, eager = found[which]["graph_s"], found[which]["eager_s"]
                share = f"{100 * floor / graph:.0f} %" if floor else ""
                milliseconds = f"{floor * 1e3:.3f}" if floor else ""
                yield (
                    f"| {name} | {title} | {graph * 1e3:.3f} | {eager * 1e3:.3f} | {milliseconds} | {share} | {errors} "
                    f"| {checked} |"
                )


def floor_seconds(floor, ceilings):
    """The larger of the times of its bytes and its flops; None without ceilings."""
    if "failed" in ceilings:
        return None
    return max(floor[0] / ceilings["bytes_per_s"], floor[1] / ceilings["flops_per_s"])


def rule_table(rules):
    """Each engine at each shape; ratios are of graphs, this engine's time over the peer's."""
    yield "| shape | engine | forward: graph, eager, ms | forward + backward: graph, eager, ms | this / it, forward |"
    yield "|---" * 5 + "|"
    for shape, engines in rules.items():
        ours = engines["this"].get("forward", {}).get("graph_s")
        for engine, found in engines.items():
            if "failed" in found or not found["right"]:
                yield f"| {shape} | {engine} | {found.get('failed', 'WRONG, not timed')} | | |"
                continue
            cells = [
                f"{found[which].get('graph_s', float('nan')) * 1e3:.3f}, {found[which]['eager_s'] * 1e3:.3f}"
                for which in ("forward", "both")
            ]
            theirs = found["forward"].get("graph_s")
            ratio = f"{ours / theirs:.2f}" if ours and theirs and engine != "this" else ""
            yield f"| {shape} | {engine} | {cells[0]} | {cells[1]} | {ratio} |"


def step_table(steps):
    """Tokens per second and memory of each engine."""
    yield "| shape | engine | ms | tokens/s | memory, GiB | losses of the first and last step | target on an H100 |"
    yield "|---" * 7 + "|"
    for shape, engines in steps.items():
        for engine, found in engines.items():
            if "failed" in found or not found["right"]:
                yield f"| {shape} | {engine} | {found.get('failed', 'WRONG')} | | | | |"
                continue
            memory = f"{found['memory_bytes'] / 2**30:.1f}" if found["memory_bytes"] else ""
            target = f"{TARGETS[shape]:,}" if engine == "this, graph" else ""
            yield (
                f"| {shape} | {engine} | {found['seconds'] * 1e3:.1f} | {found['tokens_per_s']:,.0f} | {memory} "
                f"| {found['losses'][0]:.3f}, {found['losses'][-1]:.3f} | {target} |"
            )


if __name__ == "__main__":
    main()
