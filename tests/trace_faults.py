"""A small random model, and models and traces with one mistake each, which `diff` must find and name.

A mistake is planted in the operators or weights of a model, which then runs as a whole; or, if it is between two
operators, in a copy of a trace.
"""

from types import SimpleNamespace

import numpy as np

from deltanet_ref import ops
from deltanet_ref.model.config import Config
from deltanet_ref.model.qwen35 import Qwen35
from deltanet_ref.model.tensors import expected_tensors
from deltanet_ref.model.weights import Weights
from deltanet_ref.oracle.trace import trace

DELTA, ATTENTION = "linear_attention", "full_attention"
CONFIG = Config(
    vocab_size=61,
    hidden_size=38,
    intermediate_size=50,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=8,
    linear_value_head_dim=5,
    linear_conv_kernel_dim=4,
    rms_norm_eps=1e-6,
    rope_theta=1e5,
    partial_rotary_factor=0.5,
    mrope_section=(2, 1, 1),
    layer_types=(DELTA, ATTENTION, DELTA),
    tie_word_embeddings=True,
    max_position_embeddings=99,
)
TOKENS = np.random.default_rng(5).integers(0, CONFIG.vocab_size, 83)


def random_weights(config=CONFIG, seed=3):
    """Norm weights near 1, decays from weak to strong, and matrices scaled so that activations stay near 1."""
    rng, stored = np.random.default_rng(seed), {}
    for name, spec in expected_tensors(config).items():
        x = rng.standard_normal(spec.shape)
        if name.endswith("ssm_a"):
            x = -np.exp(0.5 + x)
        elif name.endswith("dt.bias"):
            x -= 2
        elif x.ndim == 1:
            x = 1 + 0.3 * x
        elif name != "token_embd.weight":
            x *= 1.5 / np.sqrt(spec.shape[1])
        stored[name] = x
    return stored


def model(config=CONFIG, changed=None, operators=None):
    """A float64 model; changed: tensor name -> function of the tensor; operators: name -> replacement of the op."""
    stored = random_weights(config)
    for name, change in (changed or {}).items():
        stored[name] = np.ascontiguousarray(change(stored[name]))
    return Qwen35(config, Weights(config, stored, "float64", SimpleNamespace(**vars(ops) | (operators or {}))))


def run(**faults):
    return trace(model(**faults), TOKENS, backward=True)


def operators(**replaced):
    return lambda ours: run(operators=replaced)


def weights(name, change):
    return lambda ours: run(changed={name: change})


def edited(name, change):
    """A copy of the trace in which one tensor is replaced by change(tensors)."""
    return lambda ours: ours._replace(tensors=ours.tensors | {name: np.ascontiguousarray(change(ours.tensors))})


# ---- operators with a mistake


def conv(change):
    def wrapped(x, w, **options):
        y, state, cache = ops.causal_conv1d_forward(x, w, **options)
        return change(x, y, cache.c), state, cache

    return operators(causal_conv1d_forward=wrapped)


def l2_norm(change):
    return operators(l2_norm_forward=lambda x: (change(x), ops.l2_norm_forward(x)[1]))


def gates(change):
    def wrapped(a, b, A_log, dt_bias):
        g, beta, cache = ops.decay_gate_forward(a, b, A_log, dt_bias)
        g, beta = change(SimpleNamespace(a=a, b=b, A=np.exp(A_log), dt_bias=dt_bias, g=g, beta=beta))
        return g, beta, cache

    return operators(decay_gate_forward=wrapped)


def delta(change):
    """Replace the rule by change(q, k, v, g, beta) -> o, S, for tiled heads."""

    def wrapped(q, k, v, *, g, beta, **options):
        cache = ops.gated_delta_rule_forward(q, k, v, g=g, beta=beta, **options)[2]
        return *change(q, k, v, g, beta), cache

    return operators(gated_delta_rule_forward=wrapped)


def rule(q, k, v, g, beta, head_order="tiled", **options):
    return ops.gated_delta_rule_forward(q, k, v, g=g, beta=beta, head_order=head_order, **options)[:2]


