"""Tensors as a GGUF file stores them: decoded to float32, and multiplied without decoding the whole tensor.

A row is stored as blocks of 32 or 256 values. LAYOUTS describes each block (github.com/ggml-org/ggml, the block_*
structs of src/ggml-common.h) and two functions that decode it, as value = (d * scale) * number - m * minimum: `numbers`
gives 32 of them, `factors` the scales and minima of all groups. Values are ggml's to the bit: float32 in its order,
nothing contracted. Types that are not in LAYOUTS (IQ1 to IQ3, TQ, MXFP4, NVFP4), and 16-bit rows that are not whole
blocks of 32, fall back to formats.quants, at the (slow) speed of the gguf package; F32 and F64 need no decoding.

Products with up to FEW rows read each stored byte once. With one row of x nothing is decoded: numbers are multiplied
with x, minima with sums of x. In blocks of 256 this uses integers, x being split into two of 16 bits each, to 2^-31 of
the largest x of the block: as exact as float32, and in half the instructions. With more rows each row of the tensor is
decoded in the first-level cache. Beyond FEW rows panels of the tensor are decoded into one reused buffer, for NumPy's
BLAS.
"""
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from numba import from_dtype
from numba.extending import overload

from deltanet_ref.backends.numba_cpu.arrays import row
from deltanet_ref.backends.numba_cpu.compiler import INLINED, inlined, kernel
from deltanet_ref.backends.numba_cpu.linear import product
from deltanet_ref.backends.numba_cpu.threads import run_together
from deltanet_ref.backends.numba_cpu.vectors import (
    add_pairs,
    fields,
    filled,
    half_to_float,
    high,
    join,
    lane,
    load,
    lookup,
    low,
    multiply_add,
    repeated,
    signed,
    store,
    to_float,
    total,
    unrolled,
    upper_half_to_float,
    widened,
)
from deltanet_ref.errors import InputError
from deltanet_ref.formats import quants
from deltanet_ref.ops import embedding_forward

FEW = 16                      # rows of x; from 24 on a matrix product is faster
DECODED_BYTES = 1 << 18       # stored bytes that a task decodes: 60 us
PRODUCT_BYTES = 1 << 16       # stored bytes that a task multiplies
PANEL_BYTES = 16 << 20        # decoded values that exist at one time
K_VALUES = 256                # values of a block of the K types
UPPER, LOWER = np.float32(32767), np.float32(32768)        # the largest upper 16 bits of x; what the lower ones count


# ---- the types

class Layout(NamedTuple):
    """The storage layout of a type."""
    block: np.dtype           # the fields of a block
    values: int               # in a block
    group: int                # values that share a scale: 16 or 32
    factors: object           # block -> scales and minima, of 8 bits, with a lane for each group; d, m
    numbers: object           # block, k -> the k-th 32 numbers, of 8 bits or (then with factors of 1) float32


LAYOUTS = {}                  # type -> Layout


def stored_as(type, factors, values=32, group=32, **block):
    """Decorate `numbers` of a type. block: its fields in their order, as NumPy spells their types."""
    def decorate(numbers):
        LAYOUTS[type] = Layout(np.dtype(list(block.items())), values, group, factors, inlined(numbers))
        return numbers
    return decorate


# factors

@inlined
def _one(block):
    return filled(1, 1, np.uint8), filled(0, 1, np.uint8), np.float32(1), np.float32(0)


@inlined
def _d(block):
    return filled(1, 1, np.uint8), filled(0, 1, np.uint8), half_to_float(block.d), np.float32(0)


@inlined
def _d_and_m(block):
    return filled(1, 1, np.uint8), filled(1, 1, np.uint8), half_to_float(block.d), -half_to_float(block.m)


@inlined
def _nibbles_each(block):
    scales = load(block.scales, 0, 16)
    return scales & 15, scales >> 4, half_to_float(block.d), half_to_float(block.m)


