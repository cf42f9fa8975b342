"""Registers, spills and shared memory of every kernel that a model launches, for each kind of card.

    python -m tests.cuda.resources          compile all of them and write resources.json (test_compile.py compares)

The kernels, their macros, blocks and dynamic shared memory are those of a dry run: a model with the widths of
Qwen3.5-0.8B, forward, backward and decoding, and the norms of the larger models, on a device that launches nothing.
"""

import json
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from deltanet_ref.backends import cuda
from deltanet_ref.backends.cuda import device as device_module, stand_in
from deltanet_ref.backends.cuda.device import Device, Kernel
from deltanet_ref.formats import quants
from deltanet_ref.model.layers import MIXERS
from deltanet_ref.model.qwen35 import Qwen35
from deltanet_ref.model.tensors import expected_tensors
from deltanet_ref.model.weights import Weights
from tests.test_load import ATTENTION, DELTA, small_config

TABLE = Path(__file__).with_name("resources.json")
ARCHITECTURES = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # compute capability -> KiB of shared memory of a block
HEADS = ((96, 192), (128, 48))  # other head sizes of delta rules: d_k, d_v
WIDTHS = (1024, 2048, 2560, 4096)  # hidden sizes of 0.8B, 2B, 4B and 9B
REGISTERS = 65536  # of a multiprocessor, on all of them
FUNCTION = re.compile(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", re.S)
NUMBERS = {
    "registers": r"Used (\d+) registers",
    "spilled_bytes": r"(\d+) bytes spill stores",
    "stack_bytes": r"(\d+) bytes stack frame",
    "static_shared": r"(\d+) bytes smem",
}


class Listing(Device):
    """A device that notes what it would compile and launch. Arrays hold NaNs."""

    def __init__(self):
        super().__init__(stand_in)
        self.launches = {}  # (file, macros) -> {entry point: [threads, dynamic shared memory], the largest}

    def kernel(self, file, name, shared=0, **macros):
        """Nothing is compiled."""
        macros = tuple((macro, self._macro(value)) for macro, value in sorted(macros.items()))
        return Kernel((file, macros, name), shared)

    def launch(self, kernel, grid, block, *args):
        """Nothing is launched."""
        file, macros, name = kernel.function
        for x in args:
            self._argument(x)
        largest = self.launches.setdefault((file, macros), {}).setdefault(name, [0, 0])
        threads = int(np.prod(block))
        largest[:] = max(largest[0], threads), max(largest[1], kernel.shared)

    def matmul(self, a, b, transpose_a=False, transpose_b=False, out=None, out_dtype=None, accumulate=False, alpha=1.0):
        """Nothing is multiplied."""
        shape = a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1]
        return self.empty(shape, out_dtype or a.dtype) if out is None else out


def config_08b():
    """Qwen3.5-0.8B with one layer of each kind and a small vocabulary."""
    return replace(
        small_config(layer_types=(DELTA, ATTENTION), tied=True),
        vocab_size=4100,
        hidden_size=1024,
        intermediate_size=3584,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        mrope_section=(11, 11, 10),
    )


