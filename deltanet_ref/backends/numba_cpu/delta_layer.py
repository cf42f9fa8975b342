"""A delta layer between its projections, for one token: convolution, norms, gates and the recurrence in one kernel.

The model computes many tokens with seven kernels; for one token each of them takes less time than its call. The
mathematics is that of the seven: their device functions are called here. A task is a sequence and a value head; value
heads that share a key head each compute its query and key.
"""
import numpy as np

from deltanet_ref.backends.numba_cpu.arrays import row, same_float
from deltanet_ref.backends.numba_cpu.causal_conv1d import convolve_silu, keep_inputs
from deltanet_ref.backends.numba_cpu.compiler import kernel
from deltanet_ref.backends.numba_cpu.delta_rule import token
from deltanet_ref.backends.numba_cpu.elementary import exp, sigmoid, softplus
from deltanet_ref.backends.numba_cpu.norms import gated_row, inverse_length, inverse_rms
from deltanet_ref.notation import value_to_key_head

EPS = 1e-6                    # of the L2 norms of queries and keys


def delta_layer_step(qkv, z, b, a, conv_state, S, *, conv, decay, dt_bias, norm, eps, head_order):
    """o, conv_state, S after one token of each of N sequences: steps 2 .. 6 of model.layers.gated_deltanet.

    qkv (N, 2 H_k d_k + H_v d_v); z (N, H_v d_v); b, a (N, H_v); conv_state (N, K - 1, channels); S (N, H_v, d_k, d_v)
    conv (channels, K), decay = -exp(A_log) (H_v,), dt_bias (H_v,), norm (d_v,), eps of the norm -> o (N, H_v, d_v)
    """
    same_float(qkv, z, b, a, conv_state, S, conv, decay, dt_bias, norm)
    N, H_v, d_k, d_v = S.shape
    H_k = (qkv.shape[1] - H_v * d_v) // (2 * d_k)
    o, new_conv_state, new_S = np.empty((N, H_v, d_v), S.dtype), np.empty_like(conv_state), np.empty_like(S)
    _step(N * H_v, qkv[:, None], z, b, a, conv_state, S, conv, decay, dt_bias, norm, eps, d_k ** -0.5,
          value_to_key_head(H_k, H_v, head_order), H_k, o, new_conv_state, new_S)
    return o, new_conv_state, new_S


@kernel("r3 r2 r2 r2 r3 r4 r2 r1 r1 r1 f f i1 i w3 w3 w4")
def _step(first, last, qkv, z, b, a, conv_state, S, conv, decay, dt_bias, norm, eps, scale, key_head, H_k,
          o, new_conv_state, new_S):
    H_v, d_k, d_v = S.shape[1:]
    q, k, v, read = np.empty(d_k, S.dtype), np.empty(d_k, S.dtype), np.empty(d_v, S.dtype), np.empty(d_v, S.dtype)
    taps = np.empty((conv.shape[1], max(d_k, d_v)), S.dtype)
    for task in range(first, last):
        n, h = task // H_v, task % H_v
        h_k, z_h = key_head[h], row(z, n)[h * d_v:(h + 1) * d_v]
        for x, low in ((q, h_k * d_k), (k, (H_k + h_k) * d_k), (v, 2 * H_k * d_k + h * d_v)):
            for i in range(len(taps)):
                tap = row(taps, i)
                for m in range(len(x)):
                    tap[m] = conv[low + m, i]
            convolve_silu(qkv, taps[:, :len(x)], conv_state, n, n, n, low, x)
            keep_inputs(qkv, conv_state, n, n, n + 1, low, low + len(x), new_conv_state)
        for x in (q, k):
            r = inverse_length(x, EPS)
            for i in range(d_k):
                x[i] *= r
        g = S.dtype.type(decay[h] * softplus(np.float64(a[n, h]) + dt_bias[h]))
        token(q, k, v, exp(g), sigmoid(b[n, h]), scale, S[n, h], read, new_S[n, h])
        gated_row(read, inverse_rms(read, eps), row(norm), z_h, row(o, n, h))
