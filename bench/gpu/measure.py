"""What one process of the benchmark does: measure one thing and print it as a line of JSON.

A kernel that fails can leave the card's context unusable, and a peer can leave its memory full: each measurement has a
process of its own.
"""

from importlib.metadata import PackageNotFoundError, version

import numpy as np

from bench.gpu.items import ITEMS
from bench.gpu.timing import LIMITS, median_seconds, random_batches, seconds_of, timed_steps
from deltanet_ref import ops
from deltanet_ref.backends import get_backend


class Engine:
    """A backend and what timing it takes."""

    def __init__(self, name: str):
        self.backend = get_backend(name)
        self.xp = self.backend.xp
        self.emulated = name == "cuda-emulated"
        self.stream = self.xp.cuda.Stream(non_blocking=True)

    def arrays(self, item, x: dict, dtype: str) -> tuple[dict, dict]:
        """Inputs on the device, and the same numbers as float64 on the host: rounded once."""
        types = self.backend.dtypes
        device, host = {}, {}
        for name, a in x.items():
            if a.dtype.kind == "f":
                rounded = a.astype(types["float32" if name in item.wide else dtype])
                device[name], host[name] = self.xp.asarray(rounded), rounded.astype(np.float64)
            else:
                device[name] = host[name] = a
        return device, host

    def seconds(self, run) -> float:
        """Median seconds of run(); of one run in a trial, whose times mean nothing."""
        if self.emulated:
            run()
            return seconds_of(run, self.stream.synchronize, 1)
        return median_seconds(run, self.stream.synchronize)

    def eager_and_graph(self, run) -> dict:
        """Seconds of run(), launched by Python and as a captured graph."""
        from deltanet_ref.backends.cuda.graph import Graph

        with self.stream:
            eager = self.seconds(run)
            graph = Graph(self.backend.run_step.__self__.device, {}, {}, run, self.xp.cuda.alloc)
            return dict(eager_s=eager, graph_s=self.seconds(graph.replay))


def ceilings(engine: Engine, sizes) -> dict:
    """The card, its free memory, and what it reaches: bytes per second of a copy (read and written), flops per second
    of a product in bfloat16."""
    xp, bf16 = engine.xp, engine.backend.dtypes["bfloat16"]
    n = sizes["copy_bytes"]
    a, b = xp.zeros(n, np.uint8), xp.zeros(n, np.uint8)

    def copy():
        b[...] = a

    m = sizes["product"]
    x = xp.asarray(np.random.default_rng(0).standard_normal((m, m)).astype(bf16))
    device = engine.backend.run_step.__self__.device
    out = device.empty((m, m), bf16)
    with engine.stream:
        copy_s = engine.seconds(copy)
        product_s = engine.seconds(lambda: device.matmul(x, x, out=out))
    return dict(
        device=engine.backend.device,
        free_bytes=None if engine.emulated else xp.cuda.runtime.memGetInfo()[0],
        bytes_per_s=2 * n / copy_s,
        flops_per_s=2 * m**3 / product_s,
        versions=versions(),
    )


def versions() -> dict:
    """Versions of what takes part, where it is installed."""
    found = {}
    for name in ("cupy-cuda13x", "cupy-cuda12x", "numpy", "torch", "transformers", "peft", "flash-linear-attention",
                 "flash-qla", "transformer-engine", "triton"):  # fmt: skip
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def correctness(engine: Engine, name: str) -> dict:
    """Relative errors of every result of an operator against ops in float64, for both dtypes."""
    item, worst = ITEMS[name], {}
    for dtype in LIMITS:
        rng = np.random.default_rng([len(name), *map(ord, dtype)])
        device, host = engine.arrays(item, item.inputs(rng, item.small), dtype)
        outputs, cache = item.forward(engine.backend, device, item.small)
        wanted, wanted_cache = item.forward(ops, host, item.small)
        errors = [_error(engine, y, w) for y, w in zip(outputs, wanted, strict=True)]
        if item.backward:
            dy = [np.asarray(rng.standard_normal(np.shape(w))) for w in wanted]
            given = [engine.xp.asarray(d.astype(y.dtype)) for d, y in zip(dy, outputs, strict=True)]
            dy = [engine.backend.to_host(d).astype(np.float64) for d in given]
            gradients = item.backward(engine.backend, given, cache, device)
            errors += [
                _error(engine, y, w) for y, w in zip(gradients, item.backward(ops, dy, wanted_cache, host), strict=True)
            ]
        worst[dtype] = max(errors)
    return dict(errors=worst, right=all(worst[dtype] <= limit for dtype, limit in LIMITS.items()))


