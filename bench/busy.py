"""Training next to other load: LoRA steps on the embedded model, on one thread and on several, while other processes
keep every core busy.

    python bench/busy.py [--threads 2] [--busy 2] [--seconds 60]

Starts the busy processes itself and ends them. The two engines, processes of their own, take steps in turns, first with
the cores to themselves, then next to the busy processes, for half of --seconds each. Their losses are compared first
and must be the same to the bit. Writes bench/results/busy.*: medians, and the speed on several threads divided by that
on one. The ratio is the result: it must not fall below 0.8 next to two busy processes on two cores.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
RESULTS = Path(__file__).resolve().parent / "results"
LENGTHS = 100, 1100  # tokens of a step: a short example; a batch of `deltanet-ref train` on the demo's data
RANK = 16
REQUIRED = 0.8


def main():
    from deltanet_ref.backends.cores import available_cores

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=available_cores(), help="compared with one (default: all cores)")
    parser.add_argument("--busy", type=int, default=2, help="processes that never sleep (default 2)")
    parser.add_argument("--seconds", type=float, default=60, help="of measuring (default 60)")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work)
    from delta_rule import commit, machine, versions
    from worker import Worker

    workers = {threads: Worker(__file__, "--work", str(threads)) for threads in (1, args.threads)}
    losses = [worker.answer() for worker in workers.values()]
    if any(loss != losses[0] for loss in losses):
        sys.exit(f"the losses on 1 and {args.threads} threads differ: {losses}; nothing was timed")
    rows = measure(workers, args.seconds / 2, "alone")
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    try:
        rows += measure(workers, args.seconds / 2, f"{args.busy} busy processes")
    finally:
        for process in busy:
            process.kill()
    for worker in workers.values():
        worker.finish()
    record = dict(
        machine=machine(),
        threads=args.threads,
        versions=versions(),
        commit=commit(),
        date=datetime.date.today().isoformat(),
        rows=rows,
    )
    table = markdown(record)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "busy.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "busy.md").write_text(table)
    print(table)


def measure(workers, seconds, load):
    """Rows for each length: steps in turns until the time is over, at least three of each."""
    rows = []
    for length in LENGTHS:
        steps = {threads: [] for threads in workers}
        end = time.monotonic() + seconds / len(LENGTHS)
        while time.monotonic() < end or len(steps[1]) < 3:
            for threads, worker in workers.items():
                steps[threads].append(worker.ask(str(length)))
        rows += [
            dict(
                load=load,
                tokens=length,
                threads=threads,
                steps=len(taken),
                **{key: statistics.median(step[key] for step in taken) for key in ("seconds", "cpu_seconds")},
            )
            for threads, taken in steps.items()
        ]
    return rows


def work(threads):
    """The other side of Worker: answers a number of tokens with the times of one step, in a line of JSON."""
    from deltanet_ref.cli.model import limit_threads

    limit_threads(threads, "numba")
    import numpy as np

    import deltanet_ref as dr
    from deltanet_ref.demo.demo import MODEL
    from deltanet_ref.train.adamw import AdamW

    model = dr.load_model(MODEL)
    adapter = dr.new_adapter(model, rank=RANK, seed=0)
    model.attach(adapter, trainable=True)
    optimizer = AdamW(backend=model.backend)

    def step(length):
        tokens = np.random.default_rng(length).integers(0, model.config.vocab_size, (1, length))
        loss, gradients = model.loss_and_grads(tokens, tokens, wrt="lora")
        optimizer.step(adapter.tensors, gradients, 1e-4, 1.0)
        return float(loss)

    print(json.dumps([step(length) for length in LENGTHS * 2]), flush=True)  # compiles, too
    for line in sys.stdin:
        if line.strip() == "finish":
            print("{}", flush=True)
            return
        start, cpu = time.perf_counter(), time.process_time()
        step(int(line))
        print(json.dumps(dict(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)), flush=True)


def markdown(record):
    lines = [
        f"# A LoRA step next to other load\n\n{record['machine']}; embedded model, r {RANK}; medians of steps in "
        f"turns; commit {record['commit']}, {record['date']}; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + ".\n\nThe ratio of "
        f"{record['threads']} threads to one must not fall below {REQUIRED} next to two busy processes on two "
        "cores.\n",
        "| load | tokens | threads | it/s | CPU s of a step | steps | speed against one thread |",
        "|---" * 7 + "|",
    ]
    for row in record["rows"]:
        single = next(
            other
            for other in record["rows"]
            if (other["load"], other["tokens"], other["threads"]) == (row["load"], row["tokens"], 1)
        )
        lines.append(
            f"| {row['load']} | {row['tokens']} | {row['threads']} | {1 / row['seconds']:.2f} | "
            f"{row['cpu_seconds']:.3f} | {row['steps']} | {single['seconds'] / row['seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
