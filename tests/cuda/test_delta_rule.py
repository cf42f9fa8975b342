"""The gated delta rule's kernels against the recurrence in float64, in the emulator.

float32   within FLOAT32 noise floors (tests/delta_rule.py), as the numba backend within 4: the three TF32 products that
          stand for one in float32 lose up to two bits.
bfloat16  arguments are rounded first, so that kernels read them exactly. Kernels round factors of products (P, T, S, R,
          V_new, dO, X, dV_new, dS', dQK, dKK, decays included), and results. The floor is what rounding at random, by up
          to half a unit of bfloat16, the factors of all products of the chunked form does to a result. The form has W and
          U where the kernels have R, so the limit is BFLOAT16 floors, not one.

Fresh memory of the stand-in holds NaNs: what a kernel leaves out shows.
"""

from functools import partial

import numpy as np
import pytest

from deltanet_ref.backends.cuda import delta_rule, stand_in
from deltanet_ref.backends.cuda.emulator import jobs
from deltanet_ref.errors import InputError
from deltanet_ref.ops import gated_delta_rule as gdr
from deltanet_ref.oracle.chunk_by_chunk import chunk_by_chunk
from tests.delta_rule import RESULTS, definition, delta_rule_arguments, rule_floors, worst_element
from tests.tolerances import assert_identical, assert_within_floors

FLOAT32, BFLOAT16 = 4, 2  # floors
HALF_UNIT = 2.0**-8  # of bfloat16, which has 8 significant bits
WIDE = ("S_end", "dg", "dbeta", "dS0")  # float32 whatever the type of q, k, v

