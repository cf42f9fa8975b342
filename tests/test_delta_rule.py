"""The gated delta rule: the recurrence against other people's numbers, complex step and 50 digits; the chunked form
against the recurrence."""

import json

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from deltanet_ref.backends import get_backend
from deltanet_ref.errors import InputError
from deltanet_ref.notation import value_to_key_head
from deltanet_ref.ops import gated_delta_rule as gdr
from deltanet_ref.ops.gated_delta_rule.wy import unit_lower_inverse
from deltanet_ref.ops.l2_norm import l2_norm_backward, l2_norm_forward
from deltanet_ref.oracle.derivative import complex_step_gradient
from tests.delta_rule import RESULTS, SIZES, definition, delta_rule_arguments, rule_floors, worst_element
from tests.paths import FIXTURES
from tests.test_ops_backward import BOTH, ONE
from tests.tolerances import assert_close, assert_identical, assert_within, assert_within_floors, noise_floors, rounding

FORMS = {
    "recurrent": (gdr.recurrent_forward, gdr.recurrent_backward),
    "chunk": (gdr.chunk_forward, gdr.chunk_backward),
    "chunk of 4": (lambda *a, **k: gdr.chunk_forward(*a, chunk_size=4, **k), gdr.chunk_backward),
}
CHUNKS = {"recurrent": 0, "chunk": 64, "chunk of 4": 4}
every_form = pytest.mark.parametrize("form", FORMS)


def run(form, q, k, v, gates, do, dS_end, **options):
    forward, backward = FORMS[form]
    o, S_end, cache = forward(q, k, v, **gates, **options)
    return dict(zip(RESULTS, (o, S_end, *backward(do, dS_end, cache))))


# ---- against other people's numbers


@every_form
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("path", sorted((FIXTURES / "op").glob("*.npz")), ids=lambda p: p.stem)
def test_equals_torch_autograd_in_float64(path, form, dtype):
    """Within ONE + sqrt(L) noise floors: the state is rounded once per token, and rounding errors add up like the steps
    of a random walk. A chunk's sums of up to C terms are shorter."""
    gold = np.load(path)
    meta = json.loads(str(gold["meta"]))

    def results(form, arguments):
        q, k, v, g, beta, S0, do, dS_end = arguments
        gates = dict(g=g, beta=beta, S0=S0 if meta["initial_state"] else None)
        if meta["l2norm"]:
            (q, q_cache), (k, k_cache) = l2_norm_forward(q), l2_norm_forward(k)
        got = run(form, q, k, v, gates, do, dS_end, scale=meta["scale"])
        if meta["l2norm"]:
            got["dq"], got["dk"] = l2_norm_backward(got["dq"], q_cache), l2_norm_backward(got["dk"], k_cache)
        return list(got.values())

    stored = {"S_end": "final_state", "dS0": "dinitial_state"}
    x = [gold[name].astype(dtype) for name in ("q", "k", "v", "g", "beta", "initial_state", "do", "dS")]
    golden = [gold[stored.get(name, name)] for name in RESULTS]
    got, floors = results(form, x), noise_floors(lambda y: results("recurrent", y), x, dtype)
    assert all(value.dtype == dtype for value in got)
    assert_within_floors(RESULTS, got, golden, floors, ONE + x[0].shape[1] ** 0.5)


# ---- the definition, worked out by hand


def test_one_token_decays_then_corrects_then_reads():
    q, k = np.array([[[[2.0, 1.0]]]]), np.array([[[[0.6, 0.8]]]])
    v, S0 = np.array([[[[3.0, 5.0, 7.0]]]]), np.array([[[[1.0, 2.0, 4.0], [5.0, 0.0, -1.0]]]])
    g, beta = np.log(np.array([[[0.5]]])), np.array([[[0.25]]])
    # S~ = [[.5, 1, 2], [2.5, 0, -.5]]; k S~ = [2.3, .6, .8]; u = [.175, 1.1, 1.55]
    S_end = np.array([[0.605, 1.66, 2.93], [2.64, 0.88, 0.74]])
    o, S, _ = gdr.recurrent_forward(q, k, v, g=g, beta=beta, S0=S0, scale=10.0)
    # 8 roundings at most for S (exp, decay, two products, two sums, times beta, times k), 4 more for o; nothing cancels
    assert_within("S_end", S[0, 0], S_end, rounding(8) * np.abs(S_end))
    assert_within("o", o[0, 0, 0], 10 * (2 * S_end[0] + S_end[1]), rounding(12) * 10 * (2 * S_end[0] + S_end[1]))


