"""Linear maps: products by NumPy's BLAS, cut into blocks that the kernels' threads share.

Mathematics: docs/derivations/linear-and-lora.md. The BLAS runs on one thread meanwhile. Its own threads wait for one
another inside every product by spinning, and under other load one of them is not running: next to busy processes, one
per core, a product of 0.2 ms took 12 ms. Here each thread computes one block of the result after another, so a thread
that the system suspends delays its own block only, and a thread that waits sleeps. Small products are not cut.

How a product is cut depends on its sizes and on the cores of the machine, but not on the number of threads. Neither do
the bits of the result, then: the BLAS may round the same element differently in a block of another shape (OpenBLAS's
Haswell kernel does). The BLAS packs its operands again for each block, which limits the number of blocks.
"""
from functools import lru_cache

import numpy as np

from deltanet_ref.backends.cores import available_cores
from deltanet_ref.backends.numba_cpu.arrays import BLOCK, heads, same_float
from deltanet_ref.backends.numba_cpu.blas import gemm, numpy_on_one_thread
from deltanet_ref.backends.numba_cpu.compiler import kernel
from deltanet_ref.backends.numba_cpu.threads import Work, run_together
from deltanet_ref.ops import linear as ops

# The cost model of block_shape, in multiply-adds of a large product (75 per ns on a core with AVX-512)
PACKED = 40                   # cost of one element of A or B, for each block that packs it; measured
BLOCK_COST = 1 << 24          # least cost of a block: 0.2 ms; waking a thread takes 0.02 to 0.06 ms
EXTRA = 1.03                  # more blocks than cores may cost this much relative to one block
ALIGNMENT = 16                # of the columns of a block: the BLAS is fastest on whole tiles
CORES = available_cores()
LEAST_ROWS = 64               # of a task of linear_add: each packs w


def linear_forward(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """y = x w^T: as ops.linear_forward."""
    same_float(x, w)
    if x.shape[-1] != w.shape[1]:
        return ops.linear_forward(x, w)                                    # refuses with the remedy
    return product(_rows(x), w.T).reshape(*x.shape[:-1], len(w))


def linear_add(y: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    """y += x w^T in place, without a second array of the size of y; for small in: as ops.linear_add."""
    same_float(y, x, w)
    if x.shape[:-1] != y.shape[:-1] or w.shape != (y.shape[-1], x.shape[-1]):
        return ops.linear_add(y, x, w)                                     # refuses
    y, x = heads(y), heads(x)
    rows = max(LEAST_ROWS, BLOCK // y.shape[2])
    _add(len(y) * -(-y.shape[1] // rows), y, x, w, rows)


def linear_backward_input(dy: np.ndarray, w: np.ndarray) -> np.ndarray:
    """dx = dy w: as ops.linear_backward_input."""
    same_float(dy, w)
    return product(_rows(dy), w).reshape(*dy.shape[:-1], w.shape[1])


def linear_backward_weight(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dw = dy^T x, summed over all rows: as ops.linear_backward_weight."""
    same_float(dy, x)
    return product(_rows(dy).T, _rows(x))


def product(A: np.ndarray, B: np.ndarray, C: np.ndarray | None = None) -> np.ndarray:
    """C = A B. A (m, k), B (k, n), C (m, n): a new array if None."""
    (m, k), n = A.shape, B.shape[1]
    C = np.empty((m, n), A.dtype) if C is None else C
    rows, columns = block_shape(m, k, n)
    with numpy_on_one_thread:
        if rows >= m and columns >= n:
            return np.matmul(A, B, out=C)
        run_together([Work(-(-m // rows) * -(-n // columns), _multiply, [A, B, C, rows, columns])])
    return C


@lru_cache(1024)
def block_shape(m: int, k: int, n: int) -> tuple[int, int]:
    """Rows and columns of the blocks into which C (m, n) = A (m, k) B (k, n) is cut.

    One block for each core, more as long as that is cheap, in the shape that copies least.
    """
    whole, parts, best = _cost(m, k, n, 1, 1), 1, (1, 1)
    while whole >= 2 * parts * BLOCK_COST:
        parts *= 2
        cuts = min(((down, parts // down) for down in _powers_of_two(parts)), key=lambda cut: _cost(m, k, n, *cut))
        if parts >= 2 * CORES and _cost(m, k, n, *cuts) > EXTRA * whole:
            break
        best = cuts
    return -(-m // best[0]), ALIGNMENT * -(-n // (best[1] * ALIGNMENT))


def _cost(m, k, n, down, across):
    """Of the product in `down` times `across` blocks; C is written once."""
    return m * k * n + PACKED * (m * n + across * m * k + down * k * n)


def _powers_of_two(most):
    return [1 << i for i in range(most.bit_length())]


def _multiply(first, last, A, B, C, rows, columns):
    """Blocks first .. last-1 of C = A B; NumPy releases the interpreter lock in each."""
    across = -(-C.shape[1] // columns)
    for block in range(first, last):
        i, j = block // across * rows, block % across * columns
        np.matmul(A[i:i + rows], B[:, j:j + columns], out=C[i:i + rows, j:j + columns])


def _rows(x):
    return x.reshape(-1, x.shape[-1])


@kernel("w3 r3 r2 i")
def _add(first, last, y, x, w, rows):
    blocks, one = -(-y.shape[1] // rows), y.dtype.type(1)
    for task in range(first, last):
        n, start = task // blocks, task % blocks * rows
        gemm(one, x[n, start:start + rows], w.T, one, y[n, start:start + rows])
