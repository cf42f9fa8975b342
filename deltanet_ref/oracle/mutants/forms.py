"""Every operator as named equations (steps.py) in the kit's own words, so that its known mistakes are single equations.

Three forms of the gated delta rule, which compute it in different ways: RULE token by token, CHUNKED
(oracle/chunk_by_chunk.py) as plainly as a chunked kernel can, PADDED with what better kernels do. The test suite holds
each form to ops at 1e-12 in float64.
"""
import numpy as np

from deltanet_ref.oracle.chunk_by_chunk import CHUNKED, decays, t
from deltanet_ref.oracle.steps import Form, steps
from deltanet_ref.oracle.walk import DeltaForm

# ---------------------------------------------------------------------------------------- the gated delta rule

# One token: rows are (B, H_v, 1, d), so products are those of notation.py
RULE = DeltaForm(
    chunk=1,
    forward=steps(
        S_decayed=lambda G, carried: np.exp(G)[..., None] * carried,
        error=lambda dot, V, K, S_decayed: V - dot(K, S_decayed),
        u=lambda Beta, error: Beta[..., None] * error,
        S_next=lambda dot, S_decayed, K, u: S_decayed + dot(t(K), u),
        Out=lambda dot, scale, Q, S_next: scale * dot(Q, S_next),
    ),
    backward=steps(
        # Out = scale Q S_next
        dQ=lambda dot_back, dO, S_next: dot_back(dO, t(S_next)),
        dS_written=lambda dot_back, dS_next, Q, dO: dS_next + dot_back(t(Q), dO),
        # S_next = S_decayed + K^T u
        dK_write=lambda dot_back, u, dS_written: dot_back(u, t(dS_written)),
        du=lambda dot_back, K, dS_written: dot_back(K, dS_written),
        # u = Beta error, error = V - K S_decayed
        dBeta=lambda du, error: (du * error).sum(-1),
        d_error=lambda Beta, du: Beta[..., None] * du,
        dV=lambda d_error: d_error,
        dK_erase=lambda dot_back, d_error, S_decayed: -dot_back(d_error, t(S_decayed)),
        dK=lambda dK_write, dK_erase: dK_write + dK_erase,
        dS_decayed=lambda dot_back, dS_written, K, d_error: dS_written - dot_back(t(K), d_error),
        # S_decayed = exp(G) S
        dG=lambda dS_decayed, S_decayed: (dS_decayed * S_decayed).sum((-2, -1))[..., None],
        dS=lambda G, dS_decayed: np.exp(G)[..., None] * dS_decayed,
    ))


def log_decay_gradient(pair, row, tail, whole):
    """dg of a chunk from what its decays collected, without a difference of large sums.

    Over pairs i >= j, pair (..., C, C) holds Gamma_ij dGamma_ij: g_t is in it for j < t <= i. row (..., C) is in
    exp(gc_i), which has g_t for t <= i; tail in exp(gc_C - gc_j), for t > j; whole (...,) in exp(gc_C), always.
    """
    lower = np.tri(row.shape[-1], dtype=row.dtype)                         # lower[i, j] = 1 for i >= j
    crossing = np.tril(lower.T @ pair, -1).sum(-1)
    return crossing + row @ lower + tail @ np.tril(lower, -1).T + whole[..., None]


# Chunks filled up with zeros, sums of log decays in float64, dA from U and W without dT, dg without dgc and differences
SKIPPED = ("dT_U", "dT_W", "dT", "dgc")
PADDED = DeltaForm(
    padded=True,
    forward=CHUNKED.forward | steps(
        gc=lambda G: np.cumsum(G, -1, dtype=np.float64),
        Gamma=lambda gc, K: decays(gc).astype(K.dtype),
        decay=lambda gc, K: np.exp(gc).astype(K.dtype)[..., None],
        tail=lambda gc, gc_end, K: np.exp(gc_end - gc).astype(K.dtype)[..., None],
        whole=lambda gc_end, K: np.exp(gc_end).astype(K.dtype)[..., None],
    ),
    backward={name: step for name, step in CHUNKED.backward.items() if name not in SKIPPED} | steps(
        tail_back=lambda gc, gc_end_back, K: np.exp(gc_end_back - gc).astype(K.dtype)[..., None],
        whole_back=lambda gc_end_back, K: np.exp(gc_end_back).astype(K.dtype)[..., None],
        d_whole=lambda whole_back, S, dS_next: (whole_back * S * dS_next).sum((-2, -1)),
        # -T^T dT T^T, where dT T^T is dU U^T + dW W^T
        dA=lambda dot_back, d_bV, U, d_bK, W: -np.tril(dot_back(d_bV, t(U)) + dot_back(d_bK, t(W)), -1),
        pair_P=lambda dQK, QK: np.tril(dQK * QK, -1),
        dG=lambda pair, row_Q, row_W, d_tail, d_whole: log_decay_gradient(pair, row_Q + row_W, d_tail, d_whole),
    ))


