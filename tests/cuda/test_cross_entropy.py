"""Cross-entropy on the CUDA backend, in the emulator, against ops in float64."""

import numpy as np
import pytest

from deltanet_ref import ops
from deltanet_ref.backends.cuda import cross_entropy as cuda
from deltanet_ref.backends.cuda.emulator import jobs
from deltanet_ref.errors import InputError
from tests.tolerances import assert_identical, assert_within, assert_within_floors, noise_floors, rounding

ROUNDED = 2.0**-8  # half a unit in the last place of bfloat16, which has 8 bits, relative
IGNORED = -100
DLOSS = 1.5
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def dtype_of(device, name):
    return device.bf16 if name == "bfloat16" else np.dtype(name)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 5 rows of x and 24 of w."""
    monkeypatch.setattr(cuda, "TOKENS", 5)
    monkeypatch.setattr(cuda, "BLOCK", 24)


def labels_of(rng, n, V):
    labels = rng.integers(0, V, n)
    labels[0] = V - 1
    labels[2::5] = IGNORED
    return labels


# ---- logits that are given


def given(labels, **options):
    def compute(arrays):
        loss, cache = ops.cross_entropy_forward(arrays[0], labels, **options)
        return [np.asarray(loss), ops.cross_entropy_backward(DLOSS, cache)]

    return compute


def given_on_device(device, logits, labels, **options):
    loss, cache = cuda.cross_entropy_forward(device, device.upload(logits), labels, **options)
    assert loss.shape == () and loss.dtype == np.float32
    return [loss.get(), cuda.cross_entropy_backward(device, DLOSS, cache).get()]


@pytest.mark.parametrize("V", [1, 7, 8, 255, 256, 257, 2047, 2048, 2065, 5003])
@pytest.mark.parametrize("size", [1, 20])
@pytest.mark.parametrize("options", [{}, dict(count=11)])
def test_given_logits_in_float32_lose_no_more_than_their_own_rounding_would(device, V, size, options):
    """Rows aligned and not, fewer words than threads and more. Within 4 noise floors; measured: 1.4 at most."""
    rng = np.random.default_rng(V)
    logits, labels = (size * rng.standard_normal((7, V))).astype(np.float32), labels_of(rng, 7, V)
    floors = floors_of_sums(given(labels, **options), [logits], V, count=options.get("count", 6))
    got = given_on_device(device, logits, labels, **options)
    assert_within_floors(["loss", "dlogits"], got, given(labels, **options)([logits.astype("f8")]), floors, 4)


def floors_of_sums(compute, arrays, V, count):
    """Noise floors of the loss and other results. A total of V terms, of which a thread adds its share in a row, is
    rounded too: by a few units, which enter each log total, and the loss as their mean."""
    floors = noise_floors(compute, arrays, np.float32)
    floors[0] += rounding(1, np.float32) * np.sqrt(1 + V / cuda.THREADS) * min(1, len(arrays[0]) / count)
    return floors


@pytest.mark.parametrize("V", [8, 257, 2065])
def test_given_logits_in_bfloat16_are_only_read_and_written_as_such(device, V):
    """All else is float32: the loss is as exact as with float32 logits of these values, dlogits is rounded once."""
    rng = np.random.default_rng(V)
    logits, labels = (5 * rng.standard_normal((7, V))).astype(device.bf16), labels_of(rng, 7, V)
    exact = given(labels)([logits.astype("f8")])
    got = given_on_device(device, logits, labels)
    assert abs(got[0] - exact[0]) <= rounding(4, np.float32) * (1 + abs(exact[0]))
    assert got[1].dtype == device.bf16
    in_float32 = rounding(4 + V // cuda.THREADS + 30, np.float32)  # of a term, a total; exponents up to 30
    assert_within("dlogits", got[1].astype("f8"), exact[1], (ROUNDED + in_float32) * np.abs(exact[1]) + 2e-9)


@both_dtypes
def test_words_that_cannot_occur_have_no_probability(device, dtype):
    logits = np.random.default_rng(1).standard_normal((3, 300)).astype(dtype_of(device, dtype))
    logits[:, :200] = -np.inf
    labels = np.array([250, 299, 200])
    loss, dlogits = given_on_device(device, logits, labels)
    exact = given(labels - 200)([logits[:, 200:].astype("f8")])
    assert abs(loss - exact[0]) < 1e-6 and not dlogits[:, :200].any()
    assert_within("dlogits", dlogits[:, 200:].astype("f8"), exact[1], 1.01 * ROUNDED * np.abs(exact[1]))


@both_dtypes
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_stays_visible(device, dtype, bad):
    logits = np.zeros((3, 40), dtype_of(device, dtype))
    logits[1, 33] = bad
    loss, dlogits = given_on_device(device, logits, np.array([1, 2, 3]))
    finite = np.isfinite(dlogits.astype("f4")).all(1)
    assert np.isnan(loss) and finite[0] and not finite[1] and finite[2]


# ---- logits of a linear map


def linear(labels, **options):
    def compute(arrays):
        loss, cache = ops.linear_cross_entropy_forward(*arrays, labels, **options)
        return [np.asarray(loss), *ops.linear_cross_entropy_backward(DLOSS, cache)]

    return compute


def linear_on_device(device, x, w, labels, **options):
    loss, cache = cuda.linear_cross_entropy_forward(device, device.upload(x), device.upload(w), labels, **options)
    assert loss.shape == () and loss.dtype == np.float32
    return [loss.get(), *(d.get() for d in cuda.linear_cross_entropy_backward(device, DLOSS, cache))]


def linear_arguments(dtype, n, V, D, size=1):
    rng = np.random.default_rng([n, V, D])
    x, w = rng.standard_normal((n, D)), size * rng.standard_normal((V, D))
    return x.astype(dtype), w.astype(dtype), labels_of(rng, n, V)


SIZES = [(1, 3, 8), (5, 24, 16), (6, 25, 11), (13, 71, 40), (11, 300, 272)]  # tokens, words, features
all_sizes = pytest.mark.parametrize("n, V, D", SIZES)


@all_sizes
@pytest.mark.parametrize("size", [1, 10])
@pytest.mark.parametrize("options", [{}, dict(count=17)])
def test_a_linear_map_in_float32_loses_no_more_than_rounding_would(device, small_tiles, n, V, D, size, options):
    """Within 8 noise floors; measured: 2.9 at most."""
    x, w, labels = linear_arguments(np.float32, n, V, D, size)
    kept = (labels != IGNORED).sum()
    floors = floors_of_sums(linear(labels, **options), [x, w], V, options.get("count", kept))
    exact = linear(labels, **options)([x.astype("f8"), w.astype("f8")])
    got = linear_on_device(device, x, w, labels, **options)
    assert_within_floors(["loss", "dx", "dw"], got, exact, floors, 8)


@all_sizes
def test_a_linear_map_in_bfloat16_is_within_what_its_roundings_allow(device, small_tiles, n, V, D):
    """To first order in u = 2^-8: dx = share (sum_v p_v w_v - w_label), where each p_v is rounded as a factor, and dx
    when it is stored; dw = sum_i dlogit_iv x_i, where each dlogit is rounded as a factor. Logits, the loss, sums and dw
    are float32, for which 1 % is added."""
    x, w, labels = linear_arguments(device.bf16, n, V, D, 0.3)
    wide = [x.astype("f8"), w.astype("f8")]
    loss, dx, dw = linear(labels)(wide)
    dlogits = given(labels)([wide[0] @ wide[1].T])[1]
    kept = labels != IGNORED
    p = dlogits.copy()
    p[kept, labels[kept]] += DLOSS / kept.sum()
    got = linear_on_device(device, x, w, labels)
    assert [g.dtype for g in got] == [np.float32, device.bf16, np.float32]
    assert abs(got[0] - loss) <= rounding(8, np.float32) * (1 + np.abs(wide[0] @ wide[1].T).max())
    assert_within("dx", got[1].astype("f8"), dx, 1.01 * ROUNDED * (p @ np.abs(wide[1]) + np.abs(dx)) + 1e-12)
    assert_within("dw", got[2], dw, 1.01 * ROUNDED * (np.abs(dlogits).T @ np.abs(wide[0])) + 1e-7)


@both_dtypes
def test_tiles_do_not_change_the_loss_beyond_rounding(device, monkeypatch, dtype):
    x, w, labels = linear_arguments(dtype_of(device, dtype), 11, 300, 32)
    whole = linear_on_device(device, x, w, labels)[0]
    monkeypatch.setattr(cuda, "BLOCK", 32)
    assert abs(linear_on_device(device, x, w, labels)[0] - whole) <= rounding(4, np.float32) * abs(whole)


def test_each_row_of_w_is_asked_for_once_and_the_loss_alone_needs_no_gradient(device, small_tiles):
    x, w, labels = linear_arguments(np.float32, 13, 71, 40)

    class Rows:
        asked = []

        def __len__(self):
            return len(w)

        def __getitem__(self, rows):
            self.asked.append((rows.start, rows.stop))
            return device.upload(w[rows])

    loss, cache = cuda.linear_cross_entropy_forward(device, device.upload(x), Rows(), labels, need_gradient=False)
    assert Rows.asked == [(None, 1), (0, 24), (24, 48), (48, 71)] and cache.dx_row is None
    expected, whole = cuda.linear_cross_entropy_forward(device, device.upload(x), device.upload(w), labels)
    assert_identical("loss", loss.get(), expected.get())
    dx, dw = cuda.linear_cross_entropy_backward(device, DLOSS, whole, need_dw=False)
    assert dw is None and dx.shape == x.shape


@both_dtypes
def test_nothing_kept_is_loss_zero(device, small_tiles, dtype):
    x, w, labels = linear_arguments(dtype_of(device, dtype), 6, 25, 16)
    for result in linear_on_device(device, x, w, np.full_like(labels, IGNORED)):
        assert not result.astype("f4").any()
    for result in given_on_device(device, x, np.full_like(labels, IGNORED)):
        assert not result.astype("f4").any()


@both_dtypes
def test_rows_that_are_ignored_change_nothing(device, small_tiles, dtype):
    """Kept rows are gathered: what the others hold does not matter, and their gradient is 0."""
    x, w, labels = linear_arguments(dtype_of(device, dtype), 13, 71, 40)
    expected = linear_on_device(device, x, w, labels)
    x[labels == IGNORED] = np.nan
    for name, g, e in zip(("loss", "dx", "dw"), linear_on_device(device, x, w, labels), expected, strict=True):
        assert_identical(name, g.astype("f4"), e.astype("f4"))
    assert not expected[1][labels == IGNORED].astype("f4").any()


# ---- errors


def test_arguments_that_do_not_fit_are_refused(device):
    x, w, labels = linear_arguments(np.float32, 6, 25, 16)
    labels = np.where(labels == 24, 0, labels)

    def call(x=x, w=w, labels=labels, **options):
        cuda.linear_cross_entropy_forward(device, device.upload(x), device.upload(w), labels, **options)

    for changes, message in [
        (dict(w=w[:, :8]), "w must be"),
        (dict(w=w.astype(device.bf16)), "the same for all"),
        (dict(x=x.astype("f8"), w=w.astype("f8")), "needs float32 or bfloat16"),
        (dict(labels=np.where(labels == 0, 25, labels)), "outside the vocabulary"),
        (dict(labels=labels[:3]), "must be"),
        (dict(count=0), "at least 1"),
    ]:
        with pytest.raises(InputError, match=message):
            call(**changes)
    with pytest.raises(InputError, match="needs float32 or bfloat16"):
        cuda.cross_entropy_forward(device, device.upload(x.astype("f8")), labels)


# ---- races, bounds, barriers


def launches_of(device, dtype):
    x, w, labels = linear_arguments(dtype_of(device, dtype), 13, 531, 11)  # several words for a thread
    with jobs.recording() as launches:
        linear_on_device(device, x, w, labels)
        given_on_device(device, w[:3], labels[:3] % 11)
    return launches


@both_dtypes
@pytest.mark.parametrize("build", ["thread", "address"])
def test_sanitizers_find_nothing(device, dtype, build, monkeypatch):
    monkeypatch.setattr(cuda, "TOKENS", 8)
    monkeypatch.setattr(cuda, "BLOCK", 300)
    assert jobs.run(launches_of(device, dtype), build).findings == []


@both_dtypes
def test_each_barrier_is_needed(device, dtype, monkeypatch):
    monkeypatch.setattr(cuda, "BLOCK", 300)
    noticed = jobs.switch_off_each(launches_of(device, dtype))
    assert len(noticed) == 2  # of block_sum and block_max
    assert all(noticed.values()), [site for site, what in noticed.items() if what is None]
