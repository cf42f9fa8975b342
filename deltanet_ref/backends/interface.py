"""THE contract of a backend: every name, its signature, and what is done without an optional capability.

A backend is a module (deltanet_ref.ops, backends.numba_cpu) or another object with all names of Backend. The operators
compute what their namesakes in ops define, for arrays of the module `xp`; their docstrings in ops give shapes, returns
and errors. With bfloat16 the state and gates of the delta rule, statistics, everything that belongs to vectors, and
gradients of weights are float32.
Backward takes the cache of its own forward and returns new arrays. Token ids, labels, cu_seqlens and positions are
NumPy arrays on the host in every backend.

An optional capability that a backend lacks has the value None. To add a backend: write the module, add it to BACKENDS,
and let tests/test_backend_interface.py hold it to this file.
"""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import numpy as np

Array = Any  # an array of xp


class StoredTensors(Protocol):
    """Optional capability `stored`: tensors in the types of a GGUF file, on the backend.

    A tensor is anything with raw (its bytes, a NumPy array), type (gguf.GGMLQuantizationType) and shape, rows first.
    Results have the dtype of x or dy.
    """

    few_rows: int  # up to this many rows of x, the stored form is faster than a decoded copy that is kept

    def decodes(type, shape) -> bool: ...  # whether the products take such a tensor
    def resident(tensor): ...  # the same tensor with raw where the products read it: on the device
    def dequantize(raw, type, shape, dtype=np.float32) -> Array: ...  # any type that formats.quants decodes
    def embedding_forward(tokens, tensor, dtype): ...  # the rows of a tensor by token, as ops.embedding_forward
    def linear_forward(x: Array, tensors: list) -> list: ...  # x w^T for each tensor w
    def linear_backward_input(dy: Array, tensor) -> Array: ...  # dy w


class Backend(Protocol):
    """The names of a backend module; the functions are signatures."""

    # ---- arrays
    name: str  # "numpy", "numba", "cuda"
    xp: ModuleType  # NumPy's interface to the arrays that the operators take and return: numpy, cupy

    dtypes: dict  # name -> np.dtype, what a model can be computed in. "bfloat16": matrices and activations

    def to_host(x: Array) -> np.ndarray: ...  # a NumPy array, without a copy if it is one; bfloat16 as float32

    # ---- optional capabilities, and what the model does where they are None
    device: str | None  # the device in words, for messages and reports. None: the CPU
    set_threads: Callable | None  # n -> the number so far; the kernels' threads. None: only the BLAS is limited
    stored: StoredTensors | None  # None: formats.quants decodes a tensor, linear_* multiply it
    delta_layer_step: Callable | None  # one token of a delta layer between projections. None: the operators
    memory_of: Callable | None  # what a step needs and could have. None: not known
    held_memory: Callable | None  # the most that was held on the device. None: the memory is the process's
    run_step: Callable | None  # runs a training step, again and again. None: the step is called
    clipped_adamw_update: Callable | None  # norm, clipping and AdamW of one array. None: train.adamw computes them

    # ---- operators
    def adamw_update(p, g, m, v, *, t, lr, betas, eps, weight_decay): ...
    def causal_conv1d_forward(x, w, *, state=None, cu_seqlens=None): ...
    def causal_conv1d_backward(dy, dstate_end, cache, need_dw=True): ...
    def cross_entropy_forward(logits, labels, *, ignore_index=-100, count=None): ...
    def cross_entropy_backward(dloss, cache): ...
    def decay_gate_forward(a, b, A_log, dt_bias): ...
    def decay_gate_backward(dg, dbeta, cache, need_dw=True): ...
    def embedding_forward(tokens, w): ...
    def embedding_backward(dx, tokens, vocab_size): ...
    def gated_delta_rule_forward(
        q, k, v, *, g, beta, S0=None, scale=None, head_order="grouped", cu_seqlens=None, chunk_size=64
    ): ...
    def gated_delta_rule_backward(do, dS_end, cache): ...
    def gated_delta_rule_step(q, k, v, *, g, beta, S, scale=None, head_order="grouped"): ...
    def gated_rms_norm_forward(x, z, w, eps): ...
    def gated_rms_norm_backward(dy, cache, need_dw=True): ...
    def l2_norm_forward(x, eps=1e-6): ...
    def l2_norm_backward(dy, cache): ...
    def linear_forward(x, w): ...
    def linear_backward_input(dy, w): ...
    def linear_backward_weight(dy, x): ...
    def linear_cross_entropy_forward(x, w, labels, *, ignore_index=-100, count=None, need_gradient=True): ...
    def linear_cross_entropy_backward(dloss, cache, need_dw=True): ...
    def lora_forward(ys, x, updates): ...
    def lora_backward(dys, cache, need_dx=True, trained=None): ...
    def rms_norm_forward(x, w, eps): ...
    def rms_norm_backward(dy, cache, need_dw=True): ...
    def rope_tables(positions, rotary_dim, theta, sections=None, dtype=np.float32): ...
    def rope_forward(x, cos, sin): ...
    def rope_backward(dy, cos, sin): ...
    def sigmoid_gate_forward(o, gate): ...
    def sigmoid_gate_backward(dy, cache): ...
    def softmax_attention_forward(q, k, v, *, scale=None, cu_seqlens=None): ...
    def softmax_attention_backward(do, cache): ...
    def swiglu_forward(gate, up): ...
    def swiglu_backward(dy, cache): ...


