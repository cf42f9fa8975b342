"""THE table of mistakes in the other operators: number in catalogue.py, title, and two ways to make it.

The steps and their correct equations are in forms.py.
"""
import numpy as np

from deltanet_ref.oracle.cases import bfloat16
from deltanet_ref.oracle.mutants.forms import dot_rows, rotated, scatter_add, sum_rows
from deltanet_ref.oracle.mutants.mutations import Mistake, each, mutations_of, row_0_alone, without

conv, gate, l2, rms, gated_rms, rope, attention, loss, lora = map(mutations_of, (
    "causal_conv1d", "decay_gate", "l2_norm", "rms_norm", "gated_rms_norm", "rope", "gated_attention", "cross_entropy",
    "lora_linear"))


# ---- the convolution of packed sequences; dense batches are unchanged

def in_one_sequence(place, state, cu_seqlens, tokens):
    """The places of these tokens if the whole row were one sequence that follows the first state."""
    N, before, _ = state.shape
    return place if cu_seqlens is None else np.where(tokens < 0, before, N * before) + tokens


def state_before(x, state, cu_seqlens):
    """The last inputs in front of each sequence, whatever sequence they belong to."""
    if cu_seqlens is None:
        return state
    row = np.concatenate([state[0], x[0]])
    return np.stack([row[start:start + state.shape[1]] for start in cu_seqlens[:-1]])


def in_last_sequence(dc, cu_seqlens):
    """dc with zeros before the last packed sequence; unchanged for a dense batch."""
    return dc if cu_seqlens is None else dc * (np.arange(dc.shape[1]) >= cu_seqlens[-2])[:, None]


def spilled_in_a_loop(dx, dstate, cu_seqlens):
    """dx with the gradient of each later sequence's state added to the tokens before it."""
    dx = dx.copy()
    for n, start in enumerate([] if cu_seqlens is None else cu_seqlens[:-1]):
        reach = min(start, dstate.shape[1])
        dx[0, start - reach:start] += dstate[n, dstate.shape[1] - reach:]
    return dx


def spilled_by_index(dx, dstate, cu_seqlens):
    """The same by one indexed addition."""
    if cu_seqlens is None:
        return dx
    token = cu_seqlens[:-1, None] + np.arange(-dstate.shape[1], 0)
    return dx + scatter_add(dx.shape, ((0, token[token >= 0]), dstate[token >= 0]))


# ---- others

def paired_neighbours(x, rotary_dim):
    """The order of features that puts the pairs (0, 1), (2, 3) ... at (j, j + rotary_dim / 2)."""
    return np.r_[0:rotary_dim:2, 1:rotary_dim:2, rotary_dim:x.shape[3]]


