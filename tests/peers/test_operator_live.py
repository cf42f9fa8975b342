"""Each operator against torch in float64: a recurrence or a formula written here under autograd, HF's own functions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deltanet_ref import ops
from deltanet_ref.notation import value_to_key_head
from deltanet_ref.ops import gated_delta_rule as gdr
from tests.peers import hf_float64
from tests.peers.hf_models import SHAPES, text_config
from tests.tolerances import relative

hf = hf_float64.modeling
FLOAT64 = 1e-12  # two float64 computations of different order; measured: 1e-14


def torch_leaves(*arrays):
    return [torch.tensor(x, requires_grad=True) for x in arrays]


def backpropagate(outputs, incoming, leaves):
    """Gradients of sum <output, incoming> at the leaves, as NumPy arrays."""
    total = sum((y * torch.tensor(d, dtype=torch.float64)).sum() for y, d in zip(outputs, incoming, strict=True))
    return [g.numpy() for g in torch.autograd.grad(total, leaves)]


def assert_all_close(ours, theirs, what=()):
    assert len(ours) == len(theirs)
    for i, (mine, other) in enumerate(zip(ours, theirs)):
        other = other.detach().numpy() if isinstance(other, torch.Tensor) else other
        assert np.any(other), (i, "would compare nothing")
        assert relative(mine, other) < FLOAT64, (i, *what)


# ---- the gated delta rule

SCALE = 0.37
DELTA_CASES = {  # B, L, H_k, H_v, d_k, d_v, chunk size, (smallest, largest) g
    "one token": (2, 1, 3, 6, 5, 4, 64, (-1, 0)),
    "shorter than a chunk": (3, 13, 2, 4, 7, 9, 16, (-1, 0)),
    "exactly two chunks": (1, 14, 1, 3, 5, 4, 7, (-0.3, 0)),
    "a tail of one": (2, 65, 3, 6, 11, 4, 64, (-0.1, 0)),
    "a tail of all but one": (1, 47, 4, 4, 3, 10, 16, (-2, 0)),
    "three chunks, decays to -20": (2, 150, 2, 6, 9, 13, 64, (-20, 0)),
    "no decay": (1, 37, 2, 8, 6, 3, 8, (0, 0)),
    "all decays -20": (2, 43, 2, 4, 7, 5, 16, (-20, -20)),
}
every_case = pytest.mark.parametrize("case", DELTA_CASES)
both_forms = pytest.mark.parametrize("form", ["recurrent", "chunk"])


class Arguments:
    """Random q, k (not normalised), v, g, beta, S0, and the incoming do, dS_end."""

    def __init__(self, case):
        self.B, self.L, self.H_k, self.H_v, self.d_k, self.d_v, self.chunk_size, decays = DELTA_CASES[case]
        rng = np.random.default_rng(list(DELTA_CASES).index(case))
        keys, values = (self.B, self.L, self.H_k, self.d_k), (self.B, self.L, self.H_v, self.d_v)
        self.q, self.k = rng.standard_normal((2, *keys))
        self.v, self.do = rng.standard_normal((2, *values))
        self.g, self.beta = rng.uniform(*decays, values[:3]), rng.random(values[:3])
        self.S0, self.dS_end = rng.standard_normal((2, self.B, self.H_v, self.d_k, self.d_v))

    def ours(self, form, q, k, **options):
        """o, S_end and the six gradients by one of our forms."""
        if form == "chunk":
            options["chunk_size"] = self.chunk_size
        o, S_end, cache = getattr(gdr, f"{form}_forward")(q, k, self.v, g=self.g, beta=self.beta, S0=self.S0, **options)
        return [o, S_end], list(getattr(gdr, f"{form}_backward")(self.do, self.dS_end, cache))


def normalised(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def torch_recurrence(q, k, v, g, beta, S, scale, head_order):
    """The definition, a loop over tokens that autograd differentiates."""
    head = torch.tensor(value_to_key_head(q.shape[2], v.shape[2], head_order))
    q, k, outputs = q[:, :, head], k[:, :, head], []
    for t in range(q.shape[1]):
        S = g[:, t, :, None, None].exp() * S
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], S))
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], u)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outputs, 1), S


@both_forms
@every_case
@pytest.mark.parametrize("head_order", ["grouped", "tiled"])
def test_both_forms_equal_autograd_through_the_recurrence(form, case, head_order):
    x = Arguments(case)
    q, k = normalised(x.q), normalised(x.k)
    leaves = torch_leaves(q, k, x.v, x.g, x.beta, x.S0)
    outputs = torch_recurrence(*leaves, SCALE, head_order)
    theirs = backpropagate(outputs, (x.do, x.dS_end), leaves)
    out, grads = x.ours(form, q, k, scale=SCALE, head_order=head_order)
    assert_all_close(out + grads, [*outputs, *theirs])


@both_forms
def test_packed_sequences_equal_autograd_through_each_alone(form):
    B, H_k, H_v, d_k, d_v, cu = 1, 2, 6, 5, 4, [0, 1, 20, 20, 53, 90]
    rng = np.random.default_rng(10)
    q, k = normalised(rng.standard_normal((2, B, cu[-1], H_k, d_k)))
    v, do = rng.standard_normal((2, B, cu[-1], H_v, d_v))
    g, beta = -3 * rng.random(v.shape[:3]), rng.random(v.shape[:3])
    S0, dS_end = rng.standard_normal((2, len(cu) - 1, H_v, d_k, d_v))
    leaves = torch_leaves(q, k, v, g, beta, S0)
    o, S_end = [], []
    for n, (a, b) in enumerate(zip(cu, cu[1:])):
        pieces, S = [x[:, a:b] for x in leaves[:5]], leaves[5][n : n + 1]
        if a < b:  # an empty sequence passes its state on
            one, S = torch_recurrence(*pieces, S, SCALE, "grouped")
            o.append(one)
        S_end.append(S)
    outputs = torch.cat(o, 1), torch.cat(S_end)
    theirs = backpropagate(outputs, (do, dS_end), leaves)
    options = dict(S0=S0, scale=SCALE, cu_seqlens=np.array(cu))
    ours, S, cache = getattr(gdr, f"{form}_forward")(q, k, v, g=g, beta=beta, **options)
    assert_all_close([ours, S, *getattr(gdr, f"{form}_backward")(do, dS_end, cache)], [*outputs, *theirs])


@both_forms
@every_case
@pytest.mark.parametrize("hf_form", ["chunk", "recurrent"])
@pytest.mark.parametrize("normalise", [False, True])
def test_both_forms_equal_hfs_functions(form, case, hf_form, normalise):
    """With normalise HF's function normalises q and k inside, where we compose l2_norm and the operator.

    HF's chunk form gets dg as a difference of sums as large as q dq and k dk: 6e-8 of it is rounding where all g are
    -20 (the recurrence, above, agrees with us there). Against that form dg is judged by the size of these sums.
    """
    x = Arguments(case)
    q, k = (x.q, x.k) if normalise else (normalised(x.q), normalised(x.k))
    function = getattr(hf, f"torch_{hf_form}_gated_delta_rule")
    options = {"chunk_size": x.chunk_size} if hf_form == "chunk" else {}
    leaves = torch_leaves(q, k, x.v, x.g, x.beta, x.S0)
    outputs = function(
        *leaves[:3],
        g=leaves[3],
        beta=leaves[4],
        initial_state=leaves[5],
        output_final_state=True,
        use_qk_l2norm_in_kernel=normalise,
        **options,
    )
    theirs = backpropagate(outputs, (x.do, x.dS_end), leaves)
    if normalise:
        (q, q_cache), (k, k_cache) = ops.l2_norm_forward(q), ops.l2_norm_forward(k)
    out, (dq, dk, dv, dg, dbeta, dS0) = x.ours(form, q, k)
    summands = np.linalg.norm(dg) + np.linalg.norm(q * dq) + np.linalg.norm(k * dk)
    assert np.linalg.norm(dg - theirs[3]) < FLOAT64 * (summands if hf_form == "chunk" else np.linalg.norm(dg))
    if normalise:
        dq, dk = ops.l2_norm_backward(dq, q_cache), ops.l2_norm_backward(dk, k_cache)
    assert_all_close([*out, dq, dk, dv, dbeta, dS0], [*outputs, *theirs[:3], *theirs[4:]])


# ---- convolution


@pytest.mark.parametrize(
    "B, L, channels, K, cu_seqlens",
    [(3, 1, 5, 4, None), (2, 2, 7, 4, None), (2, 19, 6, 3, None), (1, 23, 5, 4, [0, 1, 3, 11, 23])],
)
def test_causal_convolution_equals_conv1d_on_each_sequence_after_its_state(B, L, channels, K, cu_seqlens):
    rng = np.random.default_rng(L)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    x, dy = rng.standard_normal((2, B, L, channels))
    w, (state, dstate_end) = rng.standard_normal((channels, K)), rng.standard_normal((2, N, K - 1, channels))
    leaves = torch_leaves(x, w, state)
    tx, tw, tstate = leaves
    pieces = list(tx) if cu_seqlens is None else [tx[0, a:b] for a, b in zip(cu_seqlens, cu_seqlens[1:])]
    padded = [torch.cat([before, piece]) for before, piece in zip(tstate, pieces, strict=True)]
    y = [F.silu(F.conv1d(p.T[None], tw[:, None], groups=channels))[0].T for p in padded]
    y = torch.stack(y) if cu_seqlens is None else torch.cat(y)[None]
    state_end = torch.stack([p[len(p) - (K - 1) :] for p in padded])
    theirs = backpropagate((y, state_end), (dy, dstate_end), leaves)
    cu = None if cu_seqlens is None else np.array(cu_seqlens)
    ours, end, cache = ops.causal_conv1d_forward(x, w, state=state, cu_seqlens=cu)
    assert_all_close([ours, end, *ops.causal_conv1d_backward(dy, dstate_end, cache)], [y, state_end, *theirs])


def test_causal_convolution_equals_hfs():
    rng = np.random.default_rng(2)
    (x, dy), w = rng.standard_normal((2, 2, 11, 6)), rng.standard_normal((6, 4))
    leaves = torch_leaves(x, w)
    y = hf.causal_conv1d_fn(leaves[0].mT, leaves[1], activation="silu").mT
    theirs = backpropagate([y], [dy], leaves)
    ours, _, cache = ops.causal_conv1d_forward(x, w)
    dx, dw, _ = ops.causal_conv1d_backward(dy, None, cache)
    assert_all_close([ours, dx, dw], [y, *theirs])


# ---- norms


def with_weight(module, w):
    with torch.no_grad():
        module.weight = torch.nn.Parameter(torch.tensor(w))
    return module


def test_rms_norm_equals_hfs_whose_weight_is_added_to_one():
    rng = np.random.default_rng(3)
    (x, dy), w = rng.standard_normal((2, 3, 4, 7)), rng.standard_normal(7)
    norm, (tx,) = with_weight(hf.Qwen3_5RMSNorm(7, eps=1e-2), w), torch_leaves(x)
    y = norm(tx)
    ours, cache = ops.rms_norm_forward(x, 1 + w, 1e-2)
    assert_all_close([ours, *ops.rms_norm_backward(dy, cache)], [y, *backpropagate([y], [dy], [tx, norm.weight])])


def test_gated_rms_norm_equals_hfs():
    rng = np.random.default_rng(4)
    (x, z, dy), w = rng.standard_normal((3, 5, 2, 6)), rng.standard_normal(6)
    norm, (tx, tz) = with_weight(hf.Qwen3_5RMSNormGated(6, eps=1e-2), w), torch_leaves(x, 3 * z)
    y = norm(tx, tz)
    ours, cache = ops.gated_rms_norm_forward(x, 3 * z, w, 1e-2)
    assert_all_close(
        [ours, *ops.gated_rms_norm_backward(dy, cache)], [y, *backpropagate([y], [dy], [tx, tz, norm.weight])]
    )


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_l2_norm_equals_hfs_also_where_eps_counts(size):
    x, dy = np.random.default_rng(5).standard_normal((2, 4, 3, 5))
    leaves = torch_leaves(size * x)
    y = hf.l2norm(*leaves)
    ours, cache = ops.l2_norm_forward(size * x)
    assert_all_close([ours, ops.l2_norm_backward(dy, cache)], [y, *backpropagate([y], [dy], leaves)])


# ---- attention


@pytest.mark.parametrize(
    "head_dim, factor, sections", [(28, 0.5, [3, 2, 2]), (64, 0.5, [6, 5, 5]), (40, 0.25, [2, 1, 2])]
)
def test_rotary_positions_with_interleaved_sections_equal_hfs(head_dim, factor, sections):
    """Time, height and width of each token differ, as in an image."""
    rope = dict(rope_type="default", rope_theta=5e3, partial_rotary_factor=factor, mrope_section=sections)
    config = text_config(SHAPES["H_v = 3 H_k"] | dict(head_dim=head_dim, rope_parameters=rope))
    rng = np.random.default_rng(6)
    B, L, H, H_kv = 2, 9, 3, 5
    positions = rng.integers(0, 200, (3, L))
    q, dq_turned = rng.standard_normal((2, B, L, H, head_dim))
    k, dk_turned = rng.standard_normal((2, B, L, H_kv, head_dim))
    leaves = torch_leaves(q, k)
    tables = hf.Qwen3_5TextRotaryEmbedding(config)(leaves[0], torch.tensor(positions)[:, None])
    turned = hf.apply_rotary_pos_emb(*leaves, *tables, unsqueeze_dim=2)
    theirs = backpropagate(turned, (dq_turned, dk_turned), leaves)
    cos, sin = ops.rope_tables(positions, int(head_dim * factor), 5e3, sections, np.float64)
    ours = [ops.rope_forward(x, cos, sin) for x in (q, k)]
    ours += [ops.rope_backward(d, cos, sin) for d in (dq_turned, dk_turned)]
    assert_all_close(ours, [*turned, *theirs])


@pytest.mark.parametrize("past", [0, 4])
def test_grouped_query_attention_equals_torchs_after_any_past(past):
    rng = np.random.default_rng(7)
    B, L, H, H_kv, d = 2, 9, 6, 2, 5
    q, do = rng.standard_normal((2, B, L, H, d))
    k, v = rng.standard_normal((2, B, past + L, H_kv, d))
    leaves = torch_leaves(q, k, v)
    visible = torch.ones(L, past + L, dtype=torch.bool).tril(past)
    o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), attn_mask=visible, enable_gqa=True)
    o = o.transpose(1, 2)
    theirs = backpropagate([o], [do], leaves)
    ours, cache = ops.softmax_attention_forward(q, k, v)
    assert_all_close([ours, *ops.softmax_attention_backward(do, cache)], [o, *theirs])


# ---- gates and the loss


def test_decay_gate_equals_autograd():
    """a reaches far into both tails of softplus."""
    rng = np.random.default_rng(8)
    a, b, dg, dbeta = rng.standard_normal((4, 2, 7, 3))
    A_log, dt_bias = rng.standard_normal((2, 3))
    leaves = torch_leaves(12 * a, 5 * b, A_log, dt_bias)
    ta, tb, tA, tdt = leaves
    outputs = -tA.exp() * F.softplus(ta + tdt, threshold=50), tb.sigmoid()
    theirs = backpropagate(outputs, (dg, dbeta), leaves)
    g, beta, cache = ops.decay_gate_forward(12 * a, 5 * b, A_log, dt_bias)
    assert_all_close([g, beta, *ops.decay_gate_backward(dg, dbeta, cache)], [*outputs, *theirs])


def test_cross_entropy_with_ignored_labels_equals_torchs():
    rng = np.random.default_rng(9)
    logits = 5 * rng.standard_normal((11, 13))
    labels = np.where(rng.random(11) < 0.4, -100, rng.integers(0, 13, 11))
    leaves = torch_leaves(logits)
    loss = F.cross_entropy(leaves[0], torch.tensor(labels))
    ours, cache = ops.cross_entropy_forward(logits, labels)
    assert_all_close(
        [np.float64(ours), ops.cross_entropy_backward(1.7, cache)], [loss, *backpropagate([loss], [1.7], leaves)]
    )