@lru_cache
def dry_run() -> dict:
    """Listing.launches of both dtypes."""
    device, config = Listing(), config_08b()
    for dtype in ("float32", "bfloat16"):
        backend = cuda.backend_of(device, "dry", "none")
        backend.run_step = None
        shapes = {name: spec.shape for name, spec in expected_tensors(config).items()}
        wide = {name: -np.ones(shape, np.float32) for name, shape in shapes.items()}
        model = Qwen35(config, Weights(config, wide, backend.dtypes[dtype], backend))
        ids = np.arange(70)[None] % config.vocab_size
        model.loss_and_grads(ids, ids, cu_seqlens=np.array([0, 3, 70]))
        _, state = model.prefill(ids[0])
        model.step(3, state)
        p, g, m, v = (device.empty((16, 1024), np.float32) for _ in range(4))
        options = dict(t=1, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        backend.adamw_update(p, g, m, v, **options)
        backend.clipped_adamw_update(p, g, m, v, limit=1.0, **options)
        for d_k, d_v in HEADS:
            q, k, v = (device.empty((1, 70, 2, d), backend.dtypes[dtype]) for d in (d_k, d_k, d_v))
            g, beta = (device.empty((1, 70, 2), np.float32) for _ in range(2))
            o, _, cache = backend.gated_delta_rule_forward(q, k, v, g=g, beta=beta)
            backend.gated_delta_rule_backward(o, None, cache)
        logits = device.empty((3, config.vocab_size), backend.dtypes[dtype])
        _, cache = backend.cross_entropy_forward(logits, ids[0, :3])
        backend.cross_entropy_backward(1.0, cache)
        for width in WIDTHS:
            x = device.empty((3, width), backend.dtypes[dtype])
            y, cache = backend.rms_norm_forward(x, device.empty(width, np.float32), 1e-6)
            backend.rms_norm_backward(y, cache)
        for type in cuda.quants.KERNELS:
            size = quants.stored_bytes(type, (2, 1024))
            backend.stored.dequantize(np.zeros(size, np.uint8), type, (2, 1024), backend.dtypes[dtype])
    assert set(config.layer_types) == set(MIXERS)
    return device.launches


def compiled(file: str, macros: tuple, architecture: int) -> dict:
    """Entry point -> numbers of NUMBERS, from NVRTC's log. Raises with the log for what does not compile."""
    from cupy.cuda import nvrtc

    options = [f"-I{device_module.KERNELS}", f"-I{headers()}", *(f"-D{macro}={value}" for macro, value in macros)]
    options += ["-std=c++17", "-ftz=true", f"-arch=sm_{architecture}", "--ptxas-options=-v"]
    program = nvrtc.createProgram(device_module.source(file), f"{file}.cu", [], [])
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        raise AssertionError(f"{file}.cu for sm_{architecture}: {nvrtc.getProgramLog(program)}") from None
    log = nvrtc.getProgramLog(program)
    return {
        name: {what: int((re.findall(pattern, text) or ["0"])[0]) for what, pattern in NUMBERS.items()}
        for name, text in FUNCTION.findall(log)
    }


def headers() -> Path:
    """The folder of cuda_bf16.h, of the CUDA wheels."""
    import nvidia

    return next(path.parent for root in nvidia.__path__ for path in Path(root).glob("**/cuda_bf16.h"))


def version() -> str:
    """NVRTC's."""
    from cupy.cuda import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def key(file, name, macros):
    """A row of the table."""
    return " ".join([f"{file}.cu", name, *(f"{macro}={value}" for macro, value in macros)])


def measure(architectures=tuple(ARCHITECTURES)) -> dict:
    """The table: key -> threads, dynamic_shared, and for each architecture the numbers of NUMBERS."""
    rows = {}
    for (file, macros), entries in sorted(dry_run().items()):
        for architecture in architectures:
            numbers = compiled(file, macros, architecture)
            for name, (threads, shared) in sorted(entries.items()):
                row = rows.setdefault(key(file, name, macros), {"threads": threads, "dynamic_shared": shared})
                row[f"sm_{architecture}"] = numbers[name]
    return rows


def problems(rows: dict) -> list:
    """Spills, and launches that no card of the architecture can run; a line each."""
    found = []
    for name, row in rows.items():
        for architecture, limit in ARCHITECTURES.items():
            numbers = row.get(f"sm_{architecture}")
            if numbers is None:
                continue
            where = f"{name} on sm_{architecture}"
            if numbers["spilled_bytes"] or numbers["stack_bytes"]:
                found.append(f"{where} spills {numbers['spilled_bytes']} bytes, stack {numbers['stack_bytes']} bytes")
            shared = row["dynamic_shared"] + numbers["static_shared"]
            if shared > limit * 1024:
                found.append(f"{where} needs {shared} bytes of shared memory, a block has {limit * 1024}")
            if row["threads"] * numbers["registers"] > REGISTERS:
                found.append(
                    f"{where} needs {row['threads']} x {numbers['registers']} registers, there are {REGISTERS}"
                )
    return found


def write(rows: dict) -> None:
    """The table as a file, a line for each kernel: threads, dynamic shared memory, NUMBERS for each architecture."""
    lines = []
    for name, row in rows.items():
        numbers = [list(row[f"sm_{architecture}"].values()) for architecture in ARCHITECTURES]
        lines.append(f" {json.dumps(name)}: {json.dumps([row['threads'], row['dynamic_shared'], numbers])}")
    head = [("nvrtc", version()), ("architectures", list(ARCHITECTURES)), ("numbers", list(NUMBERS))]
    text = ",\n".join([*(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head), *lines])
    TABLE.write_text(f"{{\n{text}\n}}\n")


def read() -> tuple[str, dict]:
    """(version of NVRTC, the table as measure returns it) of the file."""
    table = json.loads(TABLE.read_text())
    nvrtc, architectures, names = (table.pop(key) for key in ("nvrtc", "architectures", "numbers"))
    return nvrtc, {
        kernel: {"threads": threads, "dynamic_shared": shared}
        | {f"sm_{architecture}": dict(zip(names, n)) for architecture, n in zip(architectures, numbers, strict=True)}
        for kernel, (threads, shared, numbers) in table.items()
    }


if __name__ == "__main__":
    rows = measure()
    write(rows)
    print(*problems(rows), sep="\n")
