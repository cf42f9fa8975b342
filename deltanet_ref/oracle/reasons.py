"""Why a tensor of a trace differs: cheap tests for known mistakes, run on the first tensor that differs.

Each test applies one mistake to OUR tensors; if the result equals THEIRS, that mistake is reported. All tensors earlier
in the network agree, so ours can be used in place of theirs. All arrays are float64 with value heads in grouped order.
"""

from collections.abc import Callable
from itertools import permutations
from typing import NamedTuple

import numpy as np

from deltanet_ref.model.tensors import VHeads, grouped_from_tiled
from deltanet_ref.notation import value_to_key_head
from deltanet_ref.ops import (
    rope_backward,
    rope_forward,
    rope_tables,
    sigmoid,
    silu,
    softmax_attention_forward,
    softplus,
)
from deltanet_ref.oracle.trace import order_value_heads, stages_of

EXPLAINED = 0.05  # a mistake is reported if it leaves at most this share of the difference
FEWEST = 4  # values needed per fitted number; with fewer, anything fits
LARGEST = 2**26  # most values of an array that a test may allocate
EPSILONS = (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3)
THETAS = (1e3, 1e4, 5e5, 1e6, 1e7)
CHUNKS = (16, 32, 64, 128)
HEADS = ("H", "H_k", "H_v", "H_kv")


class Site:
    """The tensor that differs, with access to ours around it."""

    def __init__(self, traced, ours, theirs, config, tokens, get):
        """ours, theirs: float64 arrays of one shape; get(name): our tensor of that name, or KeyError."""
        self.traced, self.ours, self.theirs = traced, ours, theirs
        self.config, self.tokens, self.get = config, tokens, get
        self.direction = "d." if traced.name.startswith("d.") else ""
        name = traced.name.removeprefix("d.")
        _, block, stage = name.split(".", 2) if name.startswith("blk.") else (None, None, name)
        self.block, self.stage = block and int(block), stage
        self.prefix = f"blk.{block}." if block else ""

    def __getitem__(self, stage):
        """Our tensor of a stage: of this block, or of the model for a site outside the blocks; "d.q" is dq."""
        name = stage.removeprefix("d.")
        return self.get(f"{stage[: len(stage) - len(name)]}{self.prefix}{name}")

    def before(self):
        """The block's input; for output_norm, the last block's output."""
        block = self.config.num_hidden_layers if self.block is None else self.block
        return self.get(f"blk.{block - 1}.out" if block else "embed")


class Test(NamedTuple):
    """A mistake and the tensor it would produce."""

    sentence: str  # printed after "likely:"
    make: Callable  # Site -> the array expected as THEIRS; or a pair that would be equal; or None


def explain(site: Site, tolerance: float) -> list[str]:
    """Sentences that explain the difference at a Site, best first; [] when no known mistake fits.

    tolerance  relative error below which two tensors count as equal
    """
    wrong = _distance(site.ours, site.theirs)
    enough = min(max(tolerance, EXPLAINED * wrong), wrong / 2)
    key = site.direction + site.stage
    kind = "" if site.block is None else site.config.layer_types[site.block]
    exact = _fitting(site, TESTS.get(key, []) + TESTS.get((kind, key), []) + _everywhere(site), enough)
    loose = FITTED.get(key, []) + _other_names(site) + _fitted_factors(site)
    return exact or _fitting(site, loose, enough) or _rounding(site, wrong)


def _fitting(site, tests, enough):
    """Sentences of the tests whose result is within `enough` of THEIRS, best first."""
    found = []
    for test in tests:
        try:
            with np.errstate(all="ignore"):
                made = test.make(site)
        except KeyError:  # a tensor it needs is not in our trace
            continue
        made, target = made if isinstance(made, tuple) else (made, site.theirs)
        error = _distance(made, target)
        if error <= enough:
            found.append((error, test.sentence))
    return [sentence for _, sentence in sorted(found, key=lambda pair: pair[0])]


def _distance(x, y):
    """Norm of the difference, relative to the larger norm; inf when the shapes differ."""
    if np.shape(x) != np.shape(y):
        return np.inf
    with np.errstate(all="ignore"):
        error = np.linalg.norm(np.subtract(x, y)) / max(np.linalg.norm(x), np.linalg.norm(y), np.finfo(float).tiny)
    return error if np.isfinite(error) else np.inf


