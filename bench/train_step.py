"""A step of LoRA training: forward, backward, clipping, AdamW; r 16 on all linear layers, every token trained.

    python bench/train_step.py                       # 0.8B shape; L 256 without and with checkpointing, L 2048 with
    python bench/train_step.py --shape 4B --types Q4_K_M --lengths 512 --no-peers

Random models of the real shapes (bench/models.py). Compared are this engine on a mapped GGUF of several types, and HF
with PEFT in float32 (where torch, transformers and peft can be imported), each in a process of its own, one step each
in turns. Before that, loss and gradients of a
small model are checked against ops in float64; a wrong engine is not timed. Writes bench/results/train_step.*:
times, peaks of memory (VmHWM, reset for each phase), where the time of a step goes, and the time of the step's
matrix products alone, on arrays of the same shapes.
"""

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
RANK, ALPHA, LR = 16, 32, 2e-4
NOISE = 2e-5  # float32 against float64, of the whole gradient of a tiny model: measured 1e-6 .. 4e-6
PAUSE = 0.2  # seconds between steps: threads of the engine before that still spin go to sleep
# functions of the backend by what they are, for the profile; all other time counts as element-wise
KINDS = {
    "matrix products": "linear_forward linear_backward_input linear_backward_weight "
    "linear.linear_forward linear.linear_add linear.linear_backward_input linear.linear_backward_weight "
    "stored.linear_forward stored.linear_backward_input",
    "delta rule": "gated_delta_rule_forward gated_delta_rule_backward",
    "attention": "softmax_attention_forward softmax_attention_backward",
    "dequantisation": "stored.dequantize quants.decode_into",
    "element-wise": "",
}

HF_TARGETS = [
    *("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"),
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="0.8B", help="one of bench/models.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--types", default="F32,Q4_K_M", help="of the base's weights, for this engine")
    parser.add_argument("--lengths", default="256,256c,2048c", help="tokens of a step, with c: with checkpointing")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    set_threads(args.threads)
    if args.work:
        return work(**json.loads(args.work), threads=args.threads)
    check()
    from models import random_gguf

    for type in args.types.split(","):
        random_gguf(args.shape, type)  # here, so that no engine's memory has seen it made
    rows = [
        row
        for length in args.lengths.split(",")
        for row in measure(args, int(length.rstrip("c")), checkpoint=length.endswith("c"))
    ]
    from delta_rule import commit, machine, versions

    record = dict(
        machine=machine(),
        threads=args.threads,
        rounds=args.rounds,
        shape=args.shape,
        versions=versions(),
        commit=commit(),
        date=datetime.date.today().isoformat(),
        rows=rows,
    )
    table = markdown(record)
    print(table)
    if args.shape != "tiny":  # which is there to try the script
        RESULTS.mkdir(exist_ok=True)
        name = f"train_step_{args.shape}"
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / f"{name}.md").write_text(table)
        draw(record, RESULTS / f"{name}.svg")


def set_threads(threads):
    for name in ("NUMBA", "OPENBLAS", "OMP"):
        os.environ[f"{name}_NUM_THREADS"] = str(threads)


def measure(args, length, checkpoint):
    """A row for each engine: medians of steps taken in turns."""
    from worker import Worker

    peers = not args.no_peers and all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))
    engines = [("numba", type) for type in args.types.split(",")] + [("HF + PEFT", "F32")] * peers
    workers, steps = [], [[] for _ in engines]
    for engine, type in engines:
        what = dict(engine=engine, type=type, shape=args.shape, length=length, checkpoint=checkpoint)
        workers.append(Worker(__file__, "--threads", str(args.threads), "--work", json.dumps(what)))
        workers[-1].answer()  # it has loaded, compiled and taken its first step
    for _ in range(args.rounds):
        for worker, taken in zip(workers, steps):
            time.sleep(PAUSE)
            taken.append(worker.ask("step"))
    rows = []
    for (engine, type), worker, taken in zip(engines, workers, steps):
        seconds = [step["seconds"] for step in taken]
        rows.append(
            dict(
                engine=engine,
                type=type,
                length=length,
                checkpoint=checkpoint,
                loss=taken[0]["loss"],
                median_s=statistics.median(seconds),
                least_s=min(seconds),
                **worker.finish(),
            )
        )
    return rows