def tiled_for_queries(x, q):
    """kv heads repeated so that query head h finds kv head h % H_kv at its place."""
    return np.tile(x, (1, 1, q.shape[2] // x.shape[2], 1))


def last_query_head(dk_heads, kv_head, k):
    """In place of the sum over the query heads of a kv head: the last of them."""
    return np.stack([dk_heads[:, :, np.flatnonzero(kv_head == h)[-1]] for h in range(k.shape[2])], 2)


FORWARD = (
    Mistake(1, "the convolution's window reaches into the sequence before",
            conv(place=lambda place, state, cu_seqlens, w: in_one_sequence(
                     place, state, cu_seqlens, np.arange(len(place))[:, None] + np.arange(1 - w.shape[1], 1)),
                 last_place=lambda last_place, state, cu_seqlens, bounds, w: in_one_sequence(
                     last_place, state, cu_seqlens, bounds[1:, None] + np.arange(1 - w.shape[1], 0))),
            conv(state=state_before)),
    Mistake(4, "the convolution's state ignored",
            conv(without("state")), conv(stacked=lambda state, x: np.concatenate([*(0 * state), *x]))),
    Mistake(4, "the convolution's state newest first",
            conv(state=lambda state: state[:, ::-1]),
            conv(stacked=lambda state, x: np.concatenate([*state[:, ::-1], *x]))),
    Mistake(4, "the convolution's final state without the one before",
            conv(state_end=lambda state, x, last_place: np.concatenate([*(0 * state), *x])[last_place]),
            conv(state_end=lambda state_end, bounds: state_end * (
                np.diff(bounds)[:, None] + np.arange(-state_end.shape[1], 0) >= 0)[..., None])),
    Mistake(22, "no SiLU after the convolution", conv(y=lambda c: c), conv(s=lambda c: np.ones_like(c))),
    Mistake(22, "the taps of the convolution reversed",
            conv(w=lambda w: w[:, ::-1]), conv(window=lambda window: window[:, ::-1])),

    Mistake(5, "softplus overflows",
            gate(step=lambda z: np.log1p(np.exp(z.astype(np.float32)))),
            gate(g=lambda A, z, a: (-A * np.log1p(np.exp(z.astype(np.float32)))).astype(a.dtype))),
    Mistake(9, "-exp(A_log) exponentiated again",
            gate(A=lambda A: np.exp(-A)), gate(A_log=lambda A_log: -np.exp(A_log))),
    Mistake(9, "A_log not exponentiated",
            gate(A=lambda A_log: A_log.astype(np.float64)),
            gate(g=lambda A_log, step, a: (-A_log * step).astype(a.dtype))),
    Mistake(9, "A_log rounded to bfloat16",
            gate(each(bfloat16, "A_log")), gate(A=lambda A_log: np.exp(bfloat16(A_log).astype(np.float64)))),
    Mistake(22, "a and b swapped",
            gate(a=lambda b: b, b=lambda a: a),
            gate(z=lambda b, dt_bias: b.astype(np.float64) + dt_bias, beta=lambda a: 1 / (1 + np.exp(-a)))),
    Mistake(33, "g and beta returned in the other order",
            gate(g=lambda b: 1 / (1 + np.exp(-b)), beta=lambda A, step, a: (-A * step).astype(a.dtype)),
            gate(g=lambda b: np.exp(-np.logaddexp(-b, 0)),
                 beta=lambda A_log, z, a: -(np.exp(A_log) * np.logaddexp(z, 0)).astype(a.dtype))),

    Mistake(8, "eps on the mean",
            l2(r=lambda total, eps, x: 1 / np.sqrt(total + eps * x.shape[-1])),
            l2(eps=lambda eps, x: eps * x.shape[-1])),
    Mistake(8, "eps outside the root",
            l2(r=lambda total, eps: 1 / (np.sqrt(total) + eps)),
            l2(r=lambda total, eps: 1 / np.maximum(np.sqrt(total), eps))),
    Mistake(8, "no eps", l2(r=lambda total: 1 / np.sqrt(total)), l2(without("eps"))),
    Mistake(8, "the mean instead of the sum",
            l2(total=lambda total, x: total / x.shape[-1]),
            l2(r=lambda total, eps, x: x.shape[-1] ** 0.5 / np.sqrt(total + eps * x.shape[-1]))),
    Mistake(21, "1 + w instead of w", rms(w=lambda w: 1 + w), rms(y=lambda n, w: n + n * w)),
    Mistake(21, "no weight", rms(w=lambda w: np.ones_like(w)), rms(y=lambda n: n)),
    Mistake(21, "rounded to bfloat16 before the weight", rms(each(bfloat16, "n")), rms(y=lambda n, w: bfloat16(n) * w)),
    Mistake(21, "eps outside the root of the mean",
            rms(r=lambda mean, eps: 1 / (np.sqrt(mean) + eps)),
            rms(r=lambda mean, eps: 1 / np.maximum(np.sqrt(mean), eps))),
    Mistake(21, "the sum instead of the mean",
            rms(mean=lambda x: dot_rows(x, x)),
            rms(r=lambda mean, eps, x: x.shape[-1] ** -0.5 / np.sqrt(mean + eps / x.shape[-1]))),
    Mistake(21, "the gate before the norm",
            gated_rms(x=lambda x, z: x * z / (1 + np.exp(-z)), gate=lambda gate: np.ones_like(gate)),
            gated_rms(y=lambda x, gate, w, eps: x * gate * w / np.sqrt(
                dot_rows(x * gate, x * gate) / x.shape[-1] + eps))),
    Mistake(21, "a sigmoid instead of the gate's SiLU",
            gated_rms(gate=lambda s: s), gated_rms(y=lambda y, z: y / z)),

    Mistake(30, "every feature rotated",
            rope(rotary_dim=lambda x: x.shape[-1]),
            rope(first=lambda x: np.arange(x.shape[-1] // 2),
                 frequency=lambda theta, x: theta ** (-2 * np.arange(x.shape[-1] // 2) / x.shape[-1]))),
    Mistake(30, "frequencies of the whole head",
            rope(theta=lambda theta, rotary_dim, x: theta ** (rotary_dim / x.shape[-1])),
            rope(frequency=lambda theta, rotary_dim, x: theta ** (-2 * np.arange(rotary_dim // 2) / x.shape[-1]))),
    Mistake(30, "theta fixed to 10000",
            rope(theta=lambda: 1e4),
            rope(frequency=lambda rotary_dim: 1e4 ** (-2 * np.arange(rotary_dim // 2) / rotary_dim))),
    Mistake(30, "neighbours as pairs",
            rope(first=lambda rotary_dim: np.arange(0, rotary_dim, 2), second=lambda first: first + 1),
            rope(x=lambda x, rotary_dim: x[..., paired_neighbours(x, rotary_dim)],
                 y=lambda y, rotary_dim: y[..., np.argsort(paired_neighbours(y, rotary_dim))])),
    Mistake(30, "rotated in the other direction",
            rope(sin=lambda sin: -sin), rope(positions=lambda positions: -positions)),
    Mistake(30, "one axis for all sections",
            rope(positions=lambda positions: np.atleast_2d(positions)[[0, 0, 0]]), rope(without("axis"))),
    Mistake(30, "sections one after the other",
            rope(axis=lambda axis, sections: np.repeat([0, 1, 2], sections) if sections else axis),
            rope(axis=lambda axis, sections: np.searchsorted(np.cumsum(sections), np.arange(len(axis)), "right")
                 if sections else axis)),

    Mistake(2, "query head h reads kv head h % H_kv",
            attention(kv_head=lambda q, k: np.arange(q.shape[2]) % k.shape[2]),
            attention(k=lambda k, q: tiled_for_queries(k, q), v=lambda v, q: tiled_for_queries(v, q))),
    Mistake(4, "past keys left out of the causal mask",
            attention(visible=lambda q, k: np.tri(q.shape[1], k.shape[1], dtype=bool)),
            attention(k=lambda k, q: k[:, :q.shape[1]], v=lambda v, q: v[:, :q.shape[1]])),
    Mistake(5, "softmax without the largest score subtracted",
            attention(peak=lambda peak: 0 * peak), attention(peak=lambda peak: np.minimum(peak, 0)), by="size"),
    Mistake(7, "no scale of the scores",
            attention(scale=lambda: 1.0), attention(scores=lambda scores, scale: scores / scale)),
    Mistake(7, "scores scaled twice",
            attention(scale=lambda scale: scale ** 2), attention(scores=lambda scores, scale: scores * scale)),
    Mistake(22, "no gate after attention",
            attention(gate=lambda gate: np.full_like(gate, 40)), attention(y=lambda o: o)),
    Mistake(22, "a SiLU instead of the sigmoid of attention's gate",
            attention(s=lambda s, gate: s * gate), attention(y=lambda y, gate: y * gate)),

    Mistake(35, "ignored labels counted in the mean",
            loss(count=lambda labels: len(labels)),
            loss(loss=lambda surprise, kept: np.mean(surprise * kept))),
    Mistake(35, "ignored labels read as label 0",
            loss(labels=lambda labels: np.maximum(labels, 0)), loss(kept=lambda kept: np.ones_like(kept))),
    Mistake(36, "nothing kept: 0 / 0",
            loss(count=lambda kept: kept.sum()), loss(loss=lambda surprise, kept: surprise[kept].sum() / kept.sum())),
    Mistake(36, "labels shifted once more",
            loss(labels=lambda labels: np.roll(labels, -1)), loss(logits=lambda logits: np.roll(logits, 1, 0))),
    Mistake(5, "softmax without the largest logit subtracted",
            loss(peak=lambda peak: 0 * peak), loss(peak=lambda peak: np.minimum(peak, 0)), by="size"),

    Mistake(24, "the adapter's update left out", lora(without("update")), lora(y=lambda x, w: x @ w.T)),
)

BACKWARD = (
    Mistake(14, "dstate_end of the convolution ignored",
            conv(without("dstate_end")),
            conv(d_stacked=lambda stacked, place, d_window: scatter_add(stacked.shape, (place, d_window)))),
    Mistake(14, "dstate of the convolution lost",
            conv(without("dstate")), conv(dstate=lambda state: np.zeros_like(state))),
    Mistake(15, "dw of the convolution from row 0",
            conv(dw=lambda dc, window: np.einsum("tc,tkc->ck", row_0_alone(dc).reshape(len(window), -1), window)),
            conv(dw=lambda dc, window: np.einsum("tc,tkc->ck", dc[0], window[:dc.shape[1]]))),
    Mistake(16, "dw of the last sequence alone",
            conv(dw=lambda dc, window, cu_seqlens: np.einsum(
                "tc,tkc->ck", in_last_sequence(dc, cu_seqlens).reshape(len(window), -1), window)),
            conv(dw=lambda dw, dc, window, cu_seqlens: dw if cu_seqlens is None else np.einsum(
                "tc,tkc->ck", dc[0, cu_seqlens[-2]:], window[cu_seqlens[-2]:]))),
    Mistake(16, "dw without the state",
            conv(dw=lambda dc, window, place, state: np.einsum(
                "tc,tkc->ck", dc.reshape(len(window), -1), window * (place >= state[..., 0].size)[..., None])),
            conv(dw=lambda dc, state, x, place: np.einsum(
                "tc,tkc->ck", dc.reshape(len(place), -1), np.concatenate([*(0 * state), *x])[place]))),
    Mistake(16, "the window's gradient reaches into the sequence before",
            conv(dx=spilled_in_a_loop), conv(dx=spilled_by_index)),
    Mistake(22, "no slope of the SiLU", conv(slope=lambda slope: np.ones_like(slope)), conv(dc=lambda dy: dy)),

    Mistake(9, "dA_log is the gradient of exp(A_log)",
            gate(dA_log=lambda dA_log, A_log: dA_log * np.exp(-A_log)),
            gate(dA_log=lambda step, dg: sum_rows(-step * dg).astype(dg.dtype))),
    Mistake(11, "db without the slope of the sigmoid",
            gate(db=lambda dbeta: dbeta), gate(slope=lambda slope: np.ones_like(slope))),
    Mistake(11, "da without the slope of the softplus",
            gate(dz=lambda A, dg: -A * dg), gate(dz=lambda dz, z: dz * (1 + np.exp(-z)))),
    Mistake(15, "dA_log and ddt_bias of row 0",
            gate(dA_log=lambda A, step, dg: sum_rows(-A * step[:1] * dg[:1]).astype(dg.dtype),
                 ddt_bias=lambda dz, dg: sum_rows(dz[:1]).astype(dg.dtype)),
            gate(dA_log=lambda A, step, dg: sum_rows(-A * step * row_0_alone(dg)).astype(dg.dtype),
                 ddt_bias=lambda dz, dg: sum_rows(row_0_alone(dz)).astype(dg.dtype))),

    Mistake(8, "0 / 0 at a zero row",
            l2(dx=lambda dx, y: dx * dot_rows(y, y) / dot_rows(y, y)),
            l2(dx=lambda dx, y: dx / np.sqrt(dot_rows(y, y)) * np.sqrt(dot_rows(y, y)))),
    Mistake(11, "dx of the L2 norm not made orthogonal to y", l2(without("along")), l2(dx=lambda r, dy: r * dy)),
    Mistake(11, "dx of the RMS norm not made orthogonal to x", rms(without("along")), rms(dx=lambda r, dn: r * dn)),
    Mistake(15, "dw of the RMS norm from row 0",
            rms(dw=lambda dy, n: sum_rows(dy[:1] * n[:1])), rms(dw=lambda dy, n: sum_rows(row_0_alone(dy) * n))),
    Mistake(11, "dz without the slope of its sigmoid",
            gated_rms(slope=lambda s: s), gated_rms(dz=lambda dy, n, w, s: dy * n * w * s)),

    Mistake(30, "rotated again instead of back",
            rope(sin_back=lambda sin: sin),
            rope(dx=lambda dy, cos, sin, first, second: rotated(dy, cos, sin, first, second))),

    Mistake(2, "one query head's gradient for its kv head",
            attention(dk=last_query_head, dv=lambda dv_heads, kv_head, k: last_query_head(dv_heads, kv_head, k)),
            attention(each(lambda d, kv_head: d * np.append(np.diff(kv_head), 1)[:, None], "dk_heads", "dv_heads",
                           also=("kv_head",)))),
    Mistake(7, "no scale in the backward of attention",
            attention(d_scores=lambda P, dP, mean: P * (dP - mean)),
            attention(each(lambda d, scale: d / scale, "dq", "dk", also=("scale",)))),
    Mistake(11, "dP without its mean",
            attention(without("mean")), attention(d_scores=lambda P, dP, scale: scale * P * dP)),
    Mistake(11, "dgate without the slope of the sigmoid",
            attention(slope=lambda s: s), attention(dgate=lambda do, o: do * o)),

    Mistake(35, "ignored labels have a gradient",
            loss(weight=lambda kept, dloss, count: np.full((len(kept), 1), dloss / count)),
            loss(dlogits=lambda dlogits, kept, logits, peak, total, dloss, count: np.where(
                kept[:, None], dlogits, np.exp(logits - peak) / total * (dloss / count)))),
    Mistake(35, "the gradient of a sum, not of a mean",
            loss(weight=lambda weight, count: weight * count),
            loss(dloss=lambda dloss, labels: dloss * max((labels >= 0).sum(), 1))),
    Mistake(35, "the gradient of a mean over all rows",
            loss(weight=lambda kept, dloss: kept[:, None] * dloss / len(kept)),
            loss(dlogits=lambda dlogits, count, kept: dlogits * dlogits.dtype.type(count / len(kept)))),

    Mistake(24, "the adapter's factors have no gradient",
            lora(without("da", "db")), lora(da=lambda a: np.zeros_like(a), db=lambda b: np.zeros_like(b))),
    Mistake(11, "dx not through the adapter", lora(without("dx_update")), lora(dx=lambda dy, w: dy @ w)),
)
