"""Linear maps as matrix products in kernels. Mathematics: docs/derivations/linear-and-lora.md.

A large product is cut into blocks of its result, each computed by a BLAS on one thread (blas.py). The threads take the
blocks one by one, so a thread that the system stops delays its own block only. A small product is not cut: the calling
thread computes it.

How a product is cut depends on its sizes and on the cores of the machine, not on the number of threads, so that the
bits of a result do not either: the same element in a block of another shape may be rounded differently (OpenBLAS's
Haswell kernel does). The BLAS copies its operands tile by tile for every block, which bounds the number of blocks.
"""
from functools import lru_cache

import numpy as np

from deltanet_ref.backends.cores import available_cores
from deltanet_ref.backends.numba_cpu.arrays import heads, same_float
from deltanet_ref.backends.numba_cpu.blas import gemm, gemv
from deltanet_ref.backends.numba_cpu.compiler import kernel
from deltanet_ref.ops import linear as ops

# Costs in multiply-adds of a large product (75 per ns on a core with AVX-512)
COPIED = 40                   # an element of A or B, for each block that reads it
BLOCK_COST = 1 << 24          # least for a block: 0.2 ms; waking a thread takes 0.02 ms
EXTRA = 1.03                  # of the cost of the whole: more blocks than cores are made up to here
ALIGNMENT = 16                # of the columns of a block: the BLAS computes whole tiles fastest
CORES = available_cores()


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


@lru_cache(1024)
def block_shape(m: int, k: int, n: int) -> tuple[int, int]:
    """Rows and columns of the blocks into which C (m, n) = A (m, k) B (k, n) is cut: one for each core and more as long
    as that is cheap, in the shape that copies least."""
    whole, parts, best = _cost(m, k, n, 1, 1), 1, (1, 1)
    while whole >= 2 * parts * BLOCK_COST:
        parts *= 2
        cuts = min(((down, parts // down) for down in _powers_of_two(parts)), key=lambda cut: _cost(m, k, n, *cut))
        if parts >= 2 * CORES and _cost(m, k, n, *cuts) > EXTRA * whole:
            break
        best = cuts
    return -(-m // best[0]), ALIGNMENT * -(-n // (best[1] * ALIGNMENT))


def _cost(m, k, n, down, across):
    """Of the product in `down` times `across` blocks; C is read and written once."""
    return m * k * n + COPIED * (m * n + across * m * k + down * k * n)


def _powers_of_two(most):
    return [1 << i for i in range(most.bit_length())]


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
