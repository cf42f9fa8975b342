"""Time and memory of the gated delta rule: HF's torch functions, deltanet_ref.ops and the numba backend, in turns.

    python bench/delta_rule.py [--rounds 9] [--threads 2]    4 sizes, 1 to 3 minutes on 2 cores
    python bench/delta_rule.py --full                        9 sizes up to 8192 tokens, and the plot: 5 to 15 minutes

HF's functions take part where torch and transformers can be imported. Results are first checked against ops in float64;
a wrong engine is not timed. A size is timed for up to SECONDS, but at least three rounds. Writes
bench/results/delta_rule.*. Extra memory is VmHWM, reset through /proc/self/clear_refs, minus what was resident before,
in a process for each size and engine.
"""

import argparse
import ctypes
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from deltanet_ref.backends.cores import available_cores  # noqa: E402

RESULTS = ROOT / "bench" / "results"
LENGTHS = 256, 512, 1024, 2048, 4096, 8192  # of the picture
SECONDS = 10  # of timing one size
SIZES = {
    **{f"B1 L{L}, 16/16 heads, d 128": dict(L=L, H_k=16, H_v=16) for L in LENGTHS},
    "B1 L1024, 16/32 heads, d 128": dict(L=1024, H_k=16, H_v=32),
    "64 packed sequences of 32, 16/16 heads, d 128": dict(L=2048, H_k=16, H_v=16, sequences=64),
    "B1 L2048, 2/2 heads, d 128": dict(L=2048, H_k=2, H_v=2),
}
DEFAULT = [size for size in SIZES if any(part in size for part in ("L256,", "L2048, 16/16", "16/32", "packed"))]
D = 128
PAUSE = 0.05  # seconds between engines, in which the last one's threads stop spinning
NOISE = 4e-6  # float32 against float64 at these sizes: 2e-7 .. 1e-6 for every engine here


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="at most (default 9)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="default: all cores")
    parser.add_argument("--full", action="store_true", help="all sizes, and the plot")
    parser.add_argument("--memory", nargs=2, metavar=("SIZE", "ENGINE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["NUMBA_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # BLAS threads without work sleep at once
    import numpy  # noqa: F401 (its BLAS must be loaded before it can be limited)
    from threadpoolctl import threadpool_limits

    threadpool_limits(args.threads)
    if args.memory:
        print(json.dumps(extra_memory(*args.memory, args.threads)))
        return
    import deltanet_ref.backends.numba_cpu  # noqa: F401 (keeps freed memory, so that no engine's new pages are timed)

    rows = [row for size in (SIZES if args.full else DEFAULT) for row in measure(size, args)]
    record = dict(
        machine=machine(),
        threads=args.threads,
        rounds=args.rounds,
        versions=versions(),
        commit=commit(),
        date=datetime.date.today().isoformat(),
        rows=rows,
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "delta_rule.json").write_text(json.dumps(record, indent=1) + "\n")
    table = markdown(record)
    (RESULTS / "delta_rule.md").write_text(table)
    if args.full:
        draw(record, RESULTS / "delta_rule.svg")
    print(table)


def measure(size, args):
    """Rows of one size: the engines that support it, checked, then timed in turns."""
    arguments = random_arguments(**SIZES[size])
    engines = {name: make(arguments, args.threads) for name, make in available_engines(arguments).items()}
    exact = ops_engine(arguments, "float64")[1]()
    for name, (_, both) in engines.items():
        for result, reference in zip(both(), exact, strict=True):
            error = relative(result, reference)
            if not error < NOISE:
                sys.exit(f"{name} is wrong at {size}: relative error {error:.1e}; nothing was timed")
    times = {(name, work): [] for work in (0, 1) for name in engines}
    end = time.monotonic() + SECONDS
    for done in range(args.rounds):
        if done >= 3 and time.monotonic() > end:
            break
        for (name, work), seconds in times.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            engines[name][work]()
            seconds.append(time.perf_counter() - start)
    memory = {}
    for name in engines:
        command = [sys.executable, __file__, "--threads", str(args.threads), "--memory", size, name]
        memory[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [
        dict(
            size=size,
            engine=name,
            work=("forward", "forward + backward")[work],
            rounds=len(seconds),
            median_ms=1000 * statistics.median(seconds),
            least_ms=1000 * min(seconds),
            extra_MiB=memory[name][work],
        )
        for (name, work), seconds in times.items()
    ]


# ---- the engines, each as two functions: forward -> (o, S_end), both -> (o, S_end, dq, dk, dv, dg, dbeta)


def random_arguments(L, H_k, H_v, sequences=None):
    import numpy as np

    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, L, H_k, D), np.float32)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v, do = rng.standard_normal((2, 1, L, H_v, D), np.float32)
    g, beta = -rng.random((1, L, H_v), np.float32), rng.random((1, L, H_v), np.float32)
    cu_seqlens = None if sequences is None else np.arange(sequences + 1) * (L // sequences)
    dS_end = rng.standard_normal((sequences or 1, H_v, D, D), np.float32)
    return dict(q=q, k=k, v=v, g=g, beta=beta, do=do, dS_end=dS_end, cu_seqlens=cu_seqlens)


def available_engines(arguments):
    engines = {"numba": numba_engine, "ops": lambda a, threads: ops_engine(a, "float32")}
    peers = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    if peers and arguments["cu_seqlens"] is None:  # HF has no packed form
        engines = {"HF torch": torch_engine, **engines}
    return engines


def numpy_functions(forward, backward, a):
    options = dict(g=a["g"], beta=a["beta"], cu_seqlens=a["cu_seqlens"])

    def both():
        o, S_end, cache = forward(a["q"], a["k"], a["v"], **options)
        return o, S_end, *backward(a["do"], a["dS_end"], cache)[:5]

    return lambda: forward(a["q"], a["k"], a["v"], **options)[:2], both


def ops_engine(a, dtype):
    from deltanet_ref import ops

    a = {name: x if name == "cu_seqlens" else x.astype(dtype) for name, x in a.items()}
    return numpy_functions(ops.gated_delta_rule_forward, ops.gated_delta_rule_backward, a)


def numba_engine(a, threads):
    from deltanet_ref.backends import numba_cpu

    return numpy_functions(numba_cpu.gated_delta_rule_forward, numba_cpu.gated_delta_rule_backward, a)


def torch_engine(a, threads):
    """HF's chunked function, q and k repeated for the value heads as its model does; autograd for the backward."""
    import torch
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    torch.set_num_threads(threads)
    tensors = {name: torch.from_numpy(x) for name, x in a.items() if name != "cu_seqlens"}
    group = a["v"].shape[2] // a["q"].shape[2]

    def run(inputs):
        q, k = (x.repeat_interleave(group, 2) if group > 1 else x for x in inputs[:2])
        return torch_chunk_gated_delta_rule(q, k, *inputs[2:], output_final_state=True)

    def forward():
        with torch.no_grad():
            return [x.numpy() for x in run([tensors[n] for n in ("q", "k", "v", "g", "beta")])]

    def both():
        inputs = [tensors[n].detach().requires_grad_() for n in ("q", "k", "v", "g", "beta")]
        o, S_end = run(inputs)
        gradients = torch.autograd.grad([o, S_end], inputs, [tensors["do"], tensors["dS_end"]])
        return [x.detach().numpy() for x in (o, S_end, *gradients)]

    return forward, both


# ---- what is measured besides time


def extra_memory(size, engine, threads):
    """MiB above what is resident, of forward and of forward + backward."""
    from deltanet_ref.train.memory import peak_memory, start_phase

    # a run on few tokens compiles and loads
    small = random_arguments(**SIZES[size] | dict(L=128, sequences=SIZES[size].get("sequences") and 4))
    available_engines(small)[engine](small, threads)[1]()
    arguments = random_arguments(**SIZES[size])
    found = []
    for run in available_engines(arguments)[engine](arguments, threads):
        if sys.platform == "linux":
            getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # returns freed memory to the system
        start_phase()
        before = peak_memory()  # what is resident now
        run()
        found.append((peak_memory() - before) / 2**20)
    return found


def relative(a, b):
    import numpy as np

    return np.linalg.norm(a - b) / np.linalg.norm(b)


def machine():
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"


def versions():
    packages = ("numpy", "scipy", "numba", "torch", "transformers", "xllamacpp")
    from threadpoolctl import threadpool_info

    kernels = {library["architecture"] for library in threadpool_info() if library["internal_api"] == "openblas"}
    return (
        {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
        | {"OpenBLAS kernels": "/".join(sorted(kernels))}
    )


def commit():
    def git(*args):
        return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "-uno", "--", ":!bench/results")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def markdown(record):
    """The table; its ratios compare each engine with numba."""
    lines = [
        f"# Gated delta rule, float32\n\n{record['machine']}; {record['threads']} threads; medians of "
        f"3 to {record['rounds']} rounds in turns; commit {record['commit']}, {record['date']}; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + ".\n",
        "| size | work | engine | ms | its time / numba's | extra MiB | numba's memory / its |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        ours = next(
            other
            for other in record["rows"]
            if (other["size"], other["work"], other["engine"]) == (row["size"], row["work"], "numba")
        )
        lines.append(
            f"| {row['size']} | {row['work']} | {row['engine']} | {row['median_ms']:.0f} | "
            f"{row['median_ms'] / ours['median_ms']:.1f} | {row['extra_MiB']:.0f} | "
            f"{ours['extra_MiB'] / row['extra_MiB']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(record, path):
    """Plot time and memory of forward + backward against the length to a file; does nothing without matplotlib."""
    if not importlib.util.find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("median_ms", "extra_MiB"), ("ms", "extra MiB")):
        for engine in dict.fromkeys(row["engine"] for row in record["rows"]):
            points = [
                (SIZES[row["size"]]["L"], row[key])
                for row in record["rows"]
                if row["engine"] == engine
                and row["work"] == "forward + backward"
                and row["size"].endswith("16/16 heads, d 128")
                and row["size"].startswith("B1")
            ]
            axes.plot(*zip(*points), marker="o", label=engine)
        axes.set(xlabel="tokens", ylabel=f"{label}, forward + backward", yscale="log")
        axes.set_xscale("log", base=2)
        axes.set_xticks(LENGTHS, map(str, LENGTHS))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
