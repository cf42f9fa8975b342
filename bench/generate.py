"""Prefill and decode: this engine on a mapped GGUF, and llama.cpp (where xllamacpp can be imported), in turns.

    python bench/generate.py                         # 0.8B shape, four types, a prompt of 512 tokens, 64 more
    python bench/generate.py --shape 4B --types Q4_K_M --rounds 3

Random models of the real shapes (bench/models.py). Before anything is timed, products with stored tensors are compared
with float64 products of what the gguf package decodes, and the logits of both engines with each other. llama.cpp runs
with its own defaults. Each engine is a process of its own. Writes bench/results/generate_*: medians of the rounds, and
peaks of memory (VmHWM, mapped pages that were touched included) while loading and while running.
"""

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
ENGINES = ("numba", "llama.cpp")
PAUSE = 0.5  # seconds: threads of the engine before that still spin go to sleep
NOISE = 1e-6  # a float32 product against float64; measured: 1e-7 .. 2e-7
ROUNDED = 0.1  # llama.cpp's log-probabilities against ours: it rounds activations to 8 bits
CHECKED_ROWS, CHECKED_TOKENS = 64, 7


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="0.8B")
    parser.add_argument("--types", default="BF16,F16,Q8_0,Q4_K_M")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="to produce")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", nargs=2, metavar=("ENGINE", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["NUMBA_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(args.threads)
    if args.work:
        return work(*args.work, args)
    from delta_rule import commit, machine, versions
    from models import random_gguf

    rows = [row for type in args.types.split(",") for row in measure(type, random_gguf(args.shape, type), args)]
    record = dict(
        machine=machine(),
        threads=args.threads,
        rounds=args.rounds,
        shape=args.shape,
        prompt=args.prompt,
        tokens=args.tokens,
        versions=versions(),
        commit=commit(),
        date=datetime.date.today().isoformat(),
        rows=rows,
    )
    table = markdown(record)
    print(table)
    if args.shape != "tiny":  # which is there to try the script
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"generate_{args.shape}.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / f"generate_{args.shape}.md").write_text(table)


def measure(type, path, args):
    """A row for each engine."""
    from worker import Worker

    check_products(path)
    engines = ENGINES if importlib.util.find_spec("xllamacpp") else ENGINES[:1]
    sizes = ["--prompt", str(args.prompt), "--tokens", str(args.tokens), "--threads", str(args.threads)]
    workers = {
        engine: Worker(__file__, "--work", engine, str(path), *sizes, stderr=subprocess.DEVNULL) for engine in engines
    }
    checks = {engine: worker.ask("check") for engine, worker in workers.items()}
    if len(checks) > 1:
        compare(*checks.values())
    for worker in workers.values():
        worker.ask("round")  # compiles, and brings the file into memory
    rounds = {engine: [] for engine in engines}
    for _ in range(args.rounds):
        for engine, worker in workers.items():
            time.sleep(PAUSE)
            rounds[engine].append(worker.ask("round"))
    return [
        dict(
            type=type,
            engine=engine,
            file_MiB=path.stat().st_size / 2**20,
            **workers[engine].finish(),
            prefill_per_s=statistics.median(r["prefill_per_s"] for r in rounds[engine]),
            decode_per_s=statistics.median(r["decode_per_s"] for r in rounds[engine]),
        )
        for engine in engines
    ]


def work(engine, path, args):
    """The other side of Worker: answers each line of stdin with a line of JSON."""
    import numpy as np

    from deltanet_ref.train.memory import start_phase

    prompt = np.random.default_rng(1).integers(0, 200_000, args.prompt).tolist()
    replies = os.dup(1)
    os.dup2(2, 1)  # llama.cpp prints to stdout
    start = time.perf_counter()
    run, log_probabilities = {"numba": numba_engine, "llama.cpp": llama_engine}[engine](path, args)
    load_s, load_peak = time.perf_counter() - start, start_phase()
    answers = {
        "round": lambda: run(prompt),
        "check": lambda: log_probabilities(prompt[:CHECKED_TOKENS]),
        "finish": lambda: dict(load_s=load_s, load_MiB=load_peak / 2**20, run_MiB=start_phase() / 2**20),
    }
    for line in sys.stdin:
        os.write(replies, json.dumps(answers[line.strip()]()).encode() + b"\n")
        if line.strip() == "finish":
            os._exit(0)  # llama.cpp's server does not always end its threads


# ---- the engines: each gives run(prompt) -> speeds, and log_probabilities(prompt) -> {token id: of the next token}