def work(engine, type, shape, length, checkpoint, threads):
    """The other side of Worker: answers each line of stdin with a line of JSON."""
    import numpy as np

    from deltanet_ref.train.memory import start_phase

    tokens = np.random.default_rng(1).integers(0, 200_000, (1, length))
    make = ours if engine == "numba" else hf_peft
    step, details = make(shape, type, tokens, checkpoint, threads)
    peaks = {"load": start_phase()}
    step()
    peaks["first step"] = start_phase()
    print("{}", flush=True)
    for line in sys.stdin:
        if line.strip() == "finish":
            peaks["step"] = start_phase()
            print(json.dumps(dict(peaks=peaks, **details())), flush=True)
            return
        start = time.perf_counter()
        loss = step()
        print(json.dumps(dict(seconds=time.perf_counter() - start, loss=loss)), flush=True)


# ---- the engines: each gives step() -> loss, and details() -> what else there is to tell


def ours(shape, type, tokens, checkpoint, threads):
    from models import random_gguf

    import deltanet_ref as dr
    from deltanet_ref.lora.adapter import new_adapter
    from deltanet_ref.train.adamw import AdamW

    model = dr.load_model(random_gguf(shape, type), backend="numba", weights="mapped")
    adapter = new_adapter(model, RANK, ALPHA)
    model.attach(adapter, trainable=True)
    optimizer = AdamW(backend=model.backend)

    def step():
        loss, grads = model.loss_and_grads(tokens, tokens, wrt="lora", keep="inputs" if checkpoint else "products")
        optimizer.step(adapter.tensors, grads, LR, 1.0)
        return loss

    def details():
        watch = Stopwatch()
        whole = timed(step)
        watch.seconds["element-wise"] += whole - sum(watch.seconds.values())
        return dict(profile=watch.seconds, products_s=products_alone(watch.products))

    return step, details


def hf_peft(shape, type, tokens, checkpoint, threads):
    import torch
    from models import config_of
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    from deltanet_ref.model.convert import hf_config

    torch.set_num_threads(threads)
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig.from_dict(hf_config(config_of(shape), "float32")))
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=HF_TARGETS))
    if checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, ids = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0), torch.from_numpy(tokens)

    def step():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    return step, dict


# ---- checked first


def check():
    """Loss and gradients of a small model in float32, with and without checkpointing, against ops in float64."""
    from dataclasses import replace

    import numpy as np
    from models import config_of, small_tensor

    from deltanet_ref import ops
    from deltanet_ref.backends import get_backend
    from deltanet_ref.lora.adapter import new_adapter
    from deltanet_ref.model.qwen35 import Qwen35
    from deltanet_ref.model.tensors import expected_tensors
    from deltanet_ref.model.weights import Weights

    config, rng = replace(config_of("tiny"), vocab_size=5000), np.random.default_rng(3)
    weights = {
        name: small_tensor(name, rng.standard_normal(spec.shape, np.float32))
        for name, spec in expected_tensors(config).items()
    }
    models = []
    for dtype, backend in (("float64", ops), ("float32", get_backend("numba"))):
        stored = {name: w.astype(dtype) for name, w in weights.items()}
        models.append(Qwen35(config, Weights(config, stored, dtype, backend)))
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (1, 150))
    adapter = new_adapter(models[1], RANK, ALPHA)
    adapter.tensors = {name: rng.standard_normal(x.shape, np.float32) / 10 for name, x in adapter.tensors.items()}
    for model in models:
        model.attach(adapter)
    loss, exact = models[0].loss_and_grads(tokens, tokens, wrt="lora")
    for keep in ("products", "inputs"):
        found_loss, found = models[1].loss_and_grads(tokens, tokens, wrt="lora", keep=keep)
        error = np.sqrt(
            sum(np.sum((found[name] - exact[name]) ** 2) for name in exact) / sum(np.sum(x**2) for x in exact.values())
        )
        if not (error < NOISE and abs(found_loss / loss - 1) < NOISE):
            sys.exit(f"wrong with keep={keep}: loss {found_loss} instead of {loss}, gradients off by {error:.1e}")


# ---- where the time goes