# ------------------------------------------------------------------------------------------- the other operators

def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def dot_rows(x, y):
    """(..., d), (..., d) -> (..., 1)."""
    return (x * y).sum(-1, keepdims=True)


def sum_rows(x):
    """Over all axes but the last."""
    return x.reshape(-1, x.shape[-1]).sum(0)


def tap_rows(position, sequence, bounds, K):
    """Row of `stacked`, the K - 1 rows of every state and then the tokens, at a position of a sequence; positions
    before its first token are in its state."""
    N = len(bounds) - 1
    return np.where(position < 0, sequence * (K - 1) + K - 1 + position, N * (K - 1) + bounds[sequence] + position)


def taps(bounds, K):
    """(T, K): the rows of `stacked` that meet the K taps at each token."""
    sequence = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    position = np.arange(bounds[-1]) - bounds[sequence]
    return tap_rows(position[:, None] + np.arange(1 - K, 1), sequence[:, None], bounds, K)


def last_taps(bounds, K):
    """(N, K - 1): the rows of `stacked` that are each sequence's final state."""
    return tap_rows(np.diff(bounds)[:, None] + np.arange(1 - K, 0), np.arange(len(bounds) - 1)[:, None], bounds, K)


def scatter_add(shape, *parts):
    """Zeros, and for every (places, values) the values added there."""
    out = np.zeros(shape, parts[0][1].dtype)
    for places, values in parts:
        np.add.at(out, places, values)
    return out


CONV = Form(
    defaults={"cu_seqlens": None},
    forward=steps(
        bounds=lambda x, cu_seqlens: np.arange(len(x) + 1) * x.shape[1] if cu_seqlens is None else cu_seqlens,
        place=lambda bounds, w: taps(bounds, w.shape[1]),
        last_place=lambda bounds, w: last_taps(bounds, w.shape[1]),
        stacked=lambda state, x: np.concatenate([state.reshape(-1, x.shape[2]), x.reshape(-1, x.shape[2])]),
        window=lambda stacked, place: stacked[place],                      # (T, K, ch)
        c=lambda window, w, x: np.einsum("tkc,ck->tc", window, w).reshape(x.shape),
        s=lambda c: sigmoid(c),
        y=lambda c, s: c * s,
        state_end=lambda stacked, last_place: stacked[last_place],
    ),
    backward=steps(
        slope=lambda c, s: s + c * s * (1 - s),
        dc=lambda dy, slope: dy * slope,
        d_window=lambda dc, w: dc.reshape(-1, 1, len(w)) * w.T,
        d_stacked=lambda stacked, place, d_window, last_place, dstate_end:
            scatter_add(stacked.shape, (place, d_window), (last_place, dstate_end)),
        dstate=lambda d_stacked, state, x: d_stacked[:len(d_stacked) - x[..., 0].size].reshape(state.shape),
        dx=lambda d_stacked, x: d_stacked[len(d_stacked) - x[..., 0].size:].reshape(x.shape),
        dw=lambda dc, window: np.einsum("tc,tkc->ck", dc.reshape(len(window), -1), window),
    ))