def numba_engine(path, args):
    import numpy as np

    import deltanet_ref as dr

    model = dr.load_model(path, backend="numba", weights="mapped")

    def run(prompt):
        start = time.perf_counter()
        tokens = dr.generate(model, prompt, max_tokens=args.tokens, temperature=0, return_ids=True)
        next(tokens)
        first = time.perf_counter()
        more = sum(1 for _ in tokens)
        return dict(prefill_per_s=len(prompt) / (first - start), decode_per_s=more / (time.perf_counter() - first))

    def log_probabilities(prompt):
        logits = model.prefill(np.array(prompt))[0].astype(np.float64)
        return dict(enumerate(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())))

    return run, log_probabilities


def llama_engine(path, args):
    import xllamacpp

    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup = str(path), args.prompt + args.tokens + 16, 1, False
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(p)

    def complete(prompt, **options):
        request = {"prompt": prompt, "temperature": 0, "cache_prompt": False, "ignore_eos": True, **options}
        reply = server.handle_completions(request)
        return json.loads(reply) if isinstance(reply, str) else reply

    def run(prompt):
        timings = complete(prompt, n_predict=args.tokens)["timings"]
        # the first token comes with the prompt
        return dict(
            prefill_per_s=1000 * timings["prompt_n"] / timings["prompt_ms"],
            decode_per_s=1000 * (timings["predicted_n"] - 1) / timings["predicted_ms"],
        )

    def log_probabilities(prompt):
        # made an "a": a token without text would come without probabilities; those reported are before that
        reply = complete(prompt, n_predict=1, n_probs=200, logit_bias=[[64, 1000.0]], post_sampling_probs=False)
        return {
            entry["id"]: entry["logprob"] for entry in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        }

    return run, log_probabilities


# ---- checks before anything is timed


def check_products(path):
    """The first rows of one tensor of each stored type, times few and many rows of x."""
    import gguf
    import numpy as np

    from deltanet_ref.backends import numba_cpu
    from deltanet_ref.formats.gguf import read_gguf

    tensors = {t.type: t for t in read_gguf(path).tensors.values() if len(t.shape) == 2 and t.shape[1] % 256 == 0}
    rng = np.random.default_rng(0)
    for kind, tensor in tensors.items():
        rows = min(CHECKED_ROWS, tensor.shape[0])
        tensor = tensor._replace(
            shape=(rows, tensor.shape[1]), raw=tensor.raw[: tensor.nbytes // tensor.shape[0] * rows]
        )
        w = gguf.quants.dequantize(tensor.raw.reshape(rows, -1), kind).astype(np.float64)
        for count in (1, 3, numba_cpu.FEW + 1):
            x = rng.standard_normal((count, w.shape[1]), np.float32)
            (y,) = numba_cpu.stored_linear_forward(x, [tensor])
            error = np.linalg.norm(y - x @ w.T) / np.linalg.norm(x @ w.T)
            if not error < NOISE:
                sys.exit(f"{kind.name} times {count} rows is wrong: relative error {error:.1e}; nothing was timed")


def compare(ours, theirs):
    """Log-probabilities of the tokens that llama.cpp reported, its likeliest ones."""
    import numpy as np

    found, expected = np.array([[ours[i], logprob] for i, logprob in theirs.items()]).T
    error = np.sqrt(np.mean((found - expected) ** 2)) / np.std(list(ours.values()))
    if not error < ROUNDED:
        sys.exit(f"the engines disagree: {error:.1e} of the spread of all logits; nothing was timed")


def markdown(record):
    """One table; our speeds divided by the peer's."""
    lines = [
        f"# Generation, {record['shape']} shape\n\n{record['machine']}; {record['threads']} threads; prompt of "
        f"{record['prompt']} tokens, then {record['tokens']}; medians of {record['rounds']} rounds in turns; commit "
        f"{record['commit']}, {record['date']}; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + ".\n",
        "| type | file MiB | engine | prefill tok/s | decode tok/s | load s | peak MiB, loading | peak MiB, running |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        peer = next(
            (
                other
                for other in record["rows"]
                if (other["type"], other["engine"]) == (row["type"], "llama.cpp") and other is not row
            ),
            None,
        )
        prefill, decode = (
            f"{row[key]:.1f}" + (f" ({row[key] / peer[key]:.2f} x)" if peer else "")
            for key in ("prefill_per_s", "decode_per_s")
        )
        lines.append(
            f"| {row['type']} | {row['file_MiB']:.0f} | {row['engine']} | {prefill} | {decode} | "
            f"{row['load_s']:.2f} | {row['load_MiB']:.0f} | {row['run_MiB']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
