"""The gated delta rule as it is defined, token by token, as one short kernel: to read before kernels/delta_rule_*.cu.

Definition: ops/gated_delta_rule/recurrent.py, whose steps have the same numbers. A column of S never meets another
one, so a thread owns a column and walks along the sequence with it; no thread waits for another. Nothing else in this
package calls it: chunks turn its loop over tokens into products of matrices, which tensor cores multiply.

Without a card it runs in Numba's simulator, with NUMBA_ENABLE_CUDASIM=1 in the environment; on one, Numba needs its
CUDA target (pip install numba-cuda). It has only run in the simulator.
"""

import math

from numba import cuda


@cuda.jit
def recurrence(q, k, v, g, beta, S, scale, tiled, cu_seqlens, o):
    """Launch as recurrence[(H_v, N_seq), d_v](...): block (h, n) is value head h of sequence n.

    q, k (tokens, H_k, d_k); v, o (tokens, H_v, d_v); g, beta (tokens, H_v); S (N_seq, H_v, d_k, d_v), the state before
    the first token, becomes the state after the last one; cu_seqlens (N_seq + 1,); tiled: the order of the value heads
    """
    h, n, j = cuda.blockIdx.x, cuda.blockIdx.y, cuda.threadIdx.x
    H_k, H_v, d_k = k.shape[1], v.shape[1], k.shape[2]
    h_k = h % H_k if tiled else h // (H_v // H_k)
    column = S[n, h, :, j]
    for t in range(cu_seqlens[n], cu_seqlens[n + 1]):
        decay, read, out = math.exp(g[t, h]), 0.0, 0.0
        for i in range(d_k):
            column[i] = decay * column[i]  # 1  decay   S~ = exp(g) S
            read += k[t, h_k, i] * column[i]
        u = beta[t, h] * (v[t, h, j] - read)  # 2  error   u = beta (v - k S~)
        for i in range(d_k):
            column[i] = column[i] + k[t, h_k, i] * u  # 3  write   S = S~ + k u
            out += q[t, h_k, i] * column[i]
        o[t, h, j] = scale * out  # 4  read    o = scale q S
