"""Arrays in kernels: which dtypes, how they are cut into tasks, and rows that the compiler knows to be contiguous."""
import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from deltanet_ref.backends.numba_cpu.compiler import FLOATS, inlined
from deltanet_ref.errors import InputError

BLOCK = 1 << 16               # elements of one task of an element-wise kernel


def same_float(*arrays) -> None:
    """Raise InputError unless all arrays are float32, or all float64; None is skipped."""
    dtypes = {np.asarray(x).dtype for x in arrays if x is not None}
    if len(dtypes) != 1 or min(dtypes).char not in FLOATS:
        raise InputError("the numba backend computes in float32 or in float64, all arguments alike; these are "
                         f"{' and '.join(sorted(map(str, dtypes)))}: convert them, or use the numpy backend")


def heads(x: np.ndarray) -> np.ndarray:
    """x (..., H, d) as (T, H, d): a view where the strides allow it."""
    return x.reshape(-1, *(1, *x.shape)[-2:])


def blocks_of(x: np.ndarray) -> int:
    """The number of tasks, of about BLOCK elements each, that the rows of x (..., d) make."""
    return -(-x.size // x.shape[-1] // max(1, BLOCK // x.shape[-1]))


@inlined
def rows_of(x, first, last):
    """The rows of blocks first .. last-1, as numbers t H + h."""
    rows = max(1, BLOCK // x.shape[2])
    return range(first * rows, min(last * rows, x.shape[0] * x.shape[1]))


@inlined
def row(x, *index):
    """x[index], a single axis that is contiguous: the compiler learns it here."""
    return carray(_pointer(x, index), (x.shape[-1],))


@intrinsic
def _pointer(typing_context, x, index):
    """The address of x[index, 0]."""
    def codegen(context, builder, signature, args):
        array = context.make_array(x)(context, builder, args[0])
        strides = cgutils.unpack_tuple(builder, array.strides)
        offset = context.get_constant(types.intp, 0)
        for i, stride in zip(cgutils.unpack_tuple(builder, args[1]), strides):
            offset = builder.add(offset, builder.mul(i, stride))
        return cgutils.pointer_add(builder, array.data, offset)
    return types.CPointer(x.dtype)(x, index), codegen
