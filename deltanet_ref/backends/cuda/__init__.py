"""The operators on an NVIDIA card, under the names of deltanet_ref.ops: kernels in CUDA C++, launched by CuPy.

Arrays are CuPy's, float32 or bfloat16. The state and gates of the delta rule, statistics and log-sum-exps, weights of
norms, convolutions and gates, and gradients of weights are float32 in both cases; products accumulate in float32.
Results are the same from run to run: no kernel adds by atomics.

    device, blas        arrays, kernels and launches; matrix products by cuBLAS
    kernels/            the CUDA sources
    the other modules   operators, named as in ops: each takes the Device first and then the arguments of the interface
    stand_in, emulator  CuPy and CUDA on the CPU, for the tests and for backend="cuda-emulated"
"""

import functools
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np

from deltanet_ref.backends import has_card
from deltanet_ref.backends.cuda import quants
from deltanet_ref.backends.cuda.adamw import clipped_adamw_update
from deltanet_ref.backends.cuda.arena import peak, recording
from deltanet_ref.backends.cuda.device import Device
from deltanet_ref.backends.cuda.graph import Steps
from deltanet_ref.backends.cuda.stored_embedding import stored_embedding_forward
from deltanet_ref.errors import InputError

# module -> the operators in it
MODULES = {
    "adamw": "adamw_update",
    "causal_conv1d": "causal_conv1d_forward causal_conv1d_backward",
    "cross_entropy": "cross_entropy_forward cross_entropy_backward linear_cross_entropy_forward "
    "linear_cross_entropy_backward",
    "delta_rule": "gated_delta_rule_forward gated_delta_rule_backward gated_delta_rule_step",
    "embedding": "embedding_forward embedding_backward",
    "gates": "decay_gate_forward decay_gate_backward sigmoid_gate_forward sigmoid_gate_backward swiglu_forward "
    "swiglu_backward",
    "linear": "linear_forward linear_backward_input linear_backward_weight",
    "lora_linear": "lora_forward lora_backward",
    "norms": "rms_norm_forward rms_norm_backward gated_rms_norm_forward gated_rms_norm_backward l2_norm_forward "
    "l2_norm_backward",
    "rope": "rope_tables rope_forward rope_backward",
    "softmax_attention": "softmax_attention_forward softmax_attention_backward",
}
INSTALL = "pip install 'deltanet_ref[cuda13]' ('deltanet_ref[cuda12]' for a driver older than 580)"
NEEDED = ("cupy", "ml_dtypes")


def backend_of(device: Device, name: str, description: str) -> SimpleNamespace:
    """A backend (backends/interface.py) that computes on this device. description: the device in words."""
    functions = {}
    for module, names in MODULES.items():
        module = import_module(f"{__name__}.{module}")
        functions |= {operator: functools.partial(getattr(module, operator), device) for operator in names.split()}
    steps = Steps(device)
    return SimpleNamespace(
        **functions,
        to_host=functools.partial(to_host, device),
        name=name,
        xp=device.xp,
        dtypes={"float32": np.dtype(np.float32), "bfloat16": device.bf16},
        device=description,
        set_threads=None,
        stored=stored(device),
        delta_layer_step=None,
        memory_of=functools.partial(memory_of, device, steps),
        held_memory=device.held_memory,
        run_step=steps.run,
        clipped_adamw_update=functools.partial(clipped_adamw_update, device),
    )


def stored(device):
    """The capability of this name, complete."""
    capability = quants.stored(device)
    capability.embedding_forward = functools.partial(stored_embedding_forward, device)
    return capability


def to_host(device, x):
    """A NumPy array; bfloat16 becomes float32, which NumPy's functions know."""
    host = x.get() if isinstance(x, device.xp.ndarray) else np.asarray(x)
    return host.astype(np.float32) if host.dtype == device.bf16 else host


def memory_of(device, steps, step):
    """(the most bytes that step() needs at one time, the bytes that are free for it). No graph stands for the step."""
    free, graphs = device.free_memory(), steps.graphs
    steps.graphs = False
    try:
        with recording(device.xp) as recorder:
            step()
    finally:
        steps.graphs = graphs
    return peak(recorder.allocations), free


@functools.cache
def card() -> SimpleNamespace:
    """The backend "cuda", on the current card. Raises InputError that names what is missing and how to install it."""
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise InputError(f"backend 'cuda' needs packages that are not installed, {' and '.join(missing)}: {INSTALL}")
    if not has_card():
        raise InputError(
            "backend 'cuda' finds no card: NVIDIA's driver (libcuda.so.1) is not installed or sees none; use "
            "backend='numba'"
        )
    import cupy

    try:
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise InputError(f"backend 'cuda' cannot use the card: {error}; use backend='numba'") from None
    version = f"sm_{properties['major']}{properties['minor']}"
    if properties["major"] < 8:
        raise InputError(
            f"backend 'cuda' needs compute capability 8.0 (Ampere) or later, this card is {version}: use "
            "backend='numba'"
        )
    memory = properties["totalGlobalMem"] / 2**30
    return backend_of(Device(cupy), "cuda", f"{properties['name'].decode()} ({version}, {memory:.0f} GiB)")


@functools.cache
def emulated() -> SimpleNamespace:
    """The backend "cuda-emulated": the same code and kernels on the CPU, slow. Raises InputError without ml_dtypes."""
    if find_spec("ml_dtypes") is None:
        raise InputError("backend 'cuda-emulated' needs ml_dtypes, which is not installed: pip install ml_dtypes")
    from deltanet_ref.backends.cuda import stand_in

    return backend_of(Device(stand_in), "cuda-emulated", "a GPU emulated on the CPU, for tests")
