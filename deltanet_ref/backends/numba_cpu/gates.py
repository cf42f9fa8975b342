"""Element-wise gates, one pass each: the decay gate, SwiGLU, the sigmoid gate of attention.

Mathematics: docs/derivations/gates.md, swiglu.md, attention.md. Backward recomputes everything from the inputs.
"""
import math
from typing import NamedTuple

import numpy as np

from deltanet_ref import ops
from deltanet_ref.backends.numba_cpu.arrays import blocks_of, heads, row, rows_of, same_float
from deltanet_ref.backends.numba_cpu.compiler import kernel
from deltanet_ref.backends.numba_cpu.elementary import sigmoid, silu_derivative, softplus
from deltanet_ref.ops.softmax_attention import SigmoidGateCache
from deltanet_ref.ops.swiglu import SwigluCache


class DecayGateCache(NamedTuple):
    """Kept by decay_gate_forward."""
    a: np.ndarray             # (B, L, H_v)
    A_log: np.ndarray         # (H_v,)
    dt_bias: np.ndarray       # (H_v,)
    beta: np.ndarray          # (B, L, H_v)


def decay_gate_forward(a, b, A_log, dt_bias):
    """g, beta, cache: as ops.decay_gate_forward; g is computed in float64 and rounded once."""
    same_float(a, b, A_log, dt_bias)
    if b.shape != a.shape or A_log.shape != a.shape[-1:] or dt_bias.shape != a.shape[-1:]:
        return ops.decay_gate_forward(a, b, A_log, dt_bias)                # refuses with the remedy
    g, beta = np.empty(a.shape, a.dtype), np.empty(a.shape, a.dtype)
    _decay_gate(blocks_of(a), heads(a), heads(b), A_log, dt_bias, heads(g), heads(beta))
    return g, beta, DecayGateCache(a, A_log, dt_bias, beta)


def decay_gate_backward(dg, dbeta, cache, need_dw=True):
    """da, db, dA_log, ddt_bias, the last two None without need_dw: as ops.decay_gate_backward."""
    a, A_log, dt_bias, beta = cache
    same_float(dg, dbeta, a)
    da, db = np.empty(a.shape, a.dtype), np.empty(a.shape, a.dtype)
    dA_log, ddt_bias = np.empty((2, blocks_of(a), a.shape[-1]), a.dtype)
    _decay_gate_backward(blocks_of(a), heads(dg), heads(dbeta), heads(a), A_log, dt_bias, heads(beta), heads(da),
                         heads(db), dA_log, ddt_bias)
    return (da, db, dA_log.sum(0), ddt_bias.sum(0)) if need_dw else (da, db, None, None)


def swiglu_forward(gate, up):
    """y = SiLU(gate) * up, cache: as ops.swiglu_forward."""
    same_float(gate, up)
    if gate.shape != up.shape:
        return ops.swiglu_forward(gate, up)                                # refuses with the remedy
    y = np.empty(gate.shape, gate.dtype)
    _swiglu(blocks_of(gate), heads(gate), heads(up), heads(y))
    return y, SwigluCache(gate, up)


def swiglu_backward(dy, cache):
    """dgate, dup: as ops.swiglu_backward."""
    gate, up = cache
    same_float(dy, gate)
    dgate, dup = np.empty(gate.shape, gate.dtype), np.empty(gate.shape, gate.dtype)
    _swiglu_backward(blocks_of(gate), heads(dy), heads(gate), heads(up), heads(dgate), heads(dup))
    return dgate, dup


def sigmoid_gate_forward(o, gate):
    """y = o * sigmoid(gate), cache: as ops.sigmoid_gate_forward."""
    same_float(o, gate)
    if o.shape != gate.shape:
        return ops.sigmoid_gate_forward(o, gate)                           # refuses with the remedy
    y = np.empty(o.shape, o.dtype)
    _sigmoid_gate(blocks_of(o), heads(o), heads(gate), heads(y))
    return y, SigmoidGateCache(o, gate)