# ---- mistakes possible in any tensor


def _everywhere(site):
    x = site.ours
    letters = site.traced.axes or ("rows", "columns")
    tests = [
        Test("it is all zeros: never written, or nothing reaches it", lambda s: (s.theirs, 0 * x)),
        Test(
            "the value heads are in tiled order (GGUF's) instead of grouped order: the V-head order of the weights is "
            "ignored, or the trace was not converted to grouped order",
            lambda s: order_value_heads(x, s.traced, s.config, to="tiled"),
        ),
        Test(
            "the value heads were in grouped order (HF's) and were reordered as if they were tiled: weights in HF's "
            "order are treated as GGUF's",
            lambda s: order_value_heads(x, s.traced, s.config, to="grouped"),
        ),
    ]
    for order in list(permutations(range(x.ndim)))[1:]:
        tests.append(
            Test(
                f"the axes are transposed: ({', '.join(letters[i] for i in order)}) in memory instead "
                f"of ({', '.join(letters)})",
                lambda s, order=order: x.transpose(order).reshape(x.shape),
            )
        )
    return tests + _constants(site) + _shifts(site) + _other_heads(site)


def _constants(site):
    """One factor for the whole tensor; a tensor of few values must match a known factor."""
    x, y, c = site.ours, site.theirs, site.config
    L = len(site.tokens)
    factor = np.vdot(x, y) / max(np.vdot(x, x), np.finfo(float).tiny)
    known = {
        "-1: the sign is wrong": -1.0,
        "2": 2.0,
        "1/2": 0.5,
        "L - 1: a sum over tokens instead of their mean": L - 1.0,
        "(L - 1) / L: divided by all L tokens, including the last, which predicts nothing": (L - 1) / L,
        "log2(e): base 2 instead of e": 1 / np.log(2),
    }
    for name, size in (
        ("d_k", c.linear_key_head_dim),
        ("d_v", c.linear_value_head_dim),
        ("d", c.head_dim),
        ("D", c.hidden_size),
    ):
        known |= {
            f"{name}^{power:g}: the scale is missing, applied twice or applied elsewhere": size**power
            for power in (-1.0, -0.5, 0.5, 1.0)
        }
    name = next((name for name, value in known.items() if abs(factor / value - 1) < 1e-3), None)
    if not factor or name is None and (x.size < 2 * FEWEST or abs(factor - 1) < 1e-3):
        return []
    return [Test(f"it equals ours times {name or f'{factor:.6g}'}", lambda s: factor * x)]


def _shifts(site):
    """Rows shifted to other tokens, or reversed."""
    if site.traced.axes[:1] not in (("L",), ("K-1",)):
        return []
    x, y = site.ours, site.theirs
    tests = []
    for n in range(1, min(4, len(x) - 1)):
        by = f"it is {n} token{'s' * (n > 1)}"
        tests.append(Test(f"{by} late: row t holds the values of token t - {n}", lambda s, n=n: (x[:-n], y[n:])))
        tests.append(Test(f"{by} early: row t holds the values of token t + {n}", lambda s, n=n: (x[n:], y[:-n])))
    return tests + [Test("the tokens are in reverse order", lambda s: x[::-1])]


def _other_heads(site):
    """Any permutation of the heads: each of theirs is matched with the nearest of ours."""
    axis = next((i for i, letter in enumerate(site.traced.axes) if letter in HEADS), None)
    if axis is None:
        return []
    x, y = (np.moveaxis(z, axis, 0).reshape(z.shape[axis], -1) for z in (site.ours, site.theirs))
    order = np.array([np.argmin(np.linalg.norm(x - head, axis=1)) for head in y])
    return [
        Test(
            f"the heads are permuted: their heads 0, 1, ... are our heads {', '.join(map(str, order[:16]))}",
            lambda s: np.take(s.ours, order, axis=axis),
        )
    ]


def _other_names(site):
    """Two tensors swapped, or a step between them missing."""
    if site.block is None:
        return []
    stages = sorted(stages_of(site.config) - {site.stage})
    return [
        Test(
            f"it holds the values of {name}: the two are swapped, or a step between them is missing",
            lambda s, name=name: s[name],
        )
        for name in (site.direction + stage for stage in stages)
    ]


