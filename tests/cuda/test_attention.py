"""Softmax attention on the CUDA backend, in the emulator, against ops in float64."""

import numpy as np
import pytest

from deltanet_ref import ops
from deltanet_ref.backends.cuda import softmax_attention as cuda
from deltanet_ref.backends.cuda.emulator import jobs
from deltanet_ref.errors import InputError
from tests.tolerances import assert_identical, assert_within, assert_within_floors, noise_floors

RESULTS = ("o", "dq", "dk", "dv")
ROUNDED = 2.0**-8  # half a unit in the last place of bfloat16, which has 8 bits, relative
SMALLEST_SHARED = 99 << 10  # bytes of shared memory that a block may have on sm_89 and sm_120, the least of all cards
# One tile of either dtype has 16, 32 or 64 rows: lengths around each, several tiles and a rest; all sizes differ.
SHAPES = {
    f"{L} tokens": dict(B=1, L=L, past=0, H=6, H_kv=2, d=9, d_v=13) for L in (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 147)
} | {
    "batch": dict(B=3, L=35, past=0, H=2, H_kv=1, d=33, d_v=40),
    "past": dict(B=2, L=21, past=70, H=3, H_kv=3, d=16, d_v=7),
    "one token after 64": dict(B=2, L=1, past=64, H=4, H_kv=2, d=12, d_v=14),
    "packed": dict(B=1, L=119, past=0, H=4, H_kv=2, d=11, d_v=8, cu_seqlens=np.array([0, 17, 17, 18, 83, 119])),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def dtype_of(device, name):
    return device.bf16 if name == "bfloat16" else np.dtype(name)


def arguments(dtype, *, B, L, past, H, H_kv, d, d_v, cu_seqlens=None, sharpness=1):
    """q, k, v, do, rounded to dtype, and the options."""
    rng = np.random.default_rng([B, L, past, d])
    q, do = (rng.standard_normal((B, L, H, n)) for n in (d, d_v))
    k, v = (rng.standard_normal((B, past + L, H_kv, n)) for n in (d, d_v))
    options = {} if cu_seqlens is None else dict(cu_seqlens=cu_seqlens)
    return [x.astype(dtype) for x in (sharpness * q, k, v, do)], options


def definition(arrays, **options):
    q, k, v, do = (np.asarray(x, np.float64) for x in arrays)
    o, cache = ops.softmax_attention_forward(q, k, v, **options)
    return [o, *ops.softmax_attention_backward(do, cache)]


def on_device(device, arrays, **options):
    q, k, v, do = (device.upload(x) for x in arrays)
    o, cache = cuda.softmax_attention_forward(device, q, k, v, **options)
    return [x.get() for x in (o, *cuda.softmax_attention_backward(device, do, cache))]


# ---- numbers


@every_shape
@pytest.mark.parametrize("sharpness", [1, 30, 1000])
def test_float32_loses_little_more_than_rounding_its_arguments_would(device, shape, sharpness):
    """Up to scores with which every P is 0 or 1. Within 8 noise floors; measured: 4.3 at most."""
    arrays, options = arguments(np.float32, **shape, sharpness=sharpness)
    got = on_device(device, arrays, **options)
    assert_within_floors(RESULTS, got, definition(arrays, **options), float32_floors(arrays, **options), 8)


def float32_floors(arrays, cu_seqlens=None):
    """Noise floors of o, dq, dk, dv where the sums s_ij, dP_ij and mean_i are rounded too: by half a unit of the
    sum of their absolute terms. That is most of the error where scores are large, or P_ij is 1 and dP_ij = mean_i.
    """
    (B, L, H, _), M = arrays[0].shape, arrays[1].shape[1]
    ones = np.ones((B, H, L, M)), np.ones((B, H, L, M)), np.ones((B, H, L))

    def compute(arguments):
        return whole_matrices(arguments[:4], None, cu_seqlens, *arguments[4:])[:4]

    return noise_floors(compute, [*arrays, *ones], np.float32)


@every_shape
@pytest.mark.parametrize("scale", [None, 0.3, -0.1])
def test_bfloat16_is_within_what_its_roundings_allow(device, shape, scale):
    arrays, options = arguments(device.bf16, **shape)
    got = on_device(device, arrays, scale=scale, **options)
    exact, bounds = definition(arrays, scale=scale, **options), bfloat16_bounds(arrays, scale, **options)
    for name, g, e, bound in zip(RESULTS, got, exact, bounds, strict=True):
        assert g.dtype == device.bf16
        assert_within(name, g.astype(np.float64), e, bound)


def bfloat16_bounds(arrays, scale, cu_seqlens=None):
    """Bounds on the errors of o, dq, dk, dv, to first order in u = 2^-8, from every place where the kernels round to
    bfloat16: e and P as factors of o and dv, ds as the factor of dq and dk, and each result when it is stored.

    The backward's mean_i = do_i . o_i takes o as stored, so that its error E_i enters ds_ij as P_ij E_i.
    5 % are for products of roundings and for float32: sums of at most 150 terms.
    """
    u = ROUNDED
    q, k, v, do = (np.asarray(x, np.float64) for x in arrays)
    *exact, P, ds, scale = whole_matrices([q, k, v, do], scale, cu_seqlens)
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(np.abs(x), group, axis=2) for x in (k, v))
    E = np.einsum("bihc,bihc->bhi", np.abs(do), u * (np.einsum("bhij,bjhc->bihc", P, v) + np.abs(exact[0])))
    ds_bound = P * E[..., None] + u * np.abs(ds)
    bounds = (
        u * np.einsum("bhij,bjhc->bihc", P, v),
        abs(scale) * np.einsum("bhij,bjhc->bihc", ds_bound, k),
        abs(scale) * of_key_heads(np.einsum("bhij,bihc->bjhc", ds_bound, np.abs(q)), group),
        u * of_key_heads(np.einsum("bhij,bihc->bjhc", P, np.abs(do)), group),
    )
    return [1.05 * (bound + u * np.abs(x)) + 1e-12 for bound, x in zip(bounds, exact, strict=True)]