def token_loop(q, k, v, g, beta, error_first=False, read_first=False):
    """The rule for tiled heads, one head at a time, in the form S = (I - beta k k^T) exp(g) S + beta k v."""
    o, S_end = np.empty_like(v), np.empty((1, v.shape[2], k.shape[3], v.shape[3]))
    for h in range(v.shape[2]):
        S, I = np.zeros(S_end.shape[2:]), np.eye(k.shape[3])
        for t in range(v.shape[1]):
            key, query = k[0, t, h % k.shape[2]], q[0, t, h % k.shape[2]]
            alpha, b = np.exp(g[0, t, h]), beta[0, t, h]
            before = alpha * S
            erased = alpha * S - b * np.outer(key, key) @ S if error_first else (I - b * np.outer(key, key)) @ before
            S = erased + b * np.outer(key, v[0, t, h])
            o[0, t, h] = (before if read_first else S).T @ query / np.sqrt(len(key))
        S_end[0, h] = S
    return o, S_end


def linear_attention(q, k, v, g, beta):
    """o_t = sum over s <= t of the decay from s to t times beta_s (q_t . k_s) v_s; and the correct state."""
    heads = np.arange(v.shape[2]) % k.shape[2]
    sums = np.cumsum(g, 1)
    decay = np.exp(np.minimum(sums[:, :, None] - sums[:, None], 0)) * np.tri(g.shape[1])[None, :, :, None]
    weights = np.einsum("bthk,bshk->btsh", q[:, :, heads], k[:, :, heads]) * decay * beta[:, None] / np.sqrt(k.shape[3])
    return np.einsum("btsh,bshv->bthv", weights, v), rule(q, k, v, g, beta)[1]