@inlined
def _six_bits_signed(block):
    """Of 16 scales: the lower 4 bits in 8 bytes, those of scale k + 8 above those of k; the upper 2 in 4 bytes
    likewise."""
    lower, upper = load(block.scales, 0, 8), load(block.scales, 8, 4)
    upper = join(join(upper & 3, upper >> 2 & 3), join(upper >> 4 & 3, upper >> 6))
    scales = signed((join(lower & 15, lower >> 4) | upper << 4) - 32)
    return scales, filled(0, 16, np.uint8), half_to_float(block.d), np.float32(0)


@inlined
def _six_bits_each(block):
    """Of 8 scales and 8 minima: the first 4 of each whole in 4 bytes; of the last 4 the lower 4 bits in 4 bytes more,
    the upper 2 above those whole ones."""
    s, m, both = load(block.scales, 0, 4), load(block.scales, 4, 4), load(block.scales, 8, 4)
    scales, minima = join(s & 63, both & 15 | s >> 6 << 4), join(m & 63, both >> 4 | m >> 6 << 4)
    return scales, minima, half_to_float(block.d), half_to_float(block.m)


@inlined
def _bytes(block):
    return load(block.scales, 0, 16), filled(0, 16, np.uint8), half_to_float(block.d), np.float32(0)


@inlined
def _four_and_two_bits(block):
    scales = signed((fields(block.scales, 4, 8) | fields(block.scales_high, 2, 8) << 4) - 32)
    return scales, filled(0, 8, np.uint8), half_to_float(block.d), np.float32(0)


# numbers. q has the lower bits, high the upper ones

@stored_as(Type.F16, _one, half="(32,)<u2")
def _f16(block, k):
    return half_to_float(load(block.half, 0, 32))


@stored_as(Type.BF16, _one, upper="(32,)<u2")
def _bf16(block, k):
    return upper_half_to_float(load(block.upper, 0, 32))


@stored_as(Type.Q8_0, _d, d="<u2", q="(32,)i1")
def _q8_0(block, k):
    return load(block.q, 0, 32)


@inlined
def _nibbles(q, start):
    """32 numbers in 16 bytes: first the lower nibbles, then the upper ones."""
    q = load(q, start, 16)
    return join(q & 15, q >> 4)


@stored_as(Type.Q4_0, _d, d="<u2", q="(16,)u1")
def _q4_0(block, k):
    return signed(_nibbles(block.q, 0) - 8)


@stored_as(Type.Q4_1, _d_and_m, d="<u2", m="<u2", q="(16,)u1")
def _q4_1(block, k):
    return _nibbles(block.q, 0)


@stored_as(Type.Q5_0, _d, d="<u2", high="<u4", q="(16,)u1")
def _q5_0(block, k):
    return signed((_nibbles(block.q, 0) | fields(block.high, 1, 32) << 4) - 16)


@stored_as(Type.Q5_1, _d_and_m, d="<u2", m="<u2", high="<u4", q="(16,)u1")
def _q5_1(block, k):
    return _nibbles(block.q, 0) | fields(block.high, 1, 32) << 4


# In the K types a byte holds bits of numbers that are 32 apart.