def _error(engine, got, want):
    got = np.asarray(engine.backend.to_host(got), np.float64)
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-300))


def operator(engine: Engine, name: str, sizes: dict) -> dict:
    """Errors at the small sizes, then times at `sizes` in bfloat16: of forward, and of forward and backward."""
    record = correctness(engine, name)
    if not record["right"]:
        return record
    item = ITEMS[name]
    rng = np.random.default_rng(0)
    device, _ = engine.arrays(item, item.inputs(rng, sizes), "bfloat16")
    outputs, _ = item.forward(engine.backend, device, sizes)
    finite = all(bool(engine.xp.isfinite(y.astype(np.float32)).all()) for y in outputs)
    if not finite:
        return record | dict(right=False)
    record["forward"] = engine.eager_and_graph(lambda: item.forward(engine.backend, device, sizes)[0])
    if item.backward:
        dy = [engine.xp.asarray(rng.standard_normal(y.shape).astype(y.dtype)) for y in outputs]

        def both():
            _, cache = item.forward(engine.backend, device, sizes)
            return item.backward(engine.backend, dy, cache, device)

        record["both"] = engine.eager_and_graph(both)
    floors = item.floor(sizes, 2)
    record["floor"] = dict(forward=floors[0], both=[a + b for a, b in zip(*floors)])
    return record


def step(engine: Engine, path: str, length: int, sequences: int, graphs: bool, steps: int) -> dict:
    """A LoRA step (rank 16, all linear layers, all tokens trained, bfloat16): forward, backward, clipping, AdamW."""
    import deltanet_ref as dr
    from deltanet_ref.lora.adapter import new_adapter
    from deltanet_ref.train.adamw import AdamW

    model = dr.load_model(path, backend=engine.backend.name, dtype="bfloat16")
    model.backend.run_step.__self__.graphs = graphs
    adapter = new_adapter(model, 16, 32)
    model.attach(adapter, trainable=True)
    optimizer = AdamW(backend=model.backend)

    def one(tokens):
        loss, grads = model.loss_and_grads(tokens, tokens, wrt="lora", keep="everything")
        optimizer.step(adapter.tensors, grads, 1e-4, 1.0)
        return loss

    batches = random_batches(model.config.vocab_size, sequences, length, steps)
    record = timed_steps(one, batches, engine.xp.cuda.get_current_stream().synchronize)
    plausible = bool(record["losses"][0] < 2 * np.log(model.config.vocab_size))
    memory = None if engine.emulated else _memory_in_use(engine.xp)
    return record | dict(memory_bytes=memory, right=record["right"] and plausible)


def _memory_in_use(xp):
    free, total = xp.cuda.runtime.memGetInfo()
    return total - free


def main(what: dict) -> dict:
    """Measure what the parent asks for: {"kind": "ceilings" | "operator" | "rule" | "step" | "peer-..." , ...}."""
    kind = what.pop("kind")
    if kind.startswith("peer"):
        from bench.gpu import peers

        return getattr(peers, kind.replace("-", "_"))(**what)
    engine = Engine(what.pop("backend"))
    return dict(ceilings=ceilings, correctness=correctness, operator=operator, step=step)[kind](engine, **what)