GATE = Form(
    forward=steps(
        z=lambda a, dt_bias: a.astype(np.float64) + dt_bias,
        A=lambda A_log: np.exp(A_log.astype(np.float64)),
        step=lambda z: np.logaddexp(z, 0),
        g=lambda A, step, a: (-A * step).astype(a.dtype),
        beta=lambda b: sigmoid(b),
    ),
    backward=steps(
        slope=lambda beta: beta * (1 - beta),
        db=lambda dbeta, slope: dbeta * slope,
        dz=lambda A, z, dg: -A * sigmoid(z) * dg,
        da=lambda dz, dg: dz.astype(dg.dtype),
        dA_log=lambda A, step, dg: sum_rows(-A * step * dg).astype(dg.dtype),
        ddt_bias=lambda dz, dg: sum_rows(dz).astype(dg.dtype),
    ))

L2 = Form(
    forward=steps(
        total=lambda x: dot_rows(x, x),
        r=lambda total, eps: 1 / np.sqrt(total + eps),
        y=lambda x, r: x * r,
    ),
    backward=steps(
        along=lambda y, dy: dot_rows(y, dy),
        dx=lambda r, dy, y, along: r * (dy - y * along),
    ))

RMS = Form(
    forward=steps(
        mean=lambda x: dot_rows(x, x) / x.shape[-1],
        r=lambda mean, eps: 1 / np.sqrt(mean + eps),
        n=lambda x, r: x * r,
        y=lambda n, w: n * w,
    ),
    backward=steps(
        dn=lambda dy, w: dy * w,
        dw=lambda dy, n: sum_rows(dy * n),
        along=lambda n, dn: dot_rows(n, dn) / n.shape[-1],
        dx=lambda r, dn, n, along: r * (dn - n * along),
    ))

GATED_RMS = Form(
    forward=steps(
        mean=lambda x: dot_rows(x, x) / x.shape[-1],
        r=lambda mean, eps: 1 / np.sqrt(mean + eps),
        n=lambda x, r: x * r,
        s=lambda z: sigmoid(z),
        gate=lambda z, s: z * s,
        y=lambda n, w, gate: n * w * gate,
    ),
    backward=steps(
        slope=lambda s, gate: s + gate * (1 - s),
        dz=lambda dy, n, w, slope: dy * n * w * slope,
        dw=lambda dy, n, gate: sum_rows(dy * n * gate),
        dn=lambda dy, w, gate: dy * w * gate,
        along=lambda n, dn: dot_rows(n, dn) / n.shape[-1],
        dx=lambda r, dn, n, along: r * (dn - n * along),
    ))


def section_axes(frequencies, sections):
    """The axis (0 time, 1 height, 2 width) whose position turns each frequency; all time without sections."""
    _, height, width = sections or (0, 0, 0)
    j = np.arange(frequencies)
    return np.where((j % 3 == 1) & (j < 3 * height), 1, np.where((j % 3 == 2) & (j < 3 * width), 2, 0))


def rotated(x, cos, sin, first, second):
    """The pairs of features (first_j, second_j) turned by the token's angles."""
    y, cos, sin = x.copy(), cos[:, None], sin[:, None]
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    return y