# sizes beside and on the multiples of 16 that kernels have; one and several warps of columns; chunks of 64 and of 32
SHAPES = {
    "small": (dict(B=2, L=70, H_k=2, H_v=6, d_k=5, d_v=3), dict(head_order="tiled")),
    "packed": (
        dict(B=1, L=203, H_k=2, H_v=4, d_k=33, d_v=65, N_seq=6),
        dict(cu_seqlens=[0, 64, 64, 65, 150, 151, 203], scale=0.3),
    ),
    "wide": (dict(B=1, L=130, H_k=1, H_v=2, d_k=80, d_v=96), dict(head_order="tiled")),
    "widest": (dict(B=1, L=67, H_k=1, H_v=1, d_k=250, d_v=32), {}),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def arguments(device, dtype, seed=1, decay=1.0, **sizes):
    """Arguments as kernels read them, host arrays: q, k, v, gates, do, dS_end."""
    real = np.dtype(np.float32) if dtype == "float32" else device.bf16
    q, k, v, gates, do, dS_end = delta_rule_arguments(seed, decay=decay, **sizes)
    gates = {name: x.astype(np.float32) for name, x in gates.items()}
    return *(x.astype(real) for x in (q, k, v)), gates, do.astype(real), dS_end.astype(np.float32)


def run(device, q, k, v, gates, do, dS_end, **options):
    """RESULTS of the kernels, as they come to the host."""
    q, k, v, do = map(stand_in.asarray, (q, k, v, do))
    gates = {name: None if x is None else stand_in.asarray(x) for name, x in gates.items()}
    o, S_end, cache = delta_rule.gated_delta_rule_forward(device, q, k, v, **gates, **options)
    dS_end = None if dS_end is None else stand_in.asarray(dS_end)
    gradients = delta_rule.gated_delta_rule_backward(device, do, dS_end, cache)
    results = {name: x.get() for name, x in zip(RESULTS, (o, S_end, *gradients), strict=True)}
    for name, x in results.items():
        assert x.dtype == (np.float32 if name in WIDE else q.dtype), name
    return results


def bfloat16_floors(q, k, v, gates, do, dS_end, draws=3, scale=None, **options):
    """What the roundings that the module's docstring names do to RESULTS, as norms."""
    rng = np.random.default_rng(0)
    x = {name: np.asarray(a, np.float64) for name, a in dict(q=q, k=k, v=v, **gates, do=do, dS_end=dS_end).items()}
    x |= options | dict(scale=q.shape[-1] ** -0.5 if scale is None else scale)

    def rounded(a):
        return a * (1 + HALF_UNIT * rng.uniform(-1, 1, a.shape))

    exact, moved = chunk_by_chunk(x), np.zeros(len(RESULTS))
    for _ in range(draws):
        y = chunk_by_chunk(x, operand=rounded)
        y = {name: y[name] if name in WIDE else rounded(y[name]) for name in RESULTS}
        moved = np.maximum(moved, [np.linalg.norm(y[name] - exact[name]) for name in RESULTS])
    return moved


def check(device, dtype, sizes, options, decay=1.0, seed=1):
    x = arguments(device, dtype, seed, decay, **sizes)
    got = {name: value.astype(np.float64) for name, value in run(device, *x, **options).items()}
    exact = definition(*x, **options)
    if dtype == "float32":
        floors, factor = rule_floors(*x, np.float32, chunk_size=64, **options), FLOAT32
    else:
        floors, factor = bfloat16_floors(*x, **options), BFLOAT16
    assert_within_floors(RESULTS, [got[name] for name in RESULTS], exact.values(), floors, factor)


# ---- against the recurrence


@every_dtype
@every_shape
@pytest.mark.parametrize("decay", [0.1, 20])
def test_kernels_equal_the_recurrence(device, shape, dtype, decay):
    sizes, options = SHAPES[shape]
    check(device, dtype, sizes, options, decay)


@every_dtype
@pytest.mark.parametrize("L", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_every_tail_length(device, dtype, L):
    check(device, dtype, dict(B=2, L=L, H_k=1, H_v=3, d_k=7, d_v=4), {}, seed=L)


@every_dtype
def test_four_warps_of_columns(device, dtype, monkeypatch):
    monkeypatch.setattr(delta_rule, "BLOCKS_WANTED", 1)
    check(device, dtype, dict(B=1, L=66, H_k=1, H_v=1, d_k=16, d_v=128), {})


@every_dtype
def test_values_replaced_and_repeated_keys(device, dtype):
    """beta 1 and 2, one key for all tokens, no decay: T has its largest entries."""
    sizes = dict(B=1, L=130, H_k=1, H_v=2, d_k=8, d_v=6)
    q, k, v, gates, do, dS_end = arguments(device, dtype, **sizes)
    k[:] = k[:, :1]
    gates["g"][:] = 0
    gates["beta"][:] = [1, 2]
    x = q, k, v, gates, do, dS_end
    got, exact = run(device, *x), definition(*x)
    floors = rule_floors(*x, np.float32, chunk_size=64) if dtype == "float32" else bfloat16_floors(*x)
    # entries of T are nearly equal and rounded alike: C errors of one sign, where random ones add up to sqrt(C)
    factor = 64**0.5 * (FLOAT32 if dtype == "float32" else BFLOAT16)
    assert_within_floors(RESULTS, [got[name].astype(np.float64) for name in RESULTS], exact.values(), floors, factor)


def test_log_decay_gradient_keeps_its_digits_under_strong_decay(device):
    """float32, every token by itself: relative to |dg| + |q.dq| + |k.dk| and to dg, in floors of the worst token; the
    factor of tests/test_delta_rule.py, which ops keeps in float32."""
    x = arguments(device, "float32", 6, decay=30.0, B=1, L=150, H_k=1, H_v=2, d_k=8, d_v=6)
    q, k, _, gates, *_ = x
    gates["g"][0, ::7] = -1e-3
    exact, got = definition(*x), run(device, *x)["dg"]
    along = sum(np.abs((a.astype(np.float64) * exact[d]).sum(-1)) for a, d in ((q, "dq"), (k, "dk")))
    for name, scale in (("|dg| + |q.dq| + |k.dk|", np.abs(exact["dg"]) + along), ("|dg|", np.abs(exact["dg"]))):
        floor = worst_element(lambda d: d["dg"] / scale, *x, np.float32)
        error = (np.abs(got - exact["dg"]) / scale).max()
        assert error < (3 + 150**0.5) * floor, f"dg relative to {name}: {error:.3g}, floor {floor:.3g}"


@every_dtype
def test_no_state_is_a_state_of_zeros(device, dtype):
    q, k, v, gates, do, dS_end = arguments(device, dtype, B=2, L=65, H_k=1, H_v=2, d_k=16, d_v=20)
    with_zeros = run(device, q, k, v, gates | dict(S0=np.zeros_like(gates["S0"])), do, np.zeros_like(dS_end))
    without = run(device, q, k, v, gates | dict(S0=None), do, None)
    for name in RESULTS:
        assert_identical(name, without[name], with_zeros[name])


# ---- bits


@every_dtype
def test_packed_equals_separate_runs_and_the_same_again(device, dtype):
    cu = [0, 5, 5, 6, 73, 140]
    x = arguments(device, dtype, 7, B=1, L=140, H_k=2, H_v=4, d_k=6, d_v=5, N_seq=5)
    q, k, v, gates, do, dS_end = x
    packed, again = run(device, *x, cu_seqlens=cu), run(device, *x, cu_seqlens=cu)
    for name in RESULTS:
        assert_identical(f"{name} again", again[name], packed[name])
    assert_identical("S_end of the empty sequence", packed["S_end"][1], gates["S0"][1])
    assert_identical("dS0 of the empty sequence", packed["dS0"][1], dS_end[1])
    for n, (a, b) in enumerate(zip(cu, cu[1:])):
        if a == b:
            continue
        one = {name: y[:, a:b] for name, y in gates.items() if name != "S0"} | {"S0": gates["S0"][n : n + 1]}
        alone = run(device, q[:, a:b], k[:, a:b], v[:, a:b], one, do[:, a:b], dS_end[n : n + 1])
        for name in RESULTS:
            part = packed[name][n : n + 1] if "S" in name else packed[name][:, a:b]
            assert_identical(f"{name} of sequence {n}", part, alone[name])


@every_dtype
def test_views_give_the_bits_of_copies_and_nothing_is_overwritten(device, dtype):
    x = arguments(device, dtype, 8, B=2, L=40, H_k=1, H_v=3, d_k=16, d_v=16)

    def view(a):  # a device array with a stride
        padded = np.zeros((*a.shape[:-1], a.shape[-1] + 3), a.dtype)
        padded[..., : a.shape[-1]] = a
        return stand_in.asarray(padded)[..., : a.shape[-1]]

    def results(arrange):
        q, k, v, gates, do, dS_end = (
            {n: arrange(b) for n, b in a.items()} if isinstance(a, dict) else arrange(a) for a in x
        )
        o, S_end, cache = delta_rule.gated_delta_rule_forward(device, q, k, v, **gates)
        backward = partial(delta_rule.gated_delta_rule_backward, device, do, dS_end, cache)
        got = [y.get() for y in (o, S_end, *backward(), *backward())]
        for name, given, host in zip("qkv", (q, k, v), x):
            assert_identical(name, given.get(), host)
        return got

    for position, (a, b) in enumerate(zip(results(stand_in.asarray), results(view))):
        assert_identical(f"result {position}", b, a)


# ---- one token


@every_dtype
@pytest.mark.parametrize("head_order", ["grouped", "tiled"])
def test_a_step_equals_the_recurrence(device, dtype, head_order):
    """Three steps; o in bfloat16 is rounded once more."""
    q, k, v, gates, _, _ = arguments(device, dtype, 10, decay=3.0, B=3, L=3, H_k=2, H_v=6, d_k=35, d_v=37)
    S = stand_in.asarray(gates["S0"])
    exact = gates["S0"].astype(np.float64)
    for t in range(3):
        given = {name: gates[name][:, t] for name in ("g", "beta")}
        o, S = delta_rule.gated_delta_rule_step(
            device, *(stand_in.asarray(x[:, t]) for x in (q, k, v)),
            **{name: stand_in.asarray(x) for name, x in given.items()}, S=S, head_order=head_order,
        )  # fmt: skip
        o_exact, exact = gdr.recurrent_step(
            *(x[:, t].astype(np.float64) for x in (q, k, v)), **{n: x.astype(np.float64) for n, x in given.items()},
            S=exact, head_order=head_order,
        )  # fmt: skip
        # sums of up to d_k products in float32, after t + 1 tokens
        terms = np.abs(exact).max() * 35**0.5 * 2.0**-24 * 35 * (t + 1)
        assert np.abs(S.get() - exact).max() < terms
        stored = HALF_UNIT * np.abs(o_exact) if dtype == "bfloat16" else 0
        assert (np.abs(o.get().astype(np.float64) - o_exact) <= terms + stored).all()


# ---- what is refused


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(g=np.zeros((1, 4, 1), np.float32)), "one per key head"),
        (dict(S0=np.zeros((1, 2, 3, 5), np.float32)), "N_seq, H_v, d_k, d_v"),
        (dict(head_order="ggml"), "'grouped' .HF, FLA. or 'tiled' .GGUF."),
        (dict(cu_seqlens=[0, 3]), "from 0 to L = 4"),
        (dict(chunk_size=0), "an integer of at least 1"),
        (dict(beta=np.zeros((1, 4, 2), np.float16)), "float16"),
        (dict(q=np.zeros((1, 4, 1, 5), np.float16)), "float16"),
        (dict(q=np.zeros((1, 4, 1, 300), np.float32), k=np.zeros((1, 4, 1, 300), np.float32), S0=None), "up to 256"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_the_remedy(device, change, message):
    q, k, v, gates, *_ = arguments(device, "float32", B=1, L=4, H_k=1, H_v=2, d_k=5, d_v=3)
    given = dict(q=q, k=k, v=v, **gates) | change
    given = {name: stand_in.asarray(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    with pytest.raises(InputError, match=message):
        delta_rule.gated_delta_rule_forward(device, **given)


# ---- races, bounds, barriers


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def launches(request, device):
    """Those of a forward and a backward of two chunks and a rest, two warps of columns; and of a step."""
    L = 75 if request.param == "float32" else 150
    sizes = dict(B=1, L=L, H_k=1, H_v=2, d_k=48, d_v=32)
    with jobs.recording() as launches:
        q, k, v, gates, *_ = x = arguments(device, request.param, **sizes)
        run(device, *x)
        delta_rule.gated_delta_rule_step(
            device, *(stand_in.asarray(y[:, 0]) for y in (q, k, v)), S=stand_in.asarray(gates["S0"]),
            **{name: stand_in.asarray(gates[name][:, 0]) for name in ("g", "beta")},
        )  # fmt: skip
    return launches


@pytest.mark.parametrize("build", ["thread", "address"])
def test_sanitizers_find_nothing(launches, build):
    assert jobs.run(launches, build).findings == []


def test_every_barrier_and_wait_is_needed(launches):
    noticed = jobs.switch_off_each(launches)
    assert len(noticed) > 20
    assert [site for site, what in noticed.items() if what is None] == []