def modulo_heads():
    """The key head of each tiled value head if its index in grouped order is taken modulo H_k."""
    H_k, R = CONFIG.linear_num_key_heads, CONFIG.linear_num_value_heads // CONFIG.linear_num_key_heads
    return [(t % H_k * R + t // H_k) % H_k for t in range(H_k * R)]


def pieces(size):
    """The rule on pieces of `size` tokens, each starting from a zero state."""

    def change(*arrays):
        parts = [rule(*(x[:, i : i + size] for x in arrays)) for i in range(0, arrays[0].shape[1], size)]
        return np.concatenate([o for o, _ in parts], 1), parts[-1][1]

    return delta(change)


def gated_norm(change):
    def wrapped(o, z, w, eps):
        return change(o, z, w), ops.gated_rms_norm_forward(o, z, w, eps)[1]

    return operators(gated_rms_norm_forward=wrapped)


def normalised(x, axis=-1, eps=1e-6):
    return x / np.sqrt((x**2).mean(axis, keepdims=True) + eps)


def rms_norm(change):
    return operators(rms_norm_forward=lambda x, w, eps: (change(x, w), ops.rms_norm_forward(x, w, eps)[1]))


def rotary(change=None, **options):
    """Replace the rotation of x (1, L, H, d) by change(x, angle (L, R/2)); or give rope_tables other options."""
    if change:
        return operators(rope_forward=lambda x, cos, sin: change(x, np.arctan2(sin, cos)))
    first, theta, dim = (options.get(key) for key in ("first", "theta", "dim"))

    def tables(positions, rotary_dim, base, sections, dtype):
        return ops.rope_tables(positions + (first or 0), dim or rotary_dim, theta or base, sections, dtype)

    return operators(rope_tables=tables)


def complex_rotation(x, angle):
    """Neighbours (2j, 2j + 1) as complex numbers."""
    y, R = x.copy(), 2 * angle.shape[1]
    turned = (x[..., 0:R:2] + 1j * x[..., 1:R:2]) * np.exp(1j * angle)[:, None]
    y[..., 0:R:2], y[..., 1:R:2] = turned.real, turned.imag
    return y


def last_rotated(x, angle):
    R = 2 * angle.shape[1]
    return np.concatenate([x[..., :-R], ops.rope_forward(x[..., -R:], np.cos(angle), np.sin(angle))], -1)


def attention(change):
    def wrapped(q, k, v, **options):
        return change(q, k, v), ops.softmax_attention_forward(q, k, v, **options)[1]

    return operators(softmax_attention_forward=wrapped)


def other_heads(q, k, v):
    copies = q.shape[2] // k.shape[2]
    return ops.softmax_attention_forward(q, np.tile(k, (1, 1, copies, 1)), np.tile(v, (1, 1, copies, 1)))[0]


def unmasked(q, k, v):
    copies = q.shape[2] // k.shape[2]
    scores = np.einsum("bihd,bjhd->bhij", q, k.repeat(copies, 2)) / np.sqrt(q.shape[3])
    p = np.exp(scores)
    return np.einsum("bhij,bjhd->bihd", p / p.sum(-1, keepdims=True), v.repeat(copies, 2))


def query_rows(order):
    """attn_q read in another layout: all queries first ("halves"), or queries and gates row by row ("in turn")."""
    H, d = CONFIG.num_attention_heads, CONFIG.head_dim
    index = {
        "halves": np.arange(2 * H * d).reshape(2, H, d).transpose(1, 0, 2),
        "in turn": np.arange(2 * H * d).reshape(H, d, 2).transpose(0, 2, 1),
    }[order]
    return weights("blk.1.attn_q.weight", lambda w: w[index.ravel()])


def grouped_rows(w, start, size, axis=0):
    """Reorder V heads from the file's tiled order to grouped order."""
    H_k, R = CONFIG.linear_num_key_heads, CONFIG.linear_num_value_heads // CONFIG.linear_num_key_heads
    heads = [r * H_k + k for k in range(H_k) for r in range(R)]
    rows = [*range(start), *(start + h * size + i for h in heads for i in range(size))]
    return w.take(rows, axis)


def tiled_columns(x, start, size):
    """Reorder the last axis of x (L, start + H_v size) to tiled order, the inverse of grouped_rows."""
    H_k, R = CONFIG.linear_num_key_heads, CONFIG.linear_num_value_heads // CONFIG.linear_num_key_heads
    heads = x[:, start:].reshape(len(x), H_k, R, size).swapaxes(1, 2).reshape(len(x), -1)
    return np.concatenate([x[:, :start], heads], -1)


def swiglu(change):
    return operators(swiglu_forward=lambda gate, up: (change(gate, up), ops.swiglu_forward(gate, up)[1]))


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def bfloat16(x):
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


def backward(operator, change):
    """Replace a backward operator by change(its gradients)."""
    return operators(**{operator: lambda *args, **options: change(*getattr(ops, operator)(*args, **options))})


def tf32(x):
    return (np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def per_head(name):
    """A parameter (H_v,) in grouped order."""
    return grouped_rows(random_weights()[name], 0, 1)


silu, sigmoid = ops.silu, ops.sigmoid
QK = 2 * CONFIG.linear_key_dim
d_k, d_v, d = CONFIG.linear_key_head_dim, CONFIG.linear_value_head_dim, CONFIG.head_dim
L = len(TOKENS)


def exchanged(name_a, name_b):
    """Two weights of block 0 swapped."""
    stored = random_weights()
    return lambda ours: run(
        changed={f"blk.0.{a}": lambda w, b=b: stored[f"blk.0.{b}"] for a, b in ((name_a, name_b), (name_b, name_a))}
    )


# mistake: (first tensor that differs, words of the expected reason, function that plants it)
FAULTS = {
    # any tensor
    "zeros": ("blk.0.z", "all zeros", weights("blk.0.attn_gate.weight", lambda w: 0 * w)),
    "z from HF's order": (
        "blk.0.z",
        "reordered as if they were tiled",
        weights("blk.0.attn_gate.weight", lambda w: grouped_rows(w, 0, d_v)),
    ),
    "qkv from HF's order": (
        "blk.0.qkv",
        "reordered as if they were tiled",
        weights("blk.0.attn_qkv.weight", lambda w: grouped_rows(w, QK, d_v)),
    ),
    "b from HF's order": (
        "blk.0.b",
        "reordered as if they were tiled",
        weights("blk.0.ssm_beta.weight", lambda w: grouped_rows(w, 0, 1)),
    ),
    "qkv left tiled": (
        "blk.0.qkv",
        "in tiled order",
        edited("blk.0.qkv", lambda t: tiled_columns(t["blk.0.qkv"], QK, d_v)),
    ),
    "heads exchanged": (
        "blk.0.k",
        "heads are permuted: their heads 0, 1, ... are our heads 1, 0",
        edited("blk.0.k", lambda t: t["blk.0.k"][:, ::-1]),
    ),
    "embedding scaled": (
        "embed",
        "D^0.5",
        operators(embedding_forward=lambda t, w: ops.embedding_forward(t, w) * np.sqrt(CONFIG.hidden_size)),
    ),
    "a sign": ("blk.0.g", "-1: the sign is wrong", edited("blk.0.g", lambda t: -t["blk.0.g"])),
    "a token late": (
        "blk.0.conv",
        "1 token late",
        edited("blk.0.conv", lambda t: np.pad(t["blk.0.conv"], ((1, 0), (0, 0)))[:-1]),
    ),
    "two tokens early": ("blk.2.v", "2 tokens early", edited("blk.2.v", lambda t: np.roll(t["blk.2.v"], -2, 0))),
    "tokens reversed": ("blk.0.o", "reverse order", edited("blk.0.o", lambda t: t["blk.0.o"][::-1])),
    "features before heads": (
        "blk.0.v",
        "transposed: (L, d_v, H_v)",
        edited("blk.0.v", lambda t: t["blk.0.v"].swapaxes(1, 2).reshape(t["blk.0.v"].shape)),
    ),
    "heads before tokens": (
        "blk.1.o",
        "transposed: (H, L, d)",
        edited("blk.1.o", lambda t: t["blk.1.o"].swapaxes(0, 1).reshape(t["blk.1.o"].shape)),
    ),
    "b and a exchanged": ("blk.0.b", "values of a", exchanged("ssm_beta.weight", "ssm_alpha.weight")),
    "gate and up exchanged": ("blk.0.ffn_gate", "values of ffn_up", exchanged("ffn_gate.weight", "ffn_up.weight")),
    "a factor per feature": (
        "blk.0.ffn_norm",
        "one factor per feature",
        weights("blk.0.post_attention_norm.weight", lambda w: w * np.linspace(0.5, 2, len(w))),
    ),
    "a factor per token": (
        "blk.0.mixer_out",
        "one factor per token",
        edited("blk.0.mixer_out", lambda t: t["blk.0.mixer_out"] * np.linspace(1, 3, L)[:, None]),
    ),
    "bfloat16": ("blk.1.q", "bfloat16 numbers", edited("blk.1.q", lambda t: bfloat16(t["blk.1.q"]))),
    "float16": (
        "blk.1.k",
        "float16 numbers",
        edited("blk.1.k", lambda t: t["blk.1.k"].astype(np.float16).astype(np.float64)),
    ),
    "TF32": (
        "blk.0.qkv",
        "numbers with about 1",
        operators(linear_forward=lambda x, w: ops.linear_forward(tf32(x), tf32(w))),
    ),
    # RMS norms
    "w for 1 + w": ("blk.0.attn_norm", "w instead of 1 + w", weights("blk.0.attn_norm.weight", lambda w: w - 1)),
    "1 + w twice": (
        "blk.0.ffn_norm",
        "added to the norm's weight twice",
        weights("blk.0.post_attention_norm.weight", lambda w: w + 1),
    ),
    "norm weight left out": ("output_norm", "weight is missing", weights("output_norm.weight", np.ones_like)),
    "not normalised": ("blk.0.attn_norm", "not normalised", rms_norm(lambda x, w: x * w)),
    "layer norm": (
        "blk.0.attn_norm",
        "layer norm",
        rms_norm(lambda x, w: normalised(x - x.mean(-1, keepdims=True)) * w),
    ),
    "norm eps": ("blk.0.attn_norm", "eps is 1e-05", rms_norm(lambda x, w: normalised(x, eps=1e-5) * w)),
    "norm eps outside": (
        "blk.0.attn_norm",
        "outside the square root",
        rms_norm(lambda x, w: x / (np.sqrt((x**2).mean(-1, keepdims=True)) + 1e-6) * w),
    ),
    "q norm w for 1 + w": ("blk.1.q_norm", "w instead of 1 + w", weights("blk.1.attn_q_norm.weight", lambda w: w - 1)),
    "k norm w for 1 + w": ("blk.1.k_norm", "w instead of 1 + w", weights("blk.1.attn_k_norm.weight", lambda w: w - 1)),
    # the delta layer
    "no SiLU": ("blk.0.conv", "SiLU after the convolution is missing", conv(lambda x, y, c: c)),
    "SiLU twice": ("blk.0.conv", "SiLU is applied twice", conv(lambda x, y, c: silu(y))),
    "taps reversed": (
        "blk.0.conv",
        "taps are in reverse order",
        weights("blk.0.ssm_conv1d.weight", lambda w: w[:, ::-1]),
    ),
    "no convolution": ("blk.0.conv", "convolution is missing", conv(lambda x, y, c: silu(x))),
    "conv state of outputs": (
        "blk.0.conv_state",
        "outputs instead of its inputs",
        edited("blk.0.conv_state", lambda t: t["blk.0.conv"][-3:]),
    ),
    "conv state without the last": (
        "blk.0.conv_state",
        "last token is missing",
        edited("blk.0.conv_state", lambda t: t["blk.0.qkv"][-4:-1]),
    ),
    "no L2 norm": ("blk.0.q", "not L2-normalised", l2_norm(lambda x: x)),
    "RMS for L2": ("blk.0.q", "RMS norm instead of L2 norm", l2_norm(normalised)),
    "L2 over heads": (
        "blk.0.q",
        "all heads together",
        l2_norm(lambda x: x / np.sqrt((x**2).sum((-1, -2), keepdims=True) + 1e-6)),
    ),
    "L2 eps on the mean": ("blk.0.q", "mean of the squares", l2_norm(lambda x: normalised(x) / np.sqrt(x.shape[-1]))),
    "L2 eps outside": (
        "blk.0.q",
        "outside the square root",
        l2_norm(lambda x: x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)),
    ),
    "L2 eps as a floor": (
        "blk.0.q",
        "max(norm, eps)",
        l2_norm(lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)),
    ),
    "L2 eps": ("blk.0.q", "eps is 1e-12", l2_norm(lambda x: ops.l2_norm_forward(x, eps=1e-12)[0])),
    "q scaled before": ("blk.0.q", "d_k^-0.5", l2_norm(lambda x: ops.l2_norm_forward(x)[0] / np.sqrt(x.shape[-1]))),
    "g is the decay": ("blk.0.g", "exp(g), not its logarithm", gates(lambda s: (np.exp(s.g), s.beta))),
    "no dt_bias": ("blk.0.g", "dt_bias is missing", gates(lambda s: (-s.A * np.log1p(np.exp(s.a)), s.beta))),
    "no softplus": (
        "blk.0.g",
        "softplus is missing",
        edited("blk.0.g", lambda t: per_head("blk.0.ssm_a") * (t["blk.0.a"] + per_head("blk.0.ssm_dt.bias"))),
    ),
    "A exponentiated twice": ("blk.0.g", "one factor per head", weights("blk.0.ssm_a", lambda w: -np.exp(-w))),
    "g summed": (
        "blk.0.g",
        "within chunks of 64",
        gates(lambda s: (np.concatenate([np.cumsum(s.g[:, :64], 1), np.cumsum(s.g[:, 64:], 1)], 1), s.beta)),
    ),
    "no sigmoid": ("blk.0.beta", "sigmoid is missing", gates(lambda s: (s.g, s.b))),
    "beta doubled": ("blk.0.beta", "times 2", gates(lambda s: (s.g, 2 * s.beta))),
    "heads modulo, grouped": (
        "blk.0.o",
        "in grouped order read key head h % H_k",
        delta(lambda q, k, *x: rule(q[:, :, modulo_heads()], k[:, :, modulo_heads()], *x)),
    ),
    "heads divided, tiled": (
        "blk.0.o",
        "in tiled order read key head h // (H_v / H_k)",
        delta(lambda *x: rule(*x, head_order="grouped")),
    ),
    "q and k exchanged": ("blk.0.o", "q and k are swapped", delta(lambda q, k, *x: rule(k, q, *x))),
    "no decay": ("blk.0.o", "decay is missing", delta(lambda q, k, v, g, beta: rule(q, k, v, 0 * g, beta))),
    "no beta": ("blk.0.o", "beta is missing", delta(lambda q, k, v, g, beta: rule(q, k, v, g, 0 * beta + 1))),
    "no delta": ("blk.0.o", "without the delta rule", delta(linear_attention)),
    "error before decay": ("blk.0.o", "computed before the decay", delta(lambda *x: token_loop(*x, error_first=True))),
    "read before write": ("blk.0.o", "read before the write", delta(lambda *x: token_loop(*x, read_first=True))),
    "state reset": ("blk.0.o", "reset to zero at every chunk of 32", pieces(32)),
    "no scale": ("blk.0.o", "d_k^0.5", delta(lambda *x: rule(*x, scale=1.0))),
    "scale twice": ("blk.0.o", "d_k^-0.5", delta(lambda *x: rule(*x, scale=1 / d_k))),
    "state transposed in memory": (
        "blk.0.S",
        "transposed: (H_v, d_v, d_k)",
        edited("blk.0.S", lambda t: t["blk.0.S"].swapaxes(1, 2).reshape(t["blk.0.S"].shape)),
    ),
    "state without the last token": (
        "blk.0.S",
        "before the last token",
        delta(lambda *x: (rule(*x)[0], rule(*(y[:, :-1] for y in x))[1])),
    ),
    "no output gate": ("blk.0.o_gated", "gate z is missing", gated_norm(lambda o, z, w: normalised(o) * w)),
    "sigmoid gate": (
        "blk.0.o_gated",
        "sigmoid(z) instead of SiLU",
        gated_norm(lambda o, z, w: normalised(o) * w * sigmoid(z)),
    ),
    "gate before norm": (
        "blk.0.o_gated",
        "gate is applied before the norm",
        gated_norm(lambda o, z, w: normalised(o * silu(z)) * w),
    ),
    "o not normalised": ("blk.0.o_gated", "not normalised", gated_norm(lambda o, z, w: o * w * silu(z))),
    "ssm_norm 1 + w": (
        "blk.0.o_gated",
        "ssm_norm, unlike the other norms, stores w",
        weights("blk.0.ssm_norm.weight", lambda w: w + 1),
    ),
    "ssm_norm left out": ("blk.0.o_gated", "weight is missing", weights("blk.0.ssm_norm.weight", np.ones_like)),
    "norm over heads": (
        "blk.0.o_gated",
        "all heads together",
        gated_norm(lambda o, z, w: normalised(o, (-1, -2)) * w * silu(z)),
    ),
    "ssm_norm eps": (
        "blk.0.o_gated",
        "eps is 1e-05",
        gated_norm(lambda o, z, w: normalised(o, eps=1e-5) * w * silu(z)),
    ),
    "V heads of ssm_out": (
        "blk.0.mixer_out",
        "columns of ssm_out",
        weights("blk.0.ssm_out.weight", lambda w: grouped_rows(w, 0, d_v, axis=1)),
    ),
    # the attention layer
    "q and gate in halves": ("blk.1.q_proj", "two halves", query_rows("halves")),
    "q and gate in turn": ("blk.1.q_proj", "row by row", query_rows("in turn")),
    "not rotated": ("blk.1.q", "not rotated", rotary(lambda x, angle: x)),
    "rotary neighbours": ("blk.1.q", "neighbours", rotary(complex_rotation)),
    "all rotated": ("blk.1.q", "every feature is rotated", rotary(dim=d)),
    "last rotated": ("blk.1.q", "last features", rotary(last_rotated)),
    "rotated backwards": (
        "blk.1.q",
        "opposite direction",
        rotary(lambda x, a: ops.rope_forward(x, np.cos(a), -np.sin(a))),
    ),
    "frequencies of the head": ("blk.1.q", "frequencies are theta^(-2j/d)", rotary(theta=CONFIG.rope_theta**0.5)),
    "positions from 1": ("blk.1.q", "start at 1", rotary(first=1)),
    "rotary theta": ("blk.1.q", "theta is 1e+06", rotary(theta=1e6)),
    "kv heads modulo": ("blk.1.o", "h % H_kv", attention(other_heads)),
    "scores not scaled": (
        "blk.1.o",
        "not scaled",
        attention(lambda *x: ops.softmax_attention_forward(*x, scale=1.0)[0]),
    ),
    "scores scaled twice": (
        "blk.1.o",
        "d^-0.5 twice",
        attention(lambda *x: ops.softmax_attention_forward(*x, scale=1 / d)[0]),
    ),
    "no mask": ("blk.1.o", "causal mask is missing", attention(unmasked)),
    "no attention gate": (
        "blk.1.o_gated",
        "gate is missing",
        operators(sigmoid_gate_forward=lambda o, gate: (o, ops.sigmoid_gate_forward(o, gate)[1])),
    ),
    "SiLU attention gate": (
        "blk.1.o_gated",
        "SiLU instead of a sigmoid",
        operators(sigmoid_gate_forward=lambda o, gate: (o * silu(gate), ops.sigmoid_gate_forward(o, gate)[1])),
    ),
    # residuals, feed-forward, loss
    "no residual": ("blk.0.mid", "residual is missing", edited("blk.0.mid", lambda t: t["blk.0.mixer_out"])),
    "residual after the norm": (
        "blk.1.mid",
        "after the norm",
        edited("blk.1.mid", lambda t: t["blk.1.attn_norm"] + t["blk.1.mixer_out"]),
    ),
    "no second residual": ("blk.0.out", "mid is not added", edited("blk.0.out", lambda t: t["blk.0.ffn_out"])),
    "second residual after the norm": (
        "blk.0.out",
        "after the norm",
        edited("blk.0.out", lambda t: t["blk.0.ffn_norm"] + t["blk.0.ffn_out"]),
    ),
    "second residual of the input": (
        "blk.1.out",
        "the block's input instead of mid",
        edited("blk.1.out", lambda t: t["blk.0.out"] + t["blk.1.ffn_out"]),
    ),
    "SiLU on up": ("blk.0.ffn_act", "SiLU is applied to the wrong one", swiglu(lambda gate, up: gate * silu(up))),
    "no SiLU in the feed-forward": ("blk.0.ffn_act", "SiLU is missing", swiglu(lambda gate, up: gate * up)),
    "no up": ("blk.0.ffn_act", "ffn_up is missing", swiglu(lambda gate, up: silu(gate))),
    "GELU": (
        "blk.0.ffn_act",
        "GELU",
        swiglu(lambda x, up: x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) * up),
    ),
    "sigmoid for SiLU": ("blk.0.ffn_act", "sigmoid instead of SiLU", swiglu(lambda gate, up: sigmoid(gate) * up)),
    "loss not shifted": (
        "loss",
        "not shifted",
        edited("loss", lambda t: -np.log(softmax(t["logits"])[range(L), TOKENS]).mean()),
    ),
    "loss summed": ("loss", "sum over tokens", edited("loss", lambda t: t["loss"] * (L - 1))),
    "loss in bits": ("loss", "base 2", edited("loss", lambda t: t["loss"] / np.log(2))),
    # gradients
    "gradient of a sum": ("d.logits", "sum over tokens", edited("d.logits", lambda t: t["d.logits"] * (L - 1))),
    "softmax alone": (
        "d.logits",
        "label's term is missing",
        edited("d.logits", lambda t: softmax(t["logits"]) / (L - 1) * (np.arange(L) < L - 1)[:, None]),
    ),
    "no head's part": (
        "d.token_embd.weight",
        "head's part of the tied matrix",
        edited("d.token_embd.weight", lambda t: np.eye(CONFIG.vocab_size)[TOKENS].T @ t["d.embed"]),
    ),
    "no embedding's part": (
        "d.token_embd.weight",
        "embedding's part of the tied matrix",
        edited("d.token_embd.weight", lambda t: np.einsum("tv,td->vd", t["d.logits"], t["output_norm"])),
    ),
    "no gradient through the norm": (
        "d.blk.1.mid",
        "through the branch's norm is missing",
        edited("d.blk.1.mid", lambda t: t["d.blk.1.out"]),
    ),
    "no residual's gradient": (
        "d.blk.0.out",
        "residual's gradient is missing",
        edited("d.blk.0.out", lambda t: t["d.blk.0.out"] - t["d.blk.1.mid"]),
    ),
    "dq and dk in each other's place": (
        "d.blk.2.k",
        "values of d.q",
        backward("gated_delta_rule_backward", lambda dq, dk, *rest: (dk, dq, *rest)),
    ),
    "dq not scaled": (
        "d.blk.2.q",
        "d_k^0.5",
        backward("gated_delta_rule_backward", lambda dq, *rest: (dq * np.sqrt(d_k), *rest)),
    ),
    "dg not summed": (
        "d.blk.2.g",
        "sum of g in chunks of 64",
        edited(
            "d.blk.2.g",
            lambda t: np.concatenate([-np.diff(x, axis=0, append=0 * x[:1]) for x in np.split(t["d.blk.2.g"], [64])]),
        ),
    ),
    "dA_log for dssm_a": (
        "d.blk.0.ssm_a",
        "gradient of A_log",
        edited("d.blk.0.ssm_a", lambda t: t["d.blk.0.ssm_a"] * per_head("blk.0.ssm_a")),
    ),
}