@every_form
def test_beta_zero_only_decays(form):
    q, k, v, gates, do, dS_end = delta_rule_arguments(1, **SIZES)
    gates["beta"][:] = 0
    S_end = run(form, q, k, v, gates, do, dS_end)["S_end"]
    decay = np.exp(gates["g"].sum(1))
    expected = decay[..., None, None] * gates["S0"]
    # L products of exp(g), against exp of the sum of g, which is off by eps |sum of g|: 11 tokens of at most 1 each
    assert_within("S_end", S_end, expected, rounding(4 * SIZES["L"]) * np.abs(expected))


def test_beta_one_without_decay_stores_v_under_k():
    q, k, v, gates, _, _ = delta_rule_arguments(2, **SIZES)
    gates["g"][:], gates["beta"][:] = 0, 1
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    _, S_end, _ = gdr.recurrent_forward(q, k, v, **gates)
    key_head = value_to_key_head(2, 6, "grouped")
    read = np.einsum("bhk,bhkv->bhv", k[:, -1][:, key_head], S_end)
    # k (S + k^T (v - k S)): d_k terms in each product, of |S| and |v|; |k| is 1 to an eps
    assert_within("k S_end", read, v[:, -1], rounding(4 * SIZES["d_k"]) * (np.abs(S_end).max() + np.abs(v).max()))


def test_recurrence_equals_fifty_digits():
    """One head, mixed decay: every output of the float64 recurrence against mpmath, within the noise floor."""
    q, k, v, gates, do, dS_end = delta_rule_arguments(3, B=1, L=7, H_k=1, H_v=1, d_k=3, d_v=2)
    gates["g"][0, :, 0] = [0, -1e-3, -5, -20, -0.1, -120, -2]
    o, S_end, _ = gdr.recurrent_forward(q, k, v, **gates)
    expected = []
    with mpmath.workdps(50):
        S = mpmath.matrix(gates["S0"][0, 0].tolist())
        for t in range(7):
            row = [mpmath.matrix([x[0, t, 0].tolist()]) for x in (q, k, v)]
            S = S * mpmath.exp(mpmath.mpf(float(gates["g"][0, t, 0])))
            u = (row[2] - row[1] * S) * mpmath.mpf(float(gates["beta"][0, t, 0]))
            S = S + row[1].T * u
            exact = row[0] * S * mpmath.mpf(float(3**-0.5))
            expected.append([float(x) for x in exact])
    expected = [np.array(expected), np.array(S.tolist(), float).reshape(3, 2)]
    floors = rule_floors(q, k, v, gates, do, dS_end, np.float64)[:2]
    assert_within_floors(RESULTS[:2], [o[0, :, 0], S_end[0, 0]], expected, floors, ONE)


# ---- every backward is the derivative of its own forward


@every_form
@pytest.mark.parametrize("head_order", ["grouped", "tiled"])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 3, 3, 11]], ids=["dense", "packed with an empty sequence"])
def test_backward_is_the_complex_step_derivative(form, head_order, cu_seqlens):
    sizes = dict(SIZES, B=1, L=11, N_seq=3) if cu_seqlens else dict(SIZES, L=6)
    q, k, v, gates, do, dS_end = delta_rule_arguments(4, **sizes)
    gates["g"][:, ::3] *= 8
    options = dict(head_order=head_order, cu_seqlens=cu_seqlens)
    got = run(form, q, k, v, gates, do, dS_end, **options)
    inputs, expected = dict(q=q, k=k, v=v, **gates), []
    for name in inputs:

        def loss(x):
            a = {**inputs, name: x}
            o, S_end, _ = FORMS[form][0](a["q"], a["k"], a["v"], g=a["g"], beta=a["beta"], S0=a["S0"], **options)
            return (o * do).sum() + (S_end * dS_end).sum()

        expected.append(complex_step_gradient(loss, inputs[name]))
    floors = rule_floors(q, k, v, gates, do, dS_end, np.float64, chunk_size=CHUNKS[form], **options)[2:]
    assert_within_floors(RESULTS[2:], [got[name] for name in RESULTS[2:]], expected, floors, BOTH)