def sigmoid_gate_backward(dy, cache):
    """do, dgate: as ops.sigmoid_gate_backward."""
    o, gate = cache
    same_float(dy, o)
    do, dgate = np.empty(o.shape, o.dtype), np.empty(o.shape, o.dtype)
    _sigmoid_gate_backward(blocks_of(o), heads(dy), heads(o), heads(gate), heads(do), heads(dgate))
    return do, dgate


@kernel("r3 r3 r1 r1 w3 w3")
def _decay_gate(first, last, a, b, A_log, dt_bias, g, beta):
    for h in range(a.shape[2]):
        A = math.exp(np.float64(A_log[h]))
        for i in rows_of(a, first, last):
            t, j = i // a.shape[1], i % a.shape[1]
            x = np.float64(a[t, j, h]) + dt_bias[h]
            g[t, j, h] = -A * softplus(x)
            beta[t, j, h] = sigmoid(b[t, j, h])


@kernel("r3 r3 r3 r1 r1 r3 w3 w3 w2 w2")
def _decay_gate_backward(first, last, dg, dbeta, a, A_log, dt_bias, beta, da, db, dA_log, ddt_bias):
    one = a.dtype.type(1)
    for block in range(first, last):
        for h in range(a.shape[2]):
            A, through_A, through_x = math.exp(np.float64(A_log[h])), 0.0, 0.0
            for i in rows_of(a, block, block + 1):
                t, j = i // a.shape[1], i % a.shape[1]
                x = np.float64(a[t, j, h]) + dt_bias[h]
                through_A -= A * softplus(x) * dg[t, j, h]
                dx = -A * sigmoid(x) * dg[t, j, h]                          # softplus' = sigmoid
                through_x += dx
                da[t, j, h] = dx
                db[t, j, h] = dbeta[t, j, h] * beta[t, j, h] * (one - beta[t, j, h])
            dA_log[block, h], ddt_bias[block, h] = through_A, through_x


@kernel("r3 r3 w3")
def _swiglu(first, last, gate, up, y):
    for i in rows_of(gate, first, last):
        t, h = i // gate.shape[1], i % gate.shape[1]
        gate_i, up_i, y_i = row(gate, t, h), row(up, t, h), row(y, t, h)
        for m in range(len(y_i)):
            y_i[m] = gate_i[m] * sigmoid(gate_i[m]) * up_i[m]


@kernel("r3 r3 r3 w3 w3")
def _swiglu_backward(first, last, dy, gate, up, dgate, dup):
    for i in rows_of(gate, first, last):
        t, h = i // gate.shape[1], i % gate.shape[1]
        dy_i, gate_i, up_i = row(dy, t, h), row(gate, t, h), row(up, t, h)
        dgate_i, dup_i = row(dgate, t, h), row(dup, t, h)
        for m in range(len(dy_i)):
            s = sigmoid(gate_i[m])
            dgate_i[m] = dy_i[m] * up_i[m] * silu_derivative(gate_i[m], s)
            dup_i[m] = dy_i[m] * gate_i[m] * s


@kernel("r3 r3 w3")
def _sigmoid_gate(first, last, o, gate, y):
    for i in rows_of(o, first, last):
        t, h = i // o.shape[1], i % o.shape[1]
        o_i, gate_i, y_i = row(o, t, h), row(gate, t, h), row(y, t, h)
        for m in range(len(y_i)):
            y_i[m] = o_i[m] * sigmoid(gate_i[m])


@kernel("r3 r3 r3 w3 w3")
def _sigmoid_gate_backward(first, last, dy, o, gate, do, dgate):
    one = o.dtype.type(1)
    for i in rows_of(o, first, last):
        t, h = i // o.shape[1], i % o.shape[1]
        dy_i, o_i, gate_i, do_i, dgate_i = row(dy, t, h), row(o, t, h), row(gate, t, h), row(do, t, h), row(dgate, t, h)
        for m in range(len(dy_i)):
            s = sigmoid(gate_i[m])
            do_i[m] = dy_i[m] * s
            dgate_i[m] = dy_i[m] * s * (one - s) * o_i[m]
