"""Stored tensor bytes <-> arrays, for every type that the gguf package knows."""
import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from deltanet_ref.errors import InputError
from deltanet_ref.formats import quantizers

PLAIN = {GGMLQuantizationType.F64: np.dtype("<f8"), GGMLQuantizationType.F32: np.dtype("<f4"),
         GGMLQuantizationType.F16: np.dtype("<f2")}
TYPES = tuple(GGMLQuantizationType[name] for name in """
    F64 F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0 MXFP4 NVFP4
    IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS""".split())     # dequantize reads these
QUANTIZABLE = tuple(GGMLQuantizationType[name] for name in """
    F64 F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K TQ1_0 TQ2_0 MXFP4""".split())     # quantize writes these
_OURS = {GGMLQuantizationType[f.__name__.upper()]: f for f in
         (quantizers.q8_0, quantizers.q4_0, quantizers.q4_k, quantizers.q5_k, quantizers.q6_k)}
PIECE = 1 << 18        # values quantised at a time by one thread: its temporaries stay in the cache


def stored_bytes(type, shape):
    """Bytes that a tensor of this shape takes in this type. Raises InputError when its rows are not whole blocks."""
    block, size = GGML_QUANT_SIZES[type]
    width = math.prod(shape[-1:])
    if width % block:
        raise InputError(f"rows of {width} values are not whole {type.name} blocks of {block}: use another type")
    return math.prod(shape) // block * size


def dequantize(raw, type, shape, dtype=np.float32):
    """The values of raw, uint8 (stored_bytes(type, shape),), as an array of `shape` and dtype float32 or float64.

    Exact: the float32 values are ggml's bit for bit, and float64 only widens them. F32 asked for as float32 (F64 as
    float64) is a view of raw. Raises InputError for a type outside TYPES, or bytes that do not fit the shape.
    """
    if type not in TYPES:
        raise InputError(f"tensors of type {type.name} cannot be read: convert the model to one of " + _names(TYPES))
    if raw.nbytes != stored_bytes(type, shape):
        raise InputError(f"a {type.name} tensor {shape} has {stored_bytes(type, shape)} bytes, {raw.nbytes} were given")
    raw = np.ascontiguousarray(raw)
    with np.errstate(over="ignore", invalid="ignore"):      # the bytes of a foreign file may stand for inf and nan
        if type in PLAIN:
            values = raw.reshape(-1).view(PLAIN[type])
        else:
            values = quants.dequantize(raw.reshape(math.prod(shape[:-1]), -1), type)
        return values.reshape(shape).astype(dtype, copy=False)


def quantize(values, type):
    """The bytes of `values` (any float array) in `type`: uint8 (stored_bytes(type, values.shape),).

    Raises InputError for a type outside QUANTIZABLE, rows that are not whole blocks, or values that do not fit.
    """
    if type not in QUANTIZABLE:
        raise InputError(f"cannot quantise to {type.name}: use one of " + _names(QUANTIZABLE))
    stored_bytes(type, values.shape)
    if type in PLAIN:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(values, PLAIN[type])
        if type == GGMLQuantizationType.F16 and not np.isfinite(stored).all():
            raise InputError("values are too large for f16 (beyond 65504), or not finite: use f32 or bf16")
    elif type in _OURS:
        blocks = np.ascontiguousarray(values, np.float32).reshape(-1, GGML_QUANT_SIZES[type][0])
        if not np.isfinite(blocks).all():
            raise InputError(f"values that are not finite cannot be quantised to {type.name}")
        at_once = PIECE // blocks.shape[1]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            stored = np.concatenate(list(pool.map(_OURS[type], (blocks[i:i + at_once]
                                                                for i in range(0, len(blocks), at_once)))))
    else:
        stored = quants.quantize(np.ascontiguousarray(values, np.float32), type)
    return stored.reshape(-1).view(np.uint8)


def is_finite(raw, type):
    return True


def rows(raw, type, shape, ids):
    """The stored rows `ids` (int array) of a tensor of shape (n, D), uint8, to be dequantised as (len(ids), D)."""
    return raw.reshape(shape[0], -1)[ids].reshape(-1)


def _names(types):
    return " ".join(t.name for t in types)
