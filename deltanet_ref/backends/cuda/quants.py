"""Tensors as a GGUF file stores them, on the device: kernels/dequantize.cu decodes them before each product.

A tensor's `raw` is a NumPy array, which is uploaded at each use, or an array of the device, which is not (`resident`).
The types of KERNELS are decoded on the device; the others that formats.quants knows, on the host.
"""

import functools
import math
from types import SimpleNamespace

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as Type

from deltanet_ref.errors import InputError
from deltanet_ref.formats import quants

KERNELS = {type: f"dequantize_{type.name.lower()}" for type in (Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.Q5_K, Type.Q6_K)}
KERNELS |= {type: f"dequantize_{type.name.lower()}" for type in (Type.F16, Type.BF16, Type.F32)}
THREADS, WIDTH = 256, 8  # of a block; values that a thread decodes
FEW_ROWS = 0  # a decoded copy that is kept is never slower: each product decodes the whole tensor
PANEL = 1 << 27  # decoded values of a tensor that exist at one time: 256 MiB in bfloat16


def stored(device):
    """The capability `stored` of backends/interface.py, on this device."""
    return SimpleNamespace(
        few_rows=FEW_ROWS,
        decodes=decodes,
        resident=functools.partial(resident, device),
        dequantize=functools.partial(dequantize, device),
        linear_forward=functools.partial(stored_linear_forward, device),
        linear_backward_input=functools.partial(stored_linear_backward_input, device),
    )


def resident(device, tensor):
    """The same tensor, a named tuple with raw, with its bytes on the device."""
    return tensor._replace(raw=_bytes(device, tensor.raw))


def decodes(type, shape):
    """Whether kernels decode tensors of this type and shape."""
    return type in KERNELS and bool(shape) and shape[-1] % GGML_QUANT_SIZES[type][0] == 0


def dequantize(device, raw, type, shape, dtype=np.float32):
    """The tensor's values on the device: in float32 those of formats.quants.dequantize to the bit; in bfloat16 the
    same, rounded once. Raises InputError as formats.quants.dequantize, and for a dtype that is neither nor float64.
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.dtype("f4"), np.dtype("f8"), device.bf16):
        raise InputError(f"tensors are decoded to float32, bfloat16 or float64, not {dtype}")
    if not decodes(type, shape) or raw.nbytes != quants.stored_bytes(type, shape) or dtype == np.dtype("f8"):
        host = raw.get() if isinstance(raw, device.xp.ndarray) else raw
        wide = np.float64 if dtype == np.float64 else np.float32
        with np.errstate(invalid="ignore"):  # any file may hold NaN
            return device.upload(quants.dequantize(host, type, shape, wide).astype(dtype, copy=False))
    y, n = device.empty(shape, dtype), math.prod(shape)
    kernel = device.kernel("dequantize", KERNELS[type], REAL=dtype, THREADS=THREADS)
    device.launch(kernel, -(-n // (WIDTH * THREADS)), THREADS, _bytes(device, raw), y, np.int64(n))
    return y


def stored_linear_forward(device, x, tensors):
    """y = x w^T for several stored tensors: x (..., in) -> list of y (..., out), in the dtype of x.

    tensors: each with raw, type and shape (out, in), for which `decodes` must hold. Raises InputError for another dtype
    or width of x.
    """
    for tensor in tensors:
        _check(device, x, tensor, axis=1)
    rows = device.contiguous(x).reshape(-1, x.shape[-1])
    results = []
    for tensor in tensors:
        y = device.empty((len(rows), tensor.shape[0]), x.dtype)
        for part, w in _panels(device, tensor, x.dtype):
            device.matmul(rows, w, transpose_b=True, out=y[:, part])
        results.append(y.reshape(*x.shape[:-1], tensor.shape[0]))
    return results


def stored_linear_backward_input(device, dy, tensor):
    """dx = dy w for a stored tensor: dy (..., out) -> dx (..., in), in the dtype of dy."""
    _check(device, dy, tensor, axis=0)
    rows = device.contiguous(dy).reshape(-1, dy.shape[-1])
    whole = _rows_of_a_panel(tensor) >= tensor.shape[0]
    dx = device.empty((len(rows), tensor.shape[1]), dy.dtype if whole else np.float32)
    for part, w in _panels(device, tensor, dy.dtype):
        device.matmul(rows[:, part], w, out=dx, accumulate=part.start > 0)
    return dx.astype(dy.dtype, copy=False).reshape(*dy.shape[:-1], tensor.shape[1])


def _panels(device, tensor, dtype):
    """Iterator over (slice of rows, their values): together all of a stored tensor (out, in)."""
    n, width = tensor.shape
    step = _rows_of_a_panel(tensor)
    raw = _bytes(device, tensor.raw)
    size = raw.nbytes // max(n, 1)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        bytes_of_part = raw[part.start * size : part.stop * size]
        yield part, dequantize(device, bytes_of_part, tensor.type, (part.stop - part.start, width), dtype)


def _rows_of_a_panel(tensor):
    return max(1, PANEL // tensor.shape[1])


def _bytes(device, raw):
    """Stored bytes on the device."""
    return raw if isinstance(raw, device.xp.ndarray) else device.upload(raw, np.uint8)


def _check(device, x, tensor, axis):
    if x.dtype not in (np.dtype("f4"), device.bf16) or x.shape[-1] != tensor.shape[axis]:
        raise InputError(
            f"x is {x.dtype} {x.shape} and the stored tensor {tensor.shape}; x must be float32 or bfloat16 with "
            f"{tensor.shape[axis]} features"
        )