def _fitted_factors(site):
    """One factor per head, feature or token, constant over the other axes."""
    x, y, axes = site.ours, site.theirs, site.traced.axes
    kinds = [
        (i, "head: a per-head parameter is wrong or used wrongly") for i, letter in enumerate(axes) if letter in HEADS
    ]
    if axes[:1] == ("L",):
        kinds.append((0, "token"))
        if len(axes) > 1 and axes[-1] not in HEADS:
            kinds.append((x.ndim - 1, "feature: a per-feature weight is wrong or missing"))
    tests = []
    for axis, what in kinds:
        rest = tuple(i for i in range(x.ndim) if i != axis)
        if x.size >= FEWEST * x.shape[axis]:
            scale = (x * x).sum(rest, keepdims=True)
            factor = (x * y).sum(rest, keepdims=True) / np.where(scale > 0, scale, 1)
            tests.append(Test(f"it equals ours times one factor per {what}", lambda s, factor=factor: factor * x))
    return tests


def _rounding(site, wrong):
    """A lower precision than ours: visible in the values, or as an error that is small and uniform."""
    x, y = site.ours, site.theirs
    if x.ndim == 0 or wrong > 2**-7:
        return []
    narrow = y.astype(np.float32)
    if not (narrow.view(np.uint32) & 0xFFFF).any():
        return ["the values are bfloat16 numbers: rounded to 8 bits when written, or before"]
    if (narrow == narrow.astype(np.float16)).all():
        return ["the values are float16 numbers: rounded to 11 bits when written, or before"]
    off, size = (np.linalg.norm(z.reshape(len(z), -1), axis=1) for z in (y - x, x))
    if len(x) >= FEWEST and size.all() and np.median(off / size) > 0.2 * (off / size).max():
        return [
            f"rounding: the error is small and uniform, like that of numbers with about {-np.log2(wrong):.0f} bits "
            "(bfloat16 has 8, TF32 and float16 11, float32 24): products in a lower precision, or another eps"
        ]
    return []


# ---- mistakes of single stages


def _root(x, eps, axis=-1):
    return np.sqrt((x * x).mean(axis, keepdims=True) + eps)


def _weight(x, n):
    """The per-feature weight w in x = w n, by least squares over all rows."""
    rest = tuple(range(x.ndim - 1))
    return (x * n).sum(rest) / np.maximum((n * n).sum(rest), np.finfo(float).tiny)


def _rms_norm(source):
    """RMS norm of source(site), times 1 + w."""

    def with_n(make):
        def run(s):
            x = source(s)
            n = x / _root(x, s.config.rms_norm_eps)
            return make(s, x, n, _weight(s.ours, n))

        return run

    def layer_norm(s, x, n, w):
        x = x - x.mean(-1, keepdims=True)
        return x / _root(x, s.config.rms_norm_eps) * w

    tests = [
        Test("the norm multiplies by w instead of 1 + w", with_n(lambda s, x, n, w: n * (w - 1))),
        Test(
            "1 is added to the norm's weight twice: a GGUF file already stores 1 + w",
            with_n(lambda s, x, n, w: n * (w + 1)),
        ),
        Test("the norm's weight is missing", with_n(lambda s, x, n, w: n)),
        Test("the input is weighted but not normalised", with_n(lambda s, x, n, w: x * w)),
        Test("the mean is subtracted: layer norm instead of RMS norm", with_n(layer_norm)),
        Test(
            "eps is added outside the square root",
            with_n(lambda s, x, n, w: x / (_root(x, 0) + s.config.rms_norm_eps) * w),
        ),
    ]
    return tests + [
        Test(f"the norm's eps is {eps:g}", with_n(lambda s, x, n, w, eps=eps: x / _root(x, eps) * w))
        for eps in EPSILONS
    ]