def whole_matrices(arrays, scale, cu_seqlens, one_s=1.0, one_dP=1.0, one_mean=1.0):
    """o, dq, dk, dv, P and ds (B, H, L, M), and the scale in use: the formulas of ops on whole matrices, in float64.

    one_*  a factor that s, dP or mean has, applied to the sum of its absolute terms: 1, or moved from it by a rounding
    """
    q, k, v, do = arrays
    (L, H, d), (M, H_kv) = q.shape[1:], k.shape[1:3]
    group, scale = H // H_kv, d**-0.5 if scale is None else scale
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    visible = np.arange(M) <= M - L + np.arange(L)[:, None]
    if cu_seqlens is not None:
        of = np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))  # the sequence of each token
        visible &= of[:, None] == of

    def products(x, y, one):
        return np.einsum("bihc,bjhc->bhij", x, y) + (one - 1) * np.einsum("bihc,bjhc->bhij", np.abs(x), np.abs(y))

    s = np.where(visible, scale * products(q, k, one_s), -np.inf)
    P = np.exp(s - s.max(-1, keepdims=True))
    P /= P.sum(-1, keepdims=True)
    o = np.einsum("bhij,bjhc->bihc", P, v)
    mean = np.einsum("bihc,bihc->bhi", do, o) + (one_mean - 1) * np.einsum("bihc,bihc->bhi", np.abs(do), np.abs(o))
    ds = P * (products(do, v, one_dP) - mean[..., None])
    dq = scale * np.einsum("bhij,bjhc->bihc", ds, k)
    dk = of_key_heads(scale * np.einsum("bhij,bihc->bjhc", ds, q), group)
    dv = of_key_heads(np.einsum("bhij,bihc->bjhc", P, do), group)
    return o, dq, dk, dv, P, ds, scale


def of_key_heads(x, group):
    """Sums over the query heads that share a key head."""
    return x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(3)


@both_dtypes
def test_head_size_256_fits_every_card_and_is_right(device, dtype):
    arrays, _ = arguments(dtype_of(device, dtype), B=1, L=70, past=3, H=2, H_kv=1, d=256, d_v=256)
    with jobs.recording() as launches:
        got = on_device(device, arrays)
    assert max(launch.shared_bytes for launch in launches) <= SMALLEST_SHARED
    exact = definition(arrays)
    if dtype == "float32":
        assert_within_floors(RESULTS, got, exact, float32_floors(arrays), 8)
    else:
        for name, g, e, bound in zip(RESULTS, got, exact, bfloat16_bounds(arrays, None), strict=True):
            assert_within(name, g.astype(np.float64), e, bound)


# ---- what must be the same bits