def _delta_layer_step(qkv, z, b, a, conv_state, S, *, conv, decay, dt_bias, norm, eps, head_order):
    """o (N, H_v, d_v), conv_state, S after one token of each of N sequences: steps 2 .. 6 of
    model.layers.gated_deltanet.

    qkv (N, 2 H_k d_k + H_v d_v); z (N, H_v d_v); b, a (N, H_v); conv_state (N, K - 1, channels); S (N, H_v, d_k, d_v)
    conv (channels, K); decay = -exp(A_log), dt_bias (H_v,); norm (d_v,); eps of the norm
    """


def _set_threads(n): ...


def _memory_of(step):
    """(the most bytes that step() needs at one time, the bytes that are free for it)."""


def _held_memory():
    """The bytes that this process has held on the device at one time, at most."""


def _run_step(key, inputs, other, step):
    """step(**inputs), which returns tuples and lists of arrays and of dicts of them; possibly recorded and replayed.

    key     hashable: all that the step's work depends on besides the numbers in inputs
    inputs  name -> integer NumPy array
    other   other inputs of this key, to find out what depends on inputs
    step    reads nothing back from the device
    """


def _clipped_adamw_update(p, g, m, v, *, t, lr, betas, eps, weight_decay, limit):
    """|g|, a float; adamw_update with min(1, limit / (|g| + 1e-6)) g, but nothing is changed if |g| is not finite.

    limit  None: g is not clipped
    """


OPTIONAL = {
    "device": str,
    "set_threads": _set_threads,
    "stored": StoredTensors,
    "delta_layer_step": _delta_layer_step,
    "memory_of": _memory_of,
    "held_memory": _held_memory,
    "run_step": _run_step,
    "clipped_adamw_update": _clipped_adamw_update,
}
OPERATORS = tuple(
    name for name, member in vars(Backend).items() if inspect.isfunction(member) and not name.startswith("_")
)  # to_host is one of them


def violations(backend) -> list:
    """Everything in which a backend departs from the contract, a line each; empty when it keeps it."""
    found = [f"{name} is missing" for name in (*Backend.__annotations__, *OPERATORS) if not hasattr(backend, name)]
    if found:
        return found
    for name in OPERATORS:
        found += _signature_violations(name, getattr(backend, name), vars(Backend)[name])
    for name, wanted in OPTIONAL.items():
        capability = getattr(backend, name)
        if capability is None:
            continue
        if wanted is StoredTensors:
            members = {n: m for n, m in vars(StoredTensors).items() if inspect.isfunction(m) and not n.startswith("_")}
            found += [f"stored.{n} is missing" for n in ("few_rows", *members) if not hasattr(capability, n)]
            for n, member in members.items():
                if hasattr(capability, n):
                    found += _signature_violations(f"stored.{n}", getattr(capability, n), member)
        elif inspect.isfunction(wanted):
            found += _signature_violations(name, capability, wanted)
        elif not isinstance(capability, wanted):
            found.append(f"{name} is {capability!r}: it must be a {wanted.__name__} or None")
    return found


def _signature_violations(name, function, wanted):
    """[] when the parameters have the names, kinds, order and defaults of the contract."""
    try:
        theirs = inspect.signature(function)
    except (TypeError, ValueError):
        return [f"{name} is {function!r}: it must be a function"]
    ours = inspect.signature(wanted)
    if [(p.name, p.kind, p.default) for p in theirs.parameters.values()] == [
        (p.name, p.kind, p.default) for p in ours.parameters.values()
    ]:
        return []
    return [f"{name}{theirs} must be {name}{ours.replace(return_annotation=inspect.Signature.empty)}"]
