"""Stored tensor bytes <-> arrays for every type that the gguf package decodes, and whether they are all finite."""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from deltanet_ref.errors import InputError
from deltanet_ref.formats import quantizers

PLAIN = {
    GGMLQuantizationType.F64: np.dtype("<f8"),
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
}
TYPES = tuple(
    GGMLQuantizationType[name]
    for name in """
    F64 F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0 MXFP4 NVFP4
    IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS""".split()
)  # dequantize reads these
QUANTIZABLE = tuple(
    GGMLQuantizationType[name]
    for name in """
    F64 F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K TQ1_0 TQ2_0 MXFP4""".split()
)  # quantize writes these
_OURS = {
    GGMLQuantizationType[f.__name__.upper()]: f
    for f in (quantizers.q8_0, quantizers.q4_0, quantizers.q4_k, quantizers.q5_k, quantizers.q6_k)
}
PIECE = 1 << 18  # values that one thread quantises at a time: its temporaries stay in the cache
# Byte offsets of the float16 scales within a block (ggml-common.h). Whatever its other bytes, a block decodes to finite
# values exactly if these are finite: 65504 times the largest integers is far below float32's limit, and infinity times
# zero is NaN. NVFP4's 8-bit scales are always finite. MXFP4 and IQ1_M have scales of another form.
SCALES = {
    GGMLQuantizationType[name]: offsets
    for offsets, names in {
        (0,): "Q4_0 Q5_0 Q8_0 IQ1_S IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS",
        (0, 2): "Q4_1 Q5_1 Q4_K Q5_K",
        (80, 82): "Q2_K",
        (108,): "Q3_K",
        (208,): "Q6_K",
        (52,): "TQ1_0",
        (64,): "TQ2_0",
        (): "NVFP4",
    }.items()
    for name in names.split()
}
MXFP4_OVERFLOWS = 253  # the least power-of-two scale byte with which a 4-bit value, 12 at most, can exceed float32
HALF_INFINITY, BFLOAT_INFINITY = 0x7C00, 0x7F80
SCANNED, DECODED = 1 << 20, 1 << 16  # stored bytes examined at a time, as bits or decoded: they stay in the cache


def stored_bytes(type: GGMLQuantizationType, shape: tuple) -> int:
    """Bytes of a tensor of this type and shape. Raises InputError unless its rows are whole blocks."""
    block, size = GGML_QUANT_SIZES[type]
    width = math.prod(shape[-1:])
    if width % block:
        raise InputError(f"rows of {width} values are not whole {type.name} blocks of {block}: use another type")
    return math.prod(shape) // block * size


def dequantize(raw: np.ndarray, type: GGMLQuantizationType, shape: tuple, dtype=np.float32) -> np.ndarray:
    """Decodes raw, uint8 (stored_bytes(type, shape),), to an array of `shape` and dtype float32 or float64.

    The float32 values are ggml's bit for bit; float64 only widens them. F32 as float32 (F64 as float64) is a view of
    raw. Raises InputError for a type outside TYPES, or if the number of bytes does not match the shape.
    """
    if type not in TYPES:
        raise InputError(_cannot_read(type))
    if raw.nbytes != stored_bytes(type, shape):
        raise InputError(f"a {type.name} tensor {shape} has {stored_bytes(type, shape)} bytes, {raw.nbytes} were given")
    raw = np.ascontiguousarray(raw)
    with np.errstate(over="ignore", invalid="ignore"):  # any file may hold inf and NaN
        if type in PLAIN:
            values = raw.reshape(-1).view(PLAIN[type])
        else:
            values = quants.dequantize(raw.reshape(math.prod(shape[:-1]), -1), type)
        return values.reshape(shape).astype(dtype, copy=False)


def quantize(values: np.ndarray, type: GGMLQuantizationType) -> np.ndarray:
    """Encodes an array of floats in `type` -> uint8 (stored_bytes(type, values.shape),).

    Raises InputError for a type outside QUANTIZABLE, rows that are not whole blocks, or values that the type cannot
    represent.
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
            stored = np.concatenate(
                list(pool.map(_OURS[type], (blocks[i : i + at_once] for i in range(0, len(blocks), at_once))))
            )
    else:
        stored = quants.quantize(np.ascontiguousarray(values, np.float32), type)
    return stored.reshape(-1).view(np.uint8)


def finite(values: np.ndarray) -> bool:
    """Whether a float16, float32 or float64 array of any shape holds neither NaN nor infinity."""
    signed = np.dtype(f"i{values.dtype.itemsize}")
    infinity = int(np.array(np.inf, values.dtype).view(signed))
    bits = np.ravel(values, order="K").view(signed)
    return all(_finite(piece, infinity) for piece in _pieces(bits, SCANNED))


def stored_finite(raw: np.ndarray, type: GGMLQuantizationType) -> bool:
    """Whether every value that raw, uint8 in whole blocks, stands for is finite.

    Plain floats and scales are examined as bits, without decoding; only IQ1_M, and MXFP4 blocks with scales near
    float32's limit, are decoded. Raises InputError for a type outside TYPES.
    """
    if type not in TYPES:
        raise InputError(_cannot_read(type))
    raw = np.ascontiguousarray(raw).reshape(-1)
    if type in PLAIN:
        return finite(raw.view(PLAIN[type]))
    if type == GGMLQuantizationType.BF16:
        return all(_finite(piece, BFLOAT_INFINITY) for piece in _pieces(raw.view("<i2"), SCANNED))
    block, size = GGML_QUANT_SIZES[type]
    blocks = raw.reshape(-1, size)
    if type in SCALES:
        return all(
            _finite(piece[:, at : at + 2].view("<i2")[:, 0], HALF_INFINITY)
            for piece in _pieces(blocks, SCANNED)
            for at in SCALES[type]
        )
    if type == GGMLQuantizationType.MXFP4:
        blocks = blocks[blocks[:, 0] >= MXFP4_OVERFLOWS]
    return all(finite(dequantize(piece, type, (len(piece), block))) for piece in _pieces(blocks, DECODED))


def _finite(bits: np.ndarray, infinity: int) -> bool:
    """Whether no float is infinite or NaN. bits: the floats (n,) as signed integers, n >= 1; infinity: its bits.

    The bits of NaN and infinity, apart from the sign, are the largest there are. Among signed integers the largest are
    those of positive floats, among unsigned ones those of negative floats: two maxima, which NumPy takes at the speed
    of memory.
    """
    bits = np.ascontiguousarray(bits)
    unsigned = bits.view(f"u{bits.itemsize}")
    return bool(bits.max() < infinity and unsigned.max() < infinity + (1 << 8 * bits.itemsize - 1))


def _pieces(rows: np.ndarray, nbytes: int) -> Iterator[np.ndarray]:
    """rows[0:n], rows[n:2n], ...: of nbytes each, or a single row if that is larger."""
    step = max(1, nbytes // max(1, rows.strides[0]))  # the stride of no rows is 0
    return (rows[i : i + step] for i in range(0, len(rows), step))


def rows(raw: np.ndarray, type: GGMLQuantizationType, shape: tuple, ids) -> np.ndarray:
    """The bytes of rows `ids` (int array or slice) of a tensor of shape (n, D): those of a tensor (len(ids), D)."""
    return raw.reshape(shape[0], -1)[ids].reshape(-1)


def _cannot_read(type):
    return f"tensors of type {type.name} cannot be read: convert the model to one of {_names(TYPES)}"


def _names(types):
    return " ".join(t.name for t in types)
