"""AdamW, one pass over each row."""
import math

from deltanet_ref import ops
from deltanet_ref.backends.numba_cpu.arrays import blocks_of, heads, row, rows_of, same_float
from deltanet_ref.backends.numba_cpu.compiler import kernel


def adamw_update(p, g, m, v, *, t, lr, betas, eps, weight_decay):
    """p, m, v in place: as ops.adamw_update."""
    same_float(p, g, m, v)
    if not p.shape == g.shape == m.shape == v.shape:
        return ops.adamw_update(p, g, m, v, t=t, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)     # refuses
    beta1, beta2 = betas
    _update(blocks_of(p), heads(p), heads(m), heads(v), heads(g), 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2,
            lr / (1 - beta1**t), 1 / (1 - beta2**t), eps)


@kernel("w3 w3 w3 r3 f f f f f f f")
def _update(first, last, p, m, v, g, keep, into_m, beta2, into_v, step, unbias, eps):
    for i in rows_of(p, first, last):
        t, h = i // p.shape[1], i % p.shape[1]
        p_i, m_i, v_i, g_i = row(p, t, h), row(m, t, h), row(v, t, h), row(g, t, h)
        for j in range(len(p_i)):
            m_i[j] += into_m * (g_i[j] - m_i[j])
            v_i[j] = beta2 * v_i[j] + into_v * g_i[j] * g_i[j]
            p_i[j] = keep * p_i[j] - step * m_i[j] / (math.sqrt(unbias * v_i[j]) + eps)