def _l2_norm(first):
    """L2 norm of each head of q (first 0) or k (first 1) in conv."""

    def with_x(make):
        def run(s):
            H, d = s.config.linear_num_key_heads, s.config.linear_key_head_dim
            x = s["conv"][:, first * H * d : (first + 1) * H * d].reshape(-1, H, d)
            return make(x, (x * x).sum(-1, keepdims=True))

        return run

    tests = [
        Test("it is not L2-normalised", with_x(lambda x, xx: x)),
        Test(
            "it is divided by the root mean square: RMS norm instead of L2 norm",
            with_x(lambda x, xx: x / np.sqrt(xx / x.shape[-1] + 1e-6)),
        ),
        Test(
            "the L2 norm is taken over all heads together",
            with_x(lambda x, xx: x / np.sqrt(xx.sum(1, keepdims=True) + 1e-6)),
        ),
        Test(
            "the L2 norm adds eps to the mean of the squares instead of their sum",
            with_x(lambda x, xx: x / np.sqrt(xx + x.shape[-1] * 1e-6)),
        ),
        Test("the L2 norm adds eps outside the square root", with_x(lambda x, xx: x / (np.sqrt(xx) + 1e-6))),
        Test("the L2 norm divides by max(norm, eps)", with_x(lambda x, xx: x / np.maximum(np.sqrt(xx), 1e-6))),
    ]
    return tests + [
        Test(f"the L2 norm's eps is {eps:g}, not 1e-6", with_x(lambda x, xx, eps=eps: x / np.sqrt(xx + eps)))
        for eps in EPSILONS
    ]


def _chunk_sum(x, C, first=0):
    """Cumulative sum over tokens, restarted in each chunk of C; the first has `first` tokens, or C if that is 0."""
    return np.concatenate([np.cumsum(part, 0) for part in np.split(x, range(first or C, len(x), C))])


def _reversed_taps(s):
    """conv with its taps reversed. The taps are fitted to qkv and ours, wherever SiLU's output determines its input."""
    K = s.config.linear_conv_kernel_dim
    x = np.concatenate([np.zeros((K - 1, s.ours.shape[1])), s["qkv"]])
    windows = np.lib.stride_tricks.sliding_window_view(x, K, axis=0)  # (L, channels, K)
    known = s.ours > 0
    if (known.sum(0) < FEWEST * K).any():
        return None
    c = y = np.where(known, s.ours, 0)
    for _ in range(50):  # y = c sigmoid(c): a contraction, for y > 0
        c = y * (1 + np.exp(-c))
    seen = windows * known[:, :, None]
    taps = np.linalg.solve(np.einsum("lci,lcj->cij", seen, windows), np.einsum("lci,lc->ci", seen, c)[..., None])
    return silu(np.einsum("lci,ci->lc", windows, taps[:, ::-1, 0]))


def _fit_per_head(s, basis):
    """The combination of basis arrays (L, H_v), with one coefficient per head each, that is nearest to THEIRS."""
    if len(s.ours) < FEWEST * len(basis):
        return None
    columns = np.stack(basis, -1).transpose(1, 0, 2)  # (H_v, L, basis)
    return (columns @ (np.linalg.pinv(columns) @ s.theirs.T[..., None]))[..., 0].T