@both_dtypes
def test_packed_sequences_equal_separate_runs_to_the_bit(device, dtype):
    shape = SHAPES["packed"]
    arrays, options = arguments(dtype_of(device, dtype), **shape)
    whole, cu = on_device(device, arrays, **options), options["cu_seqlens"]
    for start, end in zip(cu, cu[1:]):
        if end > start:
            alone = on_device(device, [x[:, start:end] for x in arrays])
            for name, w, a in zip(RESULTS, whole, alone, strict=True):
                assert_identical(f"{name} of {start} .. {end - 1}", w[:, start:end].astype("f4"), a.astype("f4"))


@both_dtypes
def test_strided_arguments_are_read_as_they_are_and_nothing_is_overwritten(device, dtype):
    arrays, _ = arguments(dtype_of(device, dtype), **SHAPES["past"])
    expected = on_device(device, arrays)
    wide = [device.upload(np.concatenate([x, x + 1], axis=2)) for x in arrays]
    q, k, v, do = (w[:, :, : x.shape[2]] for w, x in zip(wide, arrays, strict=True))
    o, cache = cuda.softmax_attention_forward(device, q, k, v)
    once = cuda.softmax_attention_backward(device, do, cache)
    twice = cuda.softmax_attention_backward(device, do, cache)
    for name, *same in zip(RESULTS, (o, *once), (o, *twice), expected, strict=True):
        first, second, third = (np.asarray(x if isinstance(x, np.ndarray) else x.get()).astype("f4") for x in same)
        assert_identical(name, first, third)
        assert_identical(f"{name} again", second, third)
    for x, argument in zip(arrays, (q, k, v, do), strict=True):
        assert_identical("argument", argument.get().astype("f4"), x.astype("f4"))


def test_a_score_that_is_not_a_number_stays_visible(device):
    arrays, _ = arguments(np.float32, **SHAPES["33 tokens"])
    arrays[1][0, 5, 1, 2] = np.nan  # head 1 of the keys, token 5: queries from 5 on of heads 3 .. 5
    o = on_device(device, arrays)[0]
    bad = np.isnan(o).all(-1)
    assert bad[0, 5:, 3:].all() and not np.isnan(o[0, :5]).any() and not np.isnan(o[0, :, :3]).any()


def test_no_queries_give_no_output_and_zero_gradients(device):
    q, k = device.zeros((2, 0, 2, 16), np.float32), device.zeros((2, 5, 1, 16), np.float32)
    o, cache = cuda.softmax_attention_forward(device, q, k, k)
    dq, dk, dv = cuda.softmax_attention_backward(device, o, cache)
    assert o.shape == dq.shape == q.shape and not dk.get().any() and not dv.get().any()


# ---- errors


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q, k.astype("f4"), v), "all must be float32, or all bfloat16"),
        (lambda q, k, v: [x.astype("f8") for x in (q, k, v)], "all must be float32, or all bfloat16"),
        (lambda q, k, v: (q, k[:, :, :, :8], v), "do not fit"),
        (lambda q, k, v: (q[:, :, :3], k, v), "must be a multiple of H_kv"),
        (lambda q, k, v: [np.concatenate(20 * [x], 3) for x in (q, k, v)], "kernels up to 256"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(device, change, message):
    (q, k, v, _), _ = arguments(device.bf16, B=1, L=3, past=0, H=4, H_kv=2, d=16, d_v=16)
    with pytest.raises(InputError, match=message):
        cuda.softmax_attention_forward(device, *(device.upload(x) for x in change(q, k, v)))


# ---- races, bounds, barriers


def launches_of(device, dtype, shape):
    arrays, options = arguments(dtype_of(device, dtype), **shape)
    with jobs.recording() as launches:
        on_device(device, arrays, **options)
    return launches


@both_dtypes
@pytest.mark.parametrize("build", ["thread", "address"])
def test_sanitizers_find_nothing(device, dtype, build):
    for shape in ("past", "packed"):
        assert jobs.run(launches_of(device, dtype, SHAPES[shape]), build).findings == []


@both_dtypes
def test_each_barrier_and_wait_is_needed(device, dtype):
    shape = dict(B=1, L=150, past=0, H=2, H_kv=1, d=16, d_v=16)  # several tiles of every kernel
    launches = launches_of(device, dtype, shape)
    noticed = jobs.switch_off_each(launches)
    assert len(noticed) == 11 and not launches[0].library.unreached
    assert all(noticed.values()), [site for site, what in noticed.items() if what is None]
