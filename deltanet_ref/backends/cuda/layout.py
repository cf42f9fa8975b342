"""How arrays are cut for kernels that work on rows and elements: widths of accesses, strided rows, sums over blocks."""

from typing import Any, NamedTuple

import numpy as np

from deltanet_ref.errors import InputError

ACCESS = 16  # bytes of one access of a thread
THREADS = 256  # of a block, as in the kernels
PARTS = 512  # blocks that sum the gradient of a weight; the same on every card, so that its bits are


class Rows(NamedTuple):
    """An array (..., heads, d) as kernels read it: row i = t heads + h lies at t token_stride + h head_stride."""

    memory: Any  # a contiguous array that holds the rows
    count: int  # of all rows
    d: int
    heads: int
    token_stride: int  # in elements
    head_stride: int

    @property
    def arguments(self):
        """The kernel arguments that describe it."""
        return self.memory, self.heads, np.int64(self.token_stride), np.int64(self.head_stride)


def real(device, *arrays) -> np.dtype:
    """The dtype of activations that all arrays have, float32 or bfloat16; None is skipped. Raises InputError."""
    dtypes = {x.dtype for x in arrays if x is not None}
    if len(dtypes) != 1 or not dtypes <= {np.dtype(np.float32), device.bf16}:
        raise InputError(
            "the cuda backend computes with float32 or with bfloat16 activations, all alike; these are "
            f"{' and '.join(sorted(map(str, dtypes)))}: convert them, or use the numpy backend"
        )
    return dtypes.pop()


def wide(device, *arrays) -> None:
    """Raise InputError unless all arrays are float32, as weights of vectors and gates are for any dtype of activations;
    None is skipped."""
    dtypes = {x.dtype for x in arrays if x is not None} - {np.dtype(np.float32)}
    if dtypes:
        raise InputError(
            "weights of norms, convolutions and gates, their gradients and the optimizer's arrays are float32 in the "
            f"cuda backend, not {' and '.join(sorted(map(str, dtypes)))}: convert them"
        )


def vector(dtype, sizes, *arrays) -> int:
    """Values of one access: 16 bytes, or 1 value where a size is not a multiple or an array not aligned.

    sizes  all distances between accesses, in elements
    """
    whole = ACCESS // np.dtype(dtype).itemsize
    fits = all(size % whole == 0 for size in sizes) and all(x.data.ptr % ACCESS == 0 for x in arrays if x is not None)
    return whole if fits else 1


def rows(device, x) -> Rows:
    """The rows of x (..., d). A view with one stride over tokens and one over heads is read in place."""
    d, heads = x.shape[-1], x.shape[-2] if x.ndim > 1 else 1
    count = x.size // d if d else 0
    strides = _strides(x) if count and not x.flags.c_contiguous else None
    if strides is None:
        return Rows(device.contiguous(x), count, d, max(heads, 1), heads * d, d)
    token_stride, head_stride = strides
    span = (count // heads - 1) * token_stride + (heads - 1) * head_stride + d
    memory = device.xp.lib.stride_tricks.as_strided(x, (span,), (x.itemsize,))  # whatever lies between the rows
    return Rows(memory, count, d, heads, token_stride, head_stride)


def _strides(x):
    """Strides of tokens and heads in elements if the array (..., heads, d) has such, else None."""
    if x.ndim < 2 or any(stride < 0 or stride % x.itemsize for stride in x.strides):
        return None
    *outer, head_stride, feature = (stride // x.itemsize for stride in x.strides)
    *lengths, _, d = x.shape
    token_stride = next((s for s, n in zip(outer[::-1], lengths[::-1]) if n > 1), 0)
    expected = token_stride
    for stride, length in zip(outer[::-1], lengths[::-1]):
        if length > 1 and stride != expected:
            return None
        expected *= length
    return (token_stride, head_stride) if feature == 1 or d == 1 else None


def row_macros(dtype, d, sizes, *arrays) -> dict:
    """REAL, VECTOR, LANES and PACKS of kernels/rows.cuh for rows of d values."""
    width = vector(dtype, (d, *sizes), *arrays)
    packs = -(-d // width)
    lanes = 16 if packs <= 16 else 32 if packs <= 128 else THREADS
    return dict(REAL=dtype, VECTOR=width, LANES=lanes, PACKS=1 << (-(-packs // lanes) - 1).bit_length())


def blocks(count, per_block) -> int:
    """Blocks for `count` things."""
    return -(-count // per_block)


def column_sums(device, parts):
    """The sum of a float32 array (count, ...) over its first axis, in an order that does not change."""
    sums = device.empty(parts.shape[1:], np.float32)
    kernel = device.kernel("column_sums", "column_sums")
    device.launch(kernel, blocks(sums.size, 32), THREADS, parts, len(parts), sums.size, sums)
    return sums