def _delta_rule(result):
    """The recurrence with one mistake; result 0 is o, 1 the state S after the last token."""

    def run(**switches):
        return lambda s: _recurrence(s, **switches)[result]

    tests = [
        Test(
            "value heads in grouped order read key head h % H_k instead of h // (H_v / H_k)",
            run(heads=lambda H_k, H_v: value_to_key_head(H_k, H_v, "tiled")),
        ),
        Test(
            "value heads in tiled order read key head h // (H_v / H_k) instead of h % H_k",
            run(heads=lambda H_k, H_v: grouped_from_tiled(H_k, H_v) // (H_v // H_k)),
        ),
        Test("q and k are swapped", run(swap=True)),
        Test("the decay is missing", run(decay=False)),
        Test("beta is missing", run(beta=False)),
        Test("k S is not subtracted from v: linear attention without the delta rule", run(correct=False)),
        Test("the error v - k S is computed before the decay", run(decay_first=False)),
        Test("the output is read before the write", run(read_after_write=False)),
    ]
    return tests + [Test(f"the state is reset to zero at every chunk of {C}", run(chunk=C)) for C in CHUNKS]


def _recurrence(
    s,
    heads=None,
    swap=False,
    decay=True,
    beta=True,
    correct=True,
    decay_first=True,
    read_after_write=True,
    chunk=None,
    tokens=None,
):
    """o (L, H_v, d_v) and S (H_v, d_k, d_v) of this block, with the given switches."""
    c = s.config
    key_heads, value_heads = c.linear_num_key_heads, c.linear_num_value_heads
    heads = heads(key_heads, value_heads) if heads else value_to_key_head(key_heads, value_heads, "grouped")
    q, k, v, g, b = s["q"][:, heads], s["k"][:, heads], s["v"], s["g"], s["beta"]
    if swap:
        q, k = k, q
    S = np.zeros((len(heads), c.linear_key_head_dim, c.linear_value_head_dim))
    o = np.zeros_like(v)
    for t in range(len(v) if tokens is None else tokens):
        if chunk and t % chunk == 0:
            S = np.zeros_like(S)
        decayed = np.exp(g[t])[:, None, None] * S if decay else S
        error = v[t] - np.einsum("hk,hkv->hv", k[t], decayed if decay_first else S) if correct else v[t]
        S = decayed + k[t][:, :, None] * (b[t][:, None] * error if beta else error)[:, None]
        o[t] = c.linear_key_head_dim**-0.5 * np.einsum("hk,hkv->hv", q[t], S if read_after_write else decayed)
    return o, S


def _gated_norm():
    """RMS norm of o per head, times w, times SiLU(z)."""

    def with_n(make):
        def run(s):
            o, z = s["o"], s["z"]
            n = o / _root(o, s.config.rms_norm_eps)
            return make(s, o, z, n, _weight(s.ours, n * silu(z)))

        return run

    tests = [
        Test("the output gate z is missing", with_n(lambda s, o, z, n, w: n * w)),
        Test("the output gate is sigmoid(z) instead of SiLU(z)", with_n(lambda s, o, z, n, w: n * w * sigmoid(z))),
        Test(
            "the gate is applied before the norm",
            with_n(lambda s, o, z, n, w: o * silu(z) / _root(o * silu(z), s.config.rms_norm_eps) * w),
        ),
        Test("o is weighted and gated but not normalised", with_n(lambda s, o, z, n, w: o * w * silu(z))),
        Test(
            "the norm multiplies by 1 + w: ssm_norm, unlike the other norms, stores w itself",
            with_n(lambda s, o, z, n, w: n * (1 + w) * silu(z)),
        ),
        Test("the norm's weight is missing", with_n(lambda s, o, z, n, w: n * silu(z))),
        Test(
            "the norm is taken over all heads together",
            with_n(lambda s, o, z, n, w: o / _root(o, s.config.rms_norm_eps, (1, 2)) * w * silu(z)),
        ),
    ]
    return tests + [
        Test(f"the norm's eps is {eps:g}", with_n(lambda s, o, z, n, w, eps=eps: o / _root(o, eps) * w * silu(z)))
        for eps in EPSILONS
    ]


def _query_gate(half):
    """The rows of attn_q that are queries (half 0) or gates (half 1)."""

    def rows(s):
        return np.concatenate([s["q_proj"], s["gate"]], -1).reshape(len(s.ours), -1)

    return [
        Test(
            "attn_q is split into two halves, all queries and then all gates; they alternate head by head",
            lambda s: np.split(rows(s), 2, -1)[half].reshape(s.ours.shape),
        ),
        Test(
            "queries and gates are read from attn_q alternating row by row; they alternate head by head",
            lambda s: rows(s)[:, half::2].reshape(s.ours.shape),
        ),
    ]


def _rotary(source):
    """Rotary embedding of q_norm or k_norm."""

    def same(x, R):
        return x

    def rotated(prepare=same, undo=same, dim=None, exponent_dim=None, first=0, theta=None, rotate=rope_forward):
        def run(s):
            c, x = s.config, s[source]
            R = dim(c) if dim else c.rotary_dim
            base = theta or c.rope_theta ** (R / (exponent_dim(c) if exponent_dim else R))
            cos, sin = rope_tables(np.arange(len(x)) + first, R, base, dtype=np.float64)
            return undo(rotate(prepare(x, R)[None], cos, sin)[0], R)

        return run

    def pairs(x, R):
        return np.concatenate([x[..., :R:2], x[..., 1:R:2], x[..., R:]], -1)

    def unpaired(x, R):
        out = x.copy()
        out[..., :R:2], out[..., 1:R:2] = x[..., : R // 2], x[..., R // 2 : R]
        return out

    tests = [
        Test("it is not rotated: the rotary embedding is missing", lambda s: s[source]),
        Test("rotary pairs are neighbours (2j, 2j + 1) instead of (j, j + R/2)", rotated(pairs, unpaired)),
        Test("every feature is rotated instead of only the first rotary_dim", rotated(dim=lambda c: c.head_dim)),
        Test(
            "the last features of a head are rotated instead of the first",
            rotated(lambda x, R: np.roll(x, R, -1), lambda x, R: np.roll(x, -R, -1)),
        ),
        Test("it is rotated in the opposite direction", rotated(rotate=rope_backward)),
        Test(
            "rotary frequencies are theta^(-2j/d) with the head size d instead of rotary_dim",
            rotated(exponent_dim=lambda c: c.head_dim),
        ),
        Test("positions start at 1 instead of 0", rotated(first=1)),
    ]
    return tests + [Test(f"rotary theta is {theta:g}", rotated(theta=theta)) for theta in THETAS]


def _attention():
    """Softmax attention over q, k, v of this block."""

    def run(heads=None, scale=None):
        def attend(s):
            q, k, v = s["q"], s["k"], s["v"]
            if heads:
                index = value_to_key_head(k.shape[1], q.shape[1], heads)
                k, v = k[:, index], v[:, index]
            return softmax_attention_forward(q[None], k[None], v[None], scale=scale and scale(q.shape[-1]))[0][0]

        return attend

    def without_mask(s):
        L, H, d = s["q"].shape
        if L * L * H > LARGEST:
            return None
        index = np.arange(H) // (H // s["k"].shape[1])
        scores = np.einsum("ihd,jhd->hij", s["q"], s["k"][:, index]) * d**-0.5
        p = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), s["v"][:, index])

    return [
        Test("query heads read key head h % H_kv instead of h // (H / H_kv)", run("tiled")),
        Test("the scores are not scaled by d^-0.5", run(scale=lambda d: 1.0)),
        Test("the scores are scaled by d^-0.5 twice", run(scale=lambda d: 1 / d)),
        Test("the causal mask is missing", without_mask),
    ]