class Stopwatch:
    """Adds up the seconds in the functions of KINDS, without those they call, and the shapes of matrix products."""

    def __init__(self):
        from deltanet_ref.backends import numba_cpu

        self.seconds, self.products = dict.fromkeys(KINDS, 0.0), Counter()
        for kind, names in KINDS.items():
            for name in names.split():
                *module, function = name.split(".")
                owner = getattr(numba_cpu, *module) if module else numba_cpu
                setattr(owner, function, self._timed(getattr(owner, function), kind, function))

    def _timed(self, function, kind, name):
        def call(*args, **options):
            self.products.update(shapes_of_products(name, args))
            start, others = time.perf_counter(), sum(self.seconds.values())
            result = function(*args, **options)
            self.seconds[kind] += time.perf_counter() - start - (sum(self.seconds.values()) - others)
            return result

        return call


def shapes_of_products(name, args):
    """(m, k, n) of each product (m, k) (k, n) that a function computes."""

    def rows(x):
        return x.size // x.shape[-1]

    if name == "linear_forward":
        x, w = args
        return [(rows(x), *t.shape[::-1]) for t in (w if isinstance(w, list) else [w])]
    if name == "linear_backward_input":
        dy, w = args
        return [(rows(dy), *w.shape)]
    if name == "linear_backward_weight":
        dy, x = args
        return [(dy.shape[-1], rows(dy), x.shape[-1])]
    if name == "linear_add":
        y, x, w = args
        return [(rows(y), *w.shape[::-1])]
    return []


def products_alone(products, repeats=3):
    """Seconds of these float32 products by NumPy: the best of a few runs of each shape, times their number."""
    import numpy as np

    total = 0.0
    for (m, k, n), count in products.items():
        a, b = np.ones((m, k), np.float32), np.ones((n, k), np.float32).T
        total += count * min(timed(lambda: a @ b) for _ in range(repeats))
    return total


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# ---- what is written


def markdown(record):
    lines = [
        f"# A LoRA step, {record['shape']} shape, r {RANK} on all linear layers, all tokens trained\n\n"
        f"{record['machine']}; {record['threads']} threads; medians of {record['rounds']} steps in turns; commit "
        f"{record['commit']}, {record['date']}; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + ".\n",
        "| L | checkpointing | engine | weights | s | tokens/s | faster than HF | peak GiB: load, first step, step "
        "| matrix products alone, s | the step without dequantisation needs |",
        "|---" * 10 + "|",
    ]
    for row in record["rows"]:
        peer = next(
            (
                other
                for other in record["rows"]
                if other["engine"] != "numba"
                and (other["length"], other["checkpoint"]) == (row["length"], row["checkpoint"])
            ),
            None,
        )
        ratio = f"{peer['median_s'] / row['median_s']:.2f} x" if peer else ""
        peaks = ", ".join(f"{peak / 2**30:.2f}" for peak in row["peaks"].values())
        floor = "|"
        if "profile" in row:
            times = (row["median_s"] - row["profile"]["dequantisation"]) / row["products_s"]
            floor = f"{row['products_s']:.2f} | {times:.2f} times that"
        lines.append(
            f"| {row['length']} | {'yes' if row['checkpoint'] else 'no'} | {row['engine']} | {row['type']} | "
            f"{row['median_s']:.2f} | {row['length'] / row['median_s']:.1f} | {ratio} | {peaks} | {floor} |"
        )
    lines += ["\nWhere the time of a step goes, %:\n"]
    lines += [f"| L | weights | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 2) + "|"]
    for row in record["rows"]:
        if "profile" in row:
            whole = sum(row["profile"].values())
            shares = " | ".join(f"{100 * row['profile'][kind] / whole:.1f}" for kind in KINDS)
            lines.append(f"| {row['length']}{', checkpointing' * row['checkpoint']} | {row['type']} | {shares} |")
    return "\n".join(lines) + "\n"


def draw(record, path):
    """Where the time of a step goes, in %, a bar for each of our rows, in a file. Without matplotlib: nothing."""
    if not importlib.util.find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if "profile" in row]
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot(xlabel="% of a step")
    labels = [
        f"L {row['length']}, {row['type']}{', checkpointing' * row['checkpoint']}: {row['median_s']:.1f} s"
        for row in rows
    ]
    left = [0.0] * len(rows)
    for kind in KINDS:
        widths = [100 * row["profile"][kind] / sum(row["profile"].values()) for row in rows]
        axes.barh(labels, widths, left=left, label=kind)
        left = [a + b for a, b in zip(left, widths)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    figure.legend(ncols=len(KINDS), loc="outside lower center")
    figure.savefig(path)


if __name__ == "__main__":
    main()