@stored_as(Type.Q2_K, _nibbles_each, 256, 16, scales="(16,)u1", q="(64,)u1", d="<u2", m="<u2")
def _q2_k(block, k):
    return load(block.q, k // 4 * 32, 32) >> k % 4 * 2 & 3


@stored_as(Type.Q3_K, _six_bits_signed, 256, 16, high="(32,)u1", q="(64,)u1", scales="(12,)u1", d="<u2")
def _q3_k(block, k):
    lower, upper = load(block.q, k // 4 * 32, 32) >> k % 4 * 2 & 3, load(block.high, 0, 32) >> k & 1
    return signed((lower | upper << 2) - 4)


@stored_as(Type.Q4_K, _six_bits_each, 256, 32, d="<u2", m="<u2", scales="(12,)u1", q="(128,)u1")
def _q4_k(block, k):
    return load(block.q, k // 2 * 32, 32) >> k % 2 * 4 & 15


@stored_as(Type.Q5_K, _six_bits_each, 256, 32, d="<u2", m="<u2", scales="(12,)u1", high="(32,)u1", q="(128,)u1")
def _q5_k(block, k):
    return load(block.q, k // 2 * 32, 32) >> k % 2 * 4 & 15 | (load(block.high, 0, 32) >> k & 1) << 4


@stored_as(Type.Q6_K, _bytes, 256, 16, q="(128,)u1", high="(64,)u1", scales="(16,)i1", d="<u2")
def _q6_k(block, k):
    """Each half of the block: 64 bytes with the lower bits of 64 numbers and of those 64 apart, 32 with the upper
    bits."""
    half, quarter = k // 4, k % 4
    lower = load(block.q, half * 64 + quarter % 2 * 32, 32) >> quarter // 2 * 4 & 15
    upper = load(block.high, half * 32, 32) >> quarter * 2 & 3
    return signed((lower | upper << 4) - 32)


_uneven = lookup((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))


@stored_as(Type.IQ4_NL, _d, d="<u2", index="(16,)u1")
def _iq4_nl(block, k):
    index = load(block.index, 0, 16)
    return join(_uneven(index & 15), _uneven(index >> 4))


@stored_as(Type.IQ4_XS, _four_and_two_bits, 256, 32, d="<u2", scales_high="<u2", scales="<u4", index="(128,)u1")
def _iq4_xs(block, k):
    index = load(block.index, k * 16, 16)
    return join(_uneven(index & 15), _uneven(index >> 4))


# ---- decoding and products

def dequantize(raw, type, shape, dtype=np.float32):
    """Equal to formats.quants.dequantize to the bit; types outside LAYOUTS are passed on to it."""
    if not decodes(type, shape) or raw.nbytes != quants.stored_bytes(type, shape):
        return quants.dequantize(raw, type, shape, dtype)                  # or refuses with the remedy
    y = np.empty(shape, np.float32)
    decode_into(y, raw, type)
    return y.astype(dtype, copy=False)


def decodes(type, shape):
    """Whether this module decodes tensors of this type and shape."""
    return type in LAYOUTS and bool(shape) and shape[-1] % LAYOUTS[type].values == 0


def decode_into(y, raw, type):
    """Decode stored bytes into y, float32 (..., n)."""
    blocks = _blocks(raw, type, y.shape)
    rows = _rows_of_a_task(blocks, DECODED_BYTES)
    _decode(-(-len(blocks) // rows), y.reshape(len(blocks), -1), blocks, rows)


def stored_linear_forward(x, tensors):
    """y = x w^T for several stored tensors: x (..., in) float32 -> list of y (..., out).

    tensors: each with raw, type and shape (out, in), for which `decodes` must hold. Up to FEW rows of x are multiplied
    with the stored blocks, all tensors in one call. Raises InputError for another dtype or width of x.
    """
    for tensor in tensors:
        _check(x, tensor, axis=1)
    rows = x.reshape(-1, x.shape[-1])
    ys = [np.empty((len(rows), tensor.shape[0]), np.float32) for tensor in tensors]
    if len(rows) <= FEW:
        run_together([_product_of_few(rows, tensor, y) for tensor, y in zip(tensors, ys)])
    else:
        for tensor, y in zip(tensors, ys):
            for part, w in panels(tensor):
                product(rows, w.T, y[:, part])
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


def stored_embedding_forward(tokens, tensor, dtype):
    """w[tokens] of a stored tensor w (V, D): tokens int (...) -> (..., D). Each row that is used is decoded once."""
    used, index = np.unique(tokens, return_inverse=True)
    raw = quants.rows(tensor.raw, tensor.type, tensor.shape, used)
    return embedding_forward(index.reshape(tokens.shape),
                             dequantize(raw, tensor.type, (len(used), tensor.shape[1]), dtype))


def stored_linear_backward_input(dy, tensor):
    """dx = dy w for a stored tensor: dy (..., out) float32 -> dx (..., in)."""
    _check(dy, tensor, axis=0)
    rows, dx = dy.reshape(-1, dy.shape[-1]), None
    for part, w in panels(tensor):
        of_panel = product(rows[:, part], w)
        dx = of_panel if dx is None else np.add(dx, of_panel, out=dx)
    return dx.reshape(*dy.shape[:-1], -1)


def _check(x, tensor, axis):
    if x.dtype != np.float32 or x.shape[-1] != tensor.shape[axis]:
        raise InputError(f"x is {x.dtype} {x.shape} and the stored tensor {tensor.shape}; x must be float32 with "
                         f"{tensor.shape[axis]} features")


def panels(tensor):
    """Iterator over (slice of rows, their values): together all of a stored tensor (out, in).

    The values lie in a reused buffer: the next panel, and later products, overwrite them.
    """
    n, width = tensor.shape
    step = max(1, PANEL_BYTES // (4 * width))
    stored = tensor.raw.reshape(n, -1)
    with _buffer(min(n, step) * width) as buffer:
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            w = buffer[:(part.stop - start) * width].reshape(-1, width)
            decode_into(w, stored[part], tensor.type)
            yield part, w


_free_buffers = []            # one per thread that multiplies at the same time


@contextmanager
def _buffer(size):
    buffer = _free_buffers.pop() if _free_buffers else np.empty(0, np.float32)
    if buffer.size < size:
        buffer = np.empty(size, np.float32)
    try:
        yield buffer
    finally:
        _free_buffers.append(buffer)


def _blocks(raw, type, shape):
    """Stored bytes as records (rows, blocks of a row)."""
    return raw.reshape(-1).view(LAYOUTS[type].block).reshape(-1, shape[-1] // LAYOUTS[type].values)


def _rows_of_a_task(blocks, size):
    return max(1, size // (blocks.shape[1] * blocks.itemsize))


def _product_of_few(x, tensor, y):
    blocks = _blocks(tensor.raw, tensor.type, tensor.shape)
    rows = _rows_of_a_task(blocks, PRODUCT_BYTES)
    return _products.work(-(-len(blocks) // rows), x, blocks, rows, y)


@kernel("w2 b2 i")
def _decode(first, last, y, blocks, rows):
    for r in range(first * rows, min(last * rows, len(blocks))):
        _decode_row(blocks[r], row(y, r))


@kernel("r2 b2 i w2")
def _products(first, last, x, blocks, rows, y):
    if len(x) == 1:
        prepared = _prepared(blocks, row(x, 0))
        for r in range(first * rows, min(last * rows, len(blocks))):
            y[0, r] = _dot(blocks[r], prepared)
        return
    w = np.empty(x.shape[1], x.dtype)
    for r in range(first * rows, min(last * rows, len(blocks))):
        _decode_row(blocks[r], w)
        for t in range(len(x)):
            x_t, y_t = row(x, t), x.dtype.type(0)
            for m in range(len(w)):
                y_t += x_t[m] * w[m]
            y[t, r] = y_t


# ---- parts of kernels specialised by type

def _decode_row(blocks, y):
    """y (n,) = the values of n / values blocks."""
    raise NotImplementedError("for kernels only")


def _prepared(blocks, x):
    """x (n,) in the form that _dot reads."""
    raise NotImplementedError("for kernels only")


def _dot(blocks, prepared):
    """The values of blocks times x."""
    raise NotImplementedError("for kernels only")


@overload(_decode_row, jit_options=INLINED)
def _decode_row_of_type(blocks, y):
    layout = _layout(blocks)
    vectors, values, group, factors, numbers = layout.values // 32, *layout[1:]

    @inlined
    def decode_32(k, start, block, scales, minima, y):
        q, g, h = to_float(numbers(block, k)), k * 32 // group, (k * 32 + 16) // group
        store(low(q) * lane(scales, g) - lane(minima, g), y, start)
        store(high(q) * lane(scales, h) - lane(minima, h), y, start + 16)
        return start + 32

    def decode_row(blocks, y):
        for b in range(len(blocks)):
            scales, minima, d, m = factors(blocks[b])
            unrolled(vectors, decode_32, b * values, (blocks[b], to_float(scales) * d, to_float(minima) * m, y))
    return decode_row


@overload(_prepared, jit_options=INLINED)
def _prepared_for_type(blocks, x):
    group = _layout(blocks).group

    @inlined
    def group_sums(x):
        sums = np.empty(len(x) // group, np.float32)
        for i in range(len(sums)):
            sums[i] = total(load(x, i * group, group))
        return sums

    if _layout(blocks).values == K_VALUES:
        return lambda blocks, x: (_whole_numbers(x), group_sums(x))
    return lambda blocks, x: (x, group_sums(x))


@overload(_dot, jit_options=INLINED)
def _dot_of_type(blocks, prepared):
    layout = _layout(blocks)
    return (_dot_in_whole_numbers if layout.values == K_VALUES else _dot_in_floats)(layout)


def _dot_in_floats(layout):
    """For blocks of 32 with one scale."""
    factors, numbers = layout.factors, layout.numbers

    def dot(blocks, prepared):
        x, sums = prepared
        result, other = filled(0, 16, np.float32), filled(0, 16, np.float32)   # two independent sums
        minimum = filled(0, 1, np.float32)
        for b in range(len(blocks)):
            _, _, d, m = factors(blocks[b])
            q = to_float(numbers(blocks[b], 0))
            product = multiply_add(high(q), load(x, 32 * b + 16, 16), low(q) * load(x, 32 * b, 16))
            result, other = other, multiply_add(product, d, result)
            minimum = multiply_add(repeated(m, 1), load(sums, b, 1), minimum)
        return total(result + other) - total(minimum)
    return dot


def _dot_in_whole_numbers(layout):
    """For blocks of 256. number * scale is below 2^12, so that a lane of int32 holds 16 products with 16 bits of x."""
    group, factors, numbers = layout.group, layout.factors, layout.numbers
    vectors, groups = K_VALUES // 32, K_VALUES // group

    @inlined
    def add_32(k, sums, block, scales, upper, lower, start):
        if group == 32:
            scale = repeated(lane(scales, k), 32)
        else:
            scale = join(repeated(lane(scales, 2 * k), 16), repeated(lane(scales, 2 * k + 1), 16))
        q, at = widened(numbers(block, k)) * scale, start + 32 * k
        return add_pairs(q, load(upper, at, 32), sums[0]), add_pairs(q, load(lower, at, 32), sums[1])

    def dot(blocks, prepared):
        (upper, lower, unit), sums_of_x = prepared
        result, minimum = filled(0, 16, np.float32), filled(0, groups, np.float32)
        for b in range(len(blocks)):
            scales, minima, d, m = factors(blocks[b])
            sums = filled(0, 16, np.int32), filled(0, 16, np.int32)
            sums = unrolled(vectors, add_32, sums, (blocks[b], widened(scales), upper, lower, b * K_VALUES))
            both = multiply_add(to_float(sums[1]), np.float32(1 / LOWER), to_float(sums[0]))
            result = multiply_add(both, d * unit[b], result)
            minimum = multiply_add(to_float(minima) * m, load(sums_of_x, b * groups, groups), minimum)
        return total(result) - total(minimum)
    return dot


@inlined
def _whole_numbers(x):
    """upper, lower (n,) int16 and unit (n / 256,) with x = unit (upper + lower / LOWER), to 2^-31 of the block's
    largest.

    If the block's absolute sum is not finite, unit is NaN and upper = lower = 0. If its largest value is below 1e-34,
    all three are 0.
    """
    upper, lower = np.zeros(len(x), np.int16), np.zeros(len(x), np.int16)
    unit = np.zeros(len(x) // K_VALUES, np.float32)
    for b in range(len(unit)):
        here = slice(b * K_VALUES, (b + 1) * K_VALUES)
        x_b, upper_b, lower_b, top, size = x[here], upper[here], lower[here], np.float32(0), np.float32(0)
        for i in range(K_VALUES):
            top = max(top, abs(x_b[i]))
            size += abs(x_b[i])
        if not size < np.inf:
            unit[b] = np.nan
        elif top > 1e-34:
            unit[b], per_unit = top / UPPER, UPPER / top
            for i in range(K_VALUES):
                whole = np.rint(x_b[i] * per_unit)
                upper_b[i] = np.int16(whole)
                lower_b[i] = np.int16(np.rint((x_b[i] * per_unit - whole) * LOWER))
    return upper, lower, unit


def _layout(blocks):
    """The Layout of an array of records."""
    return next(layout for layout in LAYOUTS.values() if from_dtype(layout.block) == blocks.dtype)