def _columns(s, to):
    """mixer_out with the columns of ssm_out reordered. Its weight can be fitted if tokens outnumber its inputs."""
    x, traced = s["o_gated"], s.traced._replace(v_heads=VHeads(1, 0, 1))
    if len(x) <= x[0].size:
        return None
    w, *_ = np.linalg.lstsq(x.reshape(len(x), -1), s.ours, rcond=None)
    return order_value_heads(x, traced, s.config, to=to).reshape(len(x), -1) @ w


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _unshifted(s):
    return -_log_softmax(s["logits"])[np.arange(len(s.tokens)), s.tokens].mean()


def _softmax_alone(s):
    gradient = np.exp(_log_softmax(s["logits"])) / max(1, len(s.tokens) - 1)
    gradient[-1] = 0
    return gradient


def _embedding_part(s):
    dw = np.zeros_like(s.ours)
    np.add.at(dw, s.tokens, s["d.embed"])
    return dw


def _next_in_stream(s):
    """The gradient through the residual connection alone, without that of the branch."""
    return s["d.out"] if s.stage == "mid" else s.get(f"d.blk.{s.block + 1}.mid")


_RESIDUAL_GRADIENT = [
    Test("the gradient through the branch's norm is missing: only the residual's arrives", _next_in_stream),
    Test("the residual's gradient is missing: only the branch's arrives", lambda s: s.ours - _next_in_stream(s)),
]