@every_form
def test_gradients_through_the_final_state_alone(form):
    q, k, v, gates, do, dS_end = delta_rule_arguments(5, **SIZES)
    got = run(form, q, k, v, gates, np.zeros_like(do), dS_end)
    exact = complex_step_gradient(lambda x: (gdr.recurrent_forward(q, x, v, **gates)[1] * dS_end).sum(), k)
    floors = rule_floors(q, k, v, gates, np.zeros_like(do), dS_end, np.float64, chunk_size=CHUNKS[form])
    assert_within_floors(["dk"], [got["dk"]], [exact], [floors[RESULTS.index("dk")]], BOTH)
    assert not got["dq"].any()


@every_form
def test_log_decay_gradient_keeps_its_digits_under_strong_decay(form):
    """float32 against float64 for every token by itself, relative to the token's own scale |dg| + |q.dq| + |k.dk|, and
    to dg itself; in floors of the worst token, ONE + sqrt(L) as above."""
    q, k, v, gates, do, dS_end = delta_rule_arguments(6, B=1, L=150, H_k=1, H_v=2, d_k=8, d_v=6, decay=30.0)
    gates["g"][0, ::7] = -1e-3
    q, k, v, do, dS_end = (x.astype(np.float32) for x in (q, k, v, do, dS_end))
    gates = {name: x.astype(np.float32) for name, x in gates.items()}
    exact = definition(q, k, v, gates, do, dS_end)
    along = sum(np.abs((x.astype(np.float64) * exact[d]).sum(-1)) for x, d in ((q, "dq"), (k, "dk")))
    got = run(form, q, k, v, gates, do, dS_end)["dg"]
    for name, scale in (("|dg| + |q.dq| + |k.dk|", np.abs(exact["dg"]) + along), ("|dg|", np.abs(exact["dg"]))):
        floor = worst_element(lambda d: d["dg"] / scale, q, k, v, gates, do, dS_end, np.float32)
        error = (np.abs(got - exact["dg"]) / scale).max()
        assert error < (ONE + 150**0.5) * floor, f"dg relative to {name}: {error:.3g}, floor {floor:.3g}"


