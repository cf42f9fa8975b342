"""A delta layer between its projections, for one token: convolution, norms, gates and the recurrence in one kernel.

By themselves, as the model calls them for many tokens, these are seven kernels; at one token each is over sooner than it
has been called. A task is a sequence and a value head; what the heads of a key head share, each of them computes.
"""
import math

import numpy as np

from deltanet_ref.backends.numba_cpu.kernel import exp, inlined, kernel, row, same_float, sigmoid
from deltanet_ref.notation import value_to_key_head


def delta_layer_step(qkv, z, b, a, conv_state, S, *, conv, decay, dt_bias, norm, eps, head_order):
    """o, conv_state, S after one token of each of N sequences: steps 2 .. 6 of model.gated_deltanet.

    qkv (N, 2 H_k d_k + H_v d_v); z (N, H_v d_v); b, a (N, H_v); conv_state (N, K - 1, channels); S (N, H_v, d_k, d_v)
    conv (channels, K), decay = -exp(A_log) (H_v,), dt_bias (H_v,), norm (d_v,), eps of the norm -> o (N, H_v, d_v)
    """
    same_float(qkv, z, b, a, conv_state, S, conv, decay, dt_bias, norm)
    N, H_v, d_k, d_v = S.shape
    H_k = (qkv.shape[1] - H_v * d_v) // (2 * d_k)
    o, new_conv_state, new_S = np.empty((N, H_v, d_v), S.dtype), np.empty_like(conv_state), np.empty_like(S)
    _step(N * H_v, qkv, z, b, a, conv_state, S, conv, decay, dt_bias, norm, eps, d_k ** -0.5,
          value_to_key_head(H_k, H_v, head_order), H_k, o, new_conv_state, new_S)
    return o, new_conv_state, new_S


@kernel("r2 r2 r2 r2 r3 r4 r2 r1 r1 r1 f f i1 i w3 w3 w4")
def _step(first, last, qkv, z, b, a, conv_state, S, conv, decay, dt_bias, norm, eps, scale, key_head, H_k,
          o, new_conv_state, new_S):
    H_v, d_k, d_v = S.shape[1:]
    q, k = np.empty(d_k, S.dtype), np.empty(d_k, S.dtype)
    v, u = np.empty(d_v, S.dtype), np.empty(d_v, S.dtype)
    one, zero = S.dtype.type(1), S.dtype.type(0)
    for task in range(first, last):
        n, h = task // H_v, task % H_v
        h_k, o_h, w = key_head[h], row(o, n, h), row(norm)
        # convolution and SiLU; keys and queries to unit length
        for x, start in ((q, h_k * d_k), (k, (H_k + h_k) * d_k), (v, 2 * H_k * d_k + h * d_v)):
            _convolve(qkv, conv_state, conv, n, start, x, new_conv_state)
        to_q, to_k, qk = zero, zero, zero
        for i in range(d_k):
            to_q += q[i] * q[i]
            to_k += k[i] * k[i]
        to_q, to_k = one / S.dtype.type(math.sqrt(to_q + 1e-6)), one / S.dtype.type(math.sqrt(to_k + 1e-6))
        for i in range(d_k):
            q[i] *= to_q
            k[i] *= to_k
            qk += q[i] * k[i]
        # gates
        x = np.float64(a[n, h]) + dt_bias[h]
        g = exp(S.dtype.type(decay[h] * (max(x, 0.0) + math.log1p(math.exp(-abs(x))))))
        beta = sigmoid(b[n, h])
        # k S and q S, then S and o [delta.1..4]
        u[:] = zero
        o_h[:] = zero
        for i in range(d_k):
            S_i = row(S, n, h, i)
            for m in range(d_v):                   # a loop for each: with more arrays at once it is not vectorised
                u[m] += k[i] * S_i[m]
            for m in range(d_v):
                o_h[m] += q[i] * S_i[m]
        squares = zero
        for m in range(d_v):
            u[m] = beta * (v[m] - g * u[m])
            o_h[m] = scale * (g * o_h[m] + qk * u[m])
            squares += o_h[m] * o_h[m]
        for i in range(d_k):
            S_i, new_S_i = row(S, n, h, i), row(new_S, n, h, i)
            for m in range(d_v):
                new_S_i[m] = g * S_i[m] + k[i] * u[m]
        # norm, gated by SiLU(z)
        r, z_h = S.dtype.type(1 / math.sqrt(squares / d_v + eps)), row(z, n)[h * d_v:(h + 1) * d_v]
        for m in range(d_v):
            o_h[m] *= r * w[m] * z_h[m] * sigmoid(z_h[m])


@inlined
def _convolve(qkv, conv_state, conv, n, start, y, new_conv_state):
    """y = SiLU of the convolution at the channels from start on; their state moves on by this token."""
    stop, K = start + len(y), conv.shape[1]
    x = row(qkv, n)[start:stop]
    for m in range(len(y)):
        y[m] = conv[start + m, K - 1] * x[m]
    for i in range(K - 1):
        seen, kept = row(conv_state, n, i)[start:stop], row(new_conv_state, n, i)[start:stop]
        after = row(conv_state, n, i + 1)[start:stop] if i < K - 2 else x
        for m in range(len(y)):
            y[m] += conv[start + m, i] * seen[m]
        kept[:] = after
    for m in range(len(y)):
        y[m] *= sigmoid(y[m])
