"""Linear maps as matrix products in kernels. Mathematics: docs/derivations/linear-and-lora.md.

A large product is cut into blocks of its result, each a product on one thread (blas.py); the threads take them one by
one, so a thread that the system stops delays its own block only. A small product is computed by the calling thread.
Blocks are cut by the sizes alone: the bits of a result are the same for any number of threads.
"""
import math

import numpy as np

from deltanet_ref.backends.numba_cpu.arrays import heads, same_float
from deltanet_ref.backends.numba_cpu.blas import gemm, gemv
from deltanet_ref.backends.numba_cpu.compiler import kernel
from deltanet_ref.ops import linear as ops

BLOCK_COST = 1 << 24          # multiply-adds of a block, where its sizes allow: 0.3 ms; less is not worth a second thread
NUMBER_COST = 32              # multiply-adds in the time in which one number is read from memory
BLOCK_EDGE = 256              # least rows and columns: every block copies its part of A and B once more for the BLAS
ALIGNMENT = 16                # of the columns of a block: the BLAS computes whole tiles fastest


def linear_forward(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """y = x w^T: as ops.linear_forward."""
    same_float(x, w)
    if x.shape[-1] != w.shape[1]:
        return ops.linear_forward(x, w)                                    # refuses with the remedy
    return product(_rows(x), w.T).reshape(*x.shape[:-1], len(w))


def linear_add(y: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    """y += x w^T in place, without an array for the product: as ops.linear_add."""
    same_float(y, x, w)
    if x.shape[:-1] != y.shape[:-1] or w.shape != (y.shape[-1], x.shape[-1]):
        return ops.linear_add(y, x, w)                                     # refuses
    for y_n, x_n in zip(heads(y), heads(x)):
        product(x_n, w.T, y_n, add=True)


def linear_backward_input(dy: np.ndarray, w: np.ndarray) -> np.ndarray:
    """dx = dy w: as ops.linear_backward_input."""
    same_float(dy, w)
    return product(_rows(dy), w).reshape(*dy.shape[:-1], w.shape[1])


def linear_backward_weight(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dw = dy^T x, summed over all rows: as ops.linear_backward_weight."""
    same_float(dy, x)
    return product(_rows(dy).T, _rows(x))


def product(A: np.ndarray, B: np.ndarray, C: np.ndarray | None = None, add: bool = False) -> np.ndarray:
    """C = A B, or C += A B with add. A (m, k), B (k, n), C (m, n) with contiguous rows, a new array if None."""
    (m, k), n = A.shape, B.shape[1]
    C = np.empty((m, n), A.dtype) if C is None else C
    rows, columns = block_shape(max(m, 1), k, max(n, 1))
    _blocks(-(-m // rows) * -(-n // columns), C, A, B, float(add), rows, columns)
    return C


def block_shape(m: int, k: int, n: int) -> tuple[int, int]:
    """Rows and columns of the blocks that C (m, n) = A (m, k) B (k, n) is cut into."""
    cost = m * k * n + NUMBER_COST * (m * k + k * n + m * n)
    parts = min(_power_of_two(cost / BLOCK_COST), _cuts(m) * _cuts(n))
    down = max(_power_of_two(math.sqrt(parts * m / n)), parts // _cuts(n))                 # about square
    down = min(down, _cuts(m), parts)
    across = parts // down
    return -(-m // down), ALIGNMENT * -(-n // (across * ALIGNMENT))


def _cuts(size):
    """Into how many parts of at least BLOCK_EDGE an axis may be cut, a power of two."""
    return _power_of_two(size / BLOCK_EDGE)


def _power_of_two(x):
    """The largest power of two up to x, at least 1."""
    return 1 << max(0, int(x).bit_length() - 1)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


@kernel("w2 m2 m2 f i i")
def _blocks(first, last, C, A, B, beta, rows, columns):
    across = -(-C.shape[1] // columns)
    for block in range(first, last):
        i, j = block // across * rows, block % across * columns
        A_i, B_j, C_ij = A[i:i + rows], B[:, j:j + columns], C[i:i + rows, j:j + columns]
        if len(C) == 1 and len(B) > 0:                                     # gemv would leave C as it is for k = 0
            gemv(C.dtype.type(1), A_i, B_j, beta, C_ij)
        else:
            gemm(C.dtype.type(1), A_i, B_j, beta, C_ij)
