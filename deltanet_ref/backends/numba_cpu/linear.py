"""A thin product added where the result of a large one lies: no second array of that size, no second pass over it."""
from deltanet_ref.backends.numba_cpu.blas import gemm
from deltanet_ref.backends.numba_cpu.kernel import heads, kernel, same_float
from deltanet_ref.ops import linear as ops
from deltanet_ref.ops.linear import linear_backward_input, linear_backward_weight, linear_forward  # noqa: F401

ROWS = 64                     # tokens of a task


def linear_add(y, x, w):
    """y += x w^T: as ops.linear_add."""
    same_float(y, x, w)
    if x.shape[:-1] != y.shape[:-1] or w.shape != (y.shape[-1], x.shape[-1]):
        return ops.linear_add(y, x, w)                                     # refuses
    y, x = heads(y), heads(x)
    _add(len(y) * -(-y.shape[1] // ROWS), y, x, w)


@kernel("w3 r3 r2")
def _add(first, last, y, x, w):
    blocks, one = -(-y.shape[1] // ROWS), y.dtype.type(1)
    for task in range(first, last):
        n, start = task // blocks, task % blocks * ROWS
        gemm(one, x[n, start:start + ROWS], w.T, one, y[n, start:start + ROWS])