# ---- the chunked form is the recurrence


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chunk_equals_recurrence(data):
    """Any sizes, any chunk tail, decay from none to -120, zero keys, beta 0, 1 and 2, packed or not."""
    draw = data.draw
    H_k, ratio = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    C = draw(st.sampled_from([1, 2, 3, 5, 8, 16, 64]))
    L = draw(st.integers(1, 3 * C if C < 20 else 150))
    cuts = sorted(draw(st.lists(st.integers(0, L), max_size=3))) if draw(st.booleans()) else None
    packed = cuts is not None
    sizes = dict(
        B=1 if packed else draw(st.integers(1, 3)),
        L=L,
        H_k=H_k,
        H_v=H_k * ratio,
        d_k=draw(st.integers(1, 9)),
        d_v=draw(st.integers(1, 9)),
        N_seq=len(cuts) + 1 if packed else None,
    )
    q, k, v, gates, do, dS_end = delta_rule_arguments(draw(st.integers(0, 2**31)), **sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    gates["g"] *= rng.choice([0, 1e-3, 1, 20, 120], gates["g"].shape)
    gates["beta"] = np.where(
        rng.random(gates["beta"].shape) < 0.3, rng.choice([0.0, 1.0, 2.0], gates["beta"].shape), gates["beta"]
    )
    k[rng.random(k.shape[:3]) < 0.2] = 0
    options = dict(cu_seqlens=[0, *cuts, L] if packed else None, head_order=draw(st.sampled_from(["grouped", "tiled"])))
    exact = definition(q, k, v, gates, do, dS_end, **options)
    o, S_end, cache = gdr.chunk_forward(q, k, v, **gates, chunk_size=C, **options)
    floors = rule_floors(q, k, v, gates, do, dS_end, np.float64, chunk_size=C, **options)
    # a value of the chunked form is a sum of up to C products, whose roundings may all have one sign where keys repeat
    assert_within_floors(RESULTS, [o, S_end, *gdr.chunk_backward(do, dS_end, cache)], exact.values(), floors, BOTH + C)


@pytest.mark.parametrize("L", [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129])
def test_every_tail_length(L):
    arguments = delta_rule_arguments(L, B=2, L=L, H_k=1, H_v=3, d_k=7, d_v=4)
    floors = rule_floors(*arguments, np.float64, chunk_size=64)
    assert_within_floors(RESULTS, run("chunk", *arguments).values(), definition(*arguments).values(), floors, BOTH + 64)


def test_triangular_inverse_with_repeated_keys():
    """A key repeated 64 times with beta 2: the Neumann series has terms near 2^63; halving does not form them."""
    A = np.tril(np.full((64, 64), 2.0), -1)
    T = unit_lower_inverse(A)
    # T is 1, -2, 2, -2, ...: each element of the product sums 64 terms of at most 2 * 2, as do those that made T
    assert_within(
        "T (I + A)", T @ (np.eye(64) + A), np.eye(64), rounding(2 * 64) * (np.abs(T) @ (np.eye(64) + A)).max()
    )


# ---- sequences and batches do not touch one another


@every_form
def test_packed_equals_separate_runs(form):
    cu = [0, 5, 6, 73, 140]
    q, k, v, gates, do, dS_end = delta_rule_arguments(7, B=1, L=140, H_k=2, H_v=4, d_k=6, d_v=5, N_seq=4)
    packed = run(form, q, k, v, gates, do, dS_end, cu_seqlens=cu)
    for n, (a, b) in enumerate(zip(cu, cu[1:])):
        one = {name: x[:, a:b] for name, x in gates.items() if name != "S0"} | {"S0": gates["S0"][n : n + 1]}
        alone = run(form, q[:, a:b], k[:, a:b], v[:, a:b], one, do[:, a:b], dS_end[n : n + 1])
        for name in RESULTS:
            part = packed[name][n : n + 1] if "S" in name else packed[name][:, a:b]
            assert_identical(f"{name} of sequence {n}", part, alone[name])


@every_form
def test_rows_of_a_batch_are_independent(form):
    q, k, v, gates, do, dS_end = delta_rule_arguments(8, B=3, L=70, H_k=2, H_v=4, d_k=6, d_v=5)
    whole = run(form, q, k, v, gates, do, dS_end)
    for b in range(3):
        row = run(
            form,
            *(x[b : b + 1] for x in (q, k, v)),
            {n: x[b : b + 1] for n, x in gates.items()},
            do[b : b + 1],
            dS_end[b : b + 1],
        )
        for name in RESULTS:
            assert_identical(f"{name} of row {b}", whole[name][b : b + 1], row[name])


@every_form
@pytest.mark.parametrize("split", [1, 4, 63, 64, 65])
def test_state_carries_over_a_split(form, split):
    q, k, v, gates, do, dS_end = delta_rule_arguments(9, B=2, L=80, H_k=2, H_v=4, d_k=6, d_v=5)
    o, S_end, _ = FORMS[form][0](q, k, v, **gates)
    S, parts = gates["S0"], []
    for part in (slice(0, split), slice(split, 80)):
        o_part, S, _ = FORMS[form][0](
            q[:, part], k[:, part], v[:, part], g=gates["g"][:, part], beta=gates["beta"][:, part], S0=S
        )
        parts.append(o_part)
    floors = rule_floors(q, k, v, gates, do, dS_end, np.float64, chunk_size=CHUNKS[form])[:2]
    assert_within_floors(RESULTS[:2], [np.concatenate(parts, 1), S], [o, S_end], floors, BOTH)


def test_steps_equal_the_whole_run():
    q, k, v, gates, _, _ = delta_rule_arguments(10, **SIZES)
    o, S_end, _ = gdr.recurrent_forward(q, k, v, **gates, head_order="tiled")
    S = gates["S0"]
    for t in range(SIZES["L"]):
        o_t, S = gdr.recurrent_step(
            q[:, t], k[:, t], v[:, t], g=gates["g"][:, t], beta=gates["beta"][:, t], S=S, head_order="tiled"
        )
        assert_identical(f"o of token {t}", o_t, o[:, t])
    assert_identical("S_end", S, S_end)


@every_form
def test_head_orders_differ_by_the_permutation_of_the_value_heads(form):
    q, k, v, gates, do, dS_end = delta_rule_arguments(11, **SIZES)
    grouped, tiled = (value_to_key_head(2, 6, order) for order in ("grouped", "tiled"))
    to_tiled = np.argsort(np.argsort(tiled, kind="stable"), kind="stable")  # the grouped head that stands there
    assert np.array_equal(grouped[to_tiled], tiled)
    a = run(form, q, k, v, gates, do, dS_end)
    permuted = {n: x[:, to_tiled] if n == "S0" else x[:, :, to_tiled] for n, x in gates.items()}
    b = run(form, q, k, v[:, :, to_tiled], permuted, do[:, :, to_tiled], dS_end[:, to_tiled], head_order="tiled")
    floors = dict(zip(RESULTS, rule_floors(q, k, v, gates, do, dS_end, np.float64, chunk_size=CHUNKS[form])))
    expected = {"o": a["o"][:, :, to_tiled], "dS0": a["dS0"][:, to_tiled], "dk": a["dk"]}
    assert_within_floors(expected, [b[n] for n in expected], expected.values(), [floors[n] for n in expected], BOTH)


# ---- arguments that do not fit


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(g=np.zeros((2, 11, 2))), "one per key head"),
        (dict(S0=np.zeros((2, 6, 3, 5))), "N_seq, H_v, d_k, d_v"),
        (dict(head_order="ggml"), "'grouped' .HF, FLA. or 'tiled' .GGUF."),
        (dict(cu_seqlens=[0, 11]), "needs B = 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_the_remedy(change, message):
    q, k, v, gates, _, _ = delta_rule_arguments(12, **SIZES)
    for forward in (gdr.recurrent_forward, gdr.chunk_forward):
        with pytest.raises(InputError, match=message):
            forward(q, k, v, **{**gates, **change})


@pytest.mark.parametrize("cu_seqlens", [[0, 5], [1, 11], [0, 7, 4, 11], [[0, 11]], [0.0, 11.0]])
def test_boundaries_must_rise_from_zero_to_the_end(cu_seqlens):
    q, k, v, gates, _, _ = delta_rule_arguments(13, **dict(SIZES, B=1))
    with pytest.raises(InputError, match="integers that do not decrease, from 0 to L = 11"):
        gdr.chunk_forward(q, k, v, **gates, cu_seqlens=cu_seqlens)


def test_the_solved_system_needs_neither_u_nor_w():
    """One chunk by [chunk.13..17]: V_new, dv and dS0 without T, U and W, against the forms that use them."""
    q, k, v, gates, do, dS_end = delta_rule_arguments(14, B=1, L=13, H_k=1, H_v=2, d_k=4, d_v=3)
    _, _, cache = gdr.chunk_forward(q, k, v, **gates, scale=0.7, chunk_size=13)
    _, _, dv, _, _, dS0 = gdr.chunk_backward(do, dS_end, cache)
    Q, K, (V, dO), S = q[0, :, 0], k[0, :, 0], (x[0].swapaxes(0, 1) for x in (v, 0.7 * do)), gates["S0"][0]
    beta, gc = (x.swapaxes(0, 1)[..., None] for x in (gates["beta"][0], np.cumsum(gates["g"][0], 0)))
    Gamma = np.tril(np.exp(gc - gc.swapaxes(1, 2)))
    I_A = np.eye(13) + np.tril(beta * (K @ K.T) * Gamma, -1)
    V_new = np.linalg.solve(I_A, beta * (V - np.exp(gc) * (K @ S)))
    dV_new = (Q @ K.T * Gamma).swapaxes(1, 2) @ dO + np.exp(gc[:, -1:] - gc) * (K @ dS_end[0])
    X = np.linalg.solve(I_A.swapaxes(1, 2), dV_new)
    dS0_solved = (
        np.exp(gc[:, -1:]) * dS_end[0]
        + (np.exp(gc) * Q).swapaxes(1, 2) @ dO
        - (beta * np.exp(gc) * K).swapaxes(1, 2) @ X
    )
    # solving amplifies rounding by the condition number at most; then sums of up to 13 tokens or 4 features
    limit = rounding(13 + 4) * np.linalg.cond(I_A).max()
    assert_close("V_new", cache.V_new[0], V_new, limit)
    assert_close("dv", dv[0].swapaxes(0, 1), beta * X, limit)
    assert_close("dS0", dS0[0], dS0_solved, limit)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("chunk_size", [0, -1, 2.0])
def test_a_chunk_size_below_one_or_not_an_integer_is_refused(backend, chunk_size):
    q, k, v, gates, _, _ = delta_rule_arguments(15, **SIZES)
    with pytest.raises(InputError, match="an integer of at least 1"):
        get_backend(backend).gated_delta_rule_forward(q, k, v, **gates, chunk_size=chunk_size)