# (layer type, stage), or just the stage where the layer type does not matter -> tests
TESTS = {
    "attn_norm": _rms_norm(Site.before),
    "ffn_norm": _rms_norm(lambda s: s["mid"]),
    "output_norm": _rms_norm(Site.before),
    "q_norm": _rms_norm(lambda s: s["q_proj"]),
    "k_norm": _rms_norm(lambda s: s["k_proj"]),
    "conv": [
        Test("the SiLU after the convolution is missing", lambda s: (silu(s.theirs), s.ours)),
        Test("SiLU is applied twice", lambda s: silu(s.ours)),
        Test("the convolution is missing", lambda s: silu(s["qkv"])),
        Test("the convolution's taps are in reverse order: the last must multiply the current token", _reversed_taps),
    ],
    "conv_state": [
        Test("it holds the convolution's outputs instead of its inputs", lambda s: s["conv"][-len(s.ours) :]),
        Test("the last token is missing", lambda s: s["qkv"][-len(s.ours) - 1 : -1]),
    ],
    ("linear_attention", "q"): _l2_norm(0),
    ("linear_attention", "k"): _l2_norm(1),
    "g": [
        Test("it is the decay exp(g), not its logarithm", lambda s: np.exp(s.ours)),
        Test("it is the cumulative sum over all tokens", lambda s: np.cumsum(s.ours, 0)),
    ]
    + [Test(f"it is the cumulative sum within chunks of {C}", lambda s, C=C: _chunk_sum(s.ours, C)) for C in CHUNKS],
    "beta": [Test("the sigmoid is missing", lambda s: s["b"])],
    ("linear_attention", "o"): _delta_rule(0),
    "S": _delta_rule(1)
    + [Test("it is the state before the last token", lambda s: _recurrence(s, tokens=len(s.tokens) - 1)[1])],
    ("linear_attention", "o_gated"): _gated_norm(),
    ("linear_attention", "mixer_out"): [
        Test(
            "the columns of ssm_out and its input are in different head orders (grouped, tiled)",
            lambda s, to=to: _columns(s, to),
        )
        for to in ("grouped", "tiled")
    ],
    "q_proj": _query_gate(0),
    "gate": _query_gate(1),
    ("full_attention", "q"): _rotary("q_norm"),
    ("full_attention", "k"): _rotary("k_norm"),
    ("full_attention", "o"): _attention(),
    ("full_attention", "o_gated"): [
        Test("the output gate is missing", lambda s: s["o"]),
        Test("the output gate is SiLU instead of a sigmoid", lambda s: s["o"] * silu(s["gate"])),
    ],
    "mid": [
        Test("the residual is missing: the block's input is not added", lambda s: s["mixer_out"]),
        Test("the residual is taken after the norm", lambda s: s["attn_norm"] + s["mixer_out"]),
    ],
    "ffn_act": [
        Test("gate and up are swapped: SiLU is applied to the wrong one", lambda s: silu(s["ffn_up"]) * s["ffn_gate"]),
        Test("SiLU is missing", lambda s: s["ffn_gate"] * s["ffn_up"]),
        Test("ffn_up is missing", lambda s: silu(s["ffn_gate"])),
        Test("GELU instead of SiLU", lambda s: _gelu(s["ffn_gate"]) * s["ffn_up"]),
        Test("a sigmoid instead of SiLU", lambda s: sigmoid(s["ffn_gate"]) * s["ffn_up"]),
    ],
    "out": [
        Test("the residual is missing: mid is not added", lambda s: s["ffn_out"]),
        Test("the residual is taken after the norm", lambda s: s["ffn_norm"] + s["ffn_out"]),
        Test("the residual is the block's input instead of mid", lambda s: s.before() + s["ffn_out"]),
    ],
    "loss": [Test("the labels are not shifted: token t is compared with itself", _unshifted)],
    "d.logits": [Test("the label's term is missing: softmax without the - 1 at the label", _softmax_alone)],
    "d.token_embd.weight": [
        Test("the head's part of the tied matrix's gradient is missing", _embedding_part),
        Test(
            "the embedding's part of the tied matrix's gradient is missing",
            lambda s: s["d.logits"].T @ s["output_norm"],
        ),
    ],
    "d.mid": _RESIDUAL_GRADIENT,
    "d.out": _RESIDUAL_GRADIENT,
    "d.g": [
        Test(
            f"it is the gradient of the cumulative sum of g in chunks of {C}: the reverse cumulative sum is missing",
            lambda s, C=C: (_chunk_sum(s.theirs[::-1], C, first=len(s.ours) % C)[::-1], s.ours),
        )
        for C in CHUNKS
    ],
    "d.ssm_a": [Test("it is the gradient of A_log, not of ssm_a = -exp(A_log)", lambda s: (s["g"] * s["d.g"]).sum(0))],
}

# as TESTS, but with coefficients fitted to THEIRS: tried only when no other test fits
FITTED = {
    "g": [
        Test("dt_bias is missing", lambda s: _fit_per_head(s, [softplus(s["a"])])),
        Test("the softplus is missing", lambda s: _fit_per_head(s, [s["a"], np.ones_like(s["a"])])),
    ]
}