ROPE = Form(
    forward=steps(
        first=lambda rotary_dim: np.arange(rotary_dim // 2),
        second=lambda first: first + len(first),
        frequency=lambda theta, rotary_dim: theta ** (-2 * np.arange(rotary_dim // 2) / rotary_dim),
        axis=lambda frequency, sections: section_axes(len(frequency), sections),
        angle=lambda positions, axis, frequency: np.atleast_2d(positions)[axis].T * frequency,     # (L, R / 2)
        cos=lambda angle, x: np.cos(angle).astype(x.dtype),
        sin=lambda angle, x: np.sin(angle).astype(x.dtype),
        y=lambda x, cos, sin, first, second: rotated(x, cos, sin, first, second),
    ),
    backward=steps(
        sin_back=lambda sin: -sin,
        dx=lambda dy, cos, sin_back, first, second: rotated(dy, cos, sin_back, first, second),
    ))


def per_kv_head(x, kv_head, H_kv):
    """(B, M, H, d) -> (B, M, H_kv, d): the sum over the query heads of each kv head."""
    return np.stack([x[:, :, kv_head == h].sum(2) for h in range(H_kv)], 2)


ATTENTION = Form(
    forward=steps(
        kv_head=lambda q, k: np.arange(q.shape[2]) // (q.shape[2] // k.shape[2]),
        visible=lambda q, k: np.tri(q.shape[1], k.shape[1], k.shape[1] - q.shape[1], dtype=bool),   # (L, M)
        scores=lambda q, k, kv_head, scale: np.einsum("blhd,bmhd->bhlm", q * scale, k[:, :, kv_head]),
        peak=lambda scores, visible: np.where(visible, scores, -np.inf).max(-1, keepdims=True),
        weights=lambda scores, visible, peak: np.exp(np.where(visible, scores - peak, -np.inf)),
        P=lambda weights: weights / weights.sum(-1, keepdims=True),
        o=lambda P, v, kv_head: np.einsum("bhlm,bmhd->blhd", P, v[:, :, kv_head]),
        s=lambda gate: sigmoid(gate),
        y=lambda o, s: o * s,
    ),
    backward=steps(
        do=lambda dy, s: dy * s,
        slope=lambda s: s * (1 - s),
        dgate=lambda dy, o, slope: dy * o * slope,
        dP=lambda do, v, kv_head: np.einsum("blhd,bmhd->bhlm", do, v[:, :, kv_head]),
        mean=lambda P, dP: dot_rows(P, dP),
        d_scores=lambda P, dP, mean, scale: scale * P * (dP - mean),
        dq=lambda d_scores, k, kv_head: np.einsum("bhlm,bmhd->blhd", d_scores, k[:, :, kv_head]),
        dk_heads=lambda d_scores, q: np.einsum("bhlm,blhd->bmhd", d_scores, q),
        dv_heads=lambda P, do: np.einsum("bhlm,blhd->bmhd", P, do),
        dk=lambda dk_heads, kv_head, k: per_kv_head(dk_heads, kv_head, k.shape[2]),
        dv=lambda dv_heads, kv_head, k: per_kv_head(dv_heads, kv_head, k.shape[2]),
    ))

LOSS = Form(
    forward=steps(
        kept=lambda labels: labels != -100,
        target=lambda labels: np.maximum(labels, 0),                       # of rows that are kept
        count=lambda kept: max(int(kept.sum()), 1),
        peak=lambda logits: logits.max(1, keepdims=True),
        total=lambda logits, peak: np.exp(logits - peak).sum(1, keepdims=True),
        surprise=lambda logits, target, peak, total:
            (np.log(total) + peak - np.take_along_axis(logits, target[:, None], 1))[:, 0],
        loss=lambda surprise, kept, count, logits: np.asarray(surprise[kept].sum() / count, logits.dtype),
    ),
    backward=steps(
        weight=lambda kept, dloss, count: np.where(kept, dloss / count, 0)[:, None],
        dlogits=lambda logits, peak, total, labels, weight:
            (weight * (np.exp(logits - peak) / total - (np.arange(logits.shape[1]) == labels[:, None])))
            .astype(logits.dtype),
    ))

LORA = Form(
    forward=steps(
        h=lambda x, a, scale: scale * (x @ a.T),
        update=lambda h, b: h @ b.T,
        y=lambda x, w, update: x @ w.T + update,
    ),
    backward=steps(
        dh=lambda dy, b, scale: scale * (dy @ b),
        da=lambda dh, x: dh.T @ x,
        db=lambda dy, h: dy.T @ h,
        dx_update=lambda dh, a: dh @ a,
        dx=lambda dy, w, dx_update: dy @ w + dx_update,
    ))

DELTA = ("gated_delta_rule", "gated_delta_rule_step")
CHUNKED_FORMS = ("chunks", "padded")
# name: (form, the operators that it computes)
FORMS = {name: (form, DELTA) for name, form in (("rule", RULE), ("chunks", CHUNKED), ("padded", PADDED))}
FORMS |= {op: (form, (op,)) for op, form in {
    "causal_conv1d": CONV, "decay_gate": GATE, "l2_norm": L2, "rms_norm": RMS, "gated_rms_norm": GATED_RMS,
    "rope": ROPE, "gated_attention": ATTENTION, "cross_entropy": LOSS, "lora_linear": LORA}.items()}
