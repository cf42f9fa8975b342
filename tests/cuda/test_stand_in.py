"""The stand-in refuses what CuPy 14.2 refuses (its source was read for each), and computes as NumPy does."""

import gc
from types import SimpleNamespace

import numpy as np
import pytest

from deltanet_ref.backends.cuda import stand_in as cp
from deltanet_ref.backends.cuda.delta_rule import gated_delta_rule_forward
from deltanet_ref.backends.cuda.device import Device
from deltanet_ref.errors import InputError

HOST = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def x(device):
    return device.upload(HOST)


@pytest.fixture
def stream():
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        yield stream
        if stream.is_capturing():
            stream.end_capture()


# ---- arrays


@pytest.mark.parametrize(
    "touch",
    [np.asarray, np.exp, np.sum, lambda x: np.add(x, x), lambda x: np.concatenate([x, x]), lambda x: HOST @ x.T],
    ids=["asarray", "ufunc", "reduction", "binary ufunc", "function", "operator"],
)
def test_numpy_cannot_touch_device_arrays(x, touch):
    with pytest.raises(TypeError):
        touch(x)


@pytest.mark.parametrize("operate", [lambda x: x + HOST, lambda x: HOST * x, lambda x: x.__iadd__(HOST)])
def test_arrays_of_the_host_and_the_device_do_not_mix(x, operate):
    with pytest.raises(TypeError, match="Unsupported type"):
        operate(x)


def test_scalars_and_views_behave_as_in_numpy(device, x):
    same = [
        (x * 2 + 1.0, HOST * 2 + 1.0),
        (1 - x, 1 - HOST),
        (-x / 3, -HOST / 3),
        (x.T, HOST.T),
        (x.T.reshape(-1), HOST.T.reshape(-1)),
        (x[1:, ::2], HOST[1:, ::2]),
        (x[None, ..., -1], HOST[None, ..., -1]),
        (x.sum(0, keepdims=True), HOST.sum(0, keepdims=True)),
        (cp.log(x + 1), np.log(HOST + 1)),
        (cp.concatenate([x, x], -1), np.concatenate([HOST, HOST], -1)),
        (x < 5, HOST < 5),
        (x.transpose(1, 0), HOST.transpose(1, 0)),
    ]
    for got, want in same:
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_array_equal(got.get(), want)
    assert float(x.sum()) == HOST.sum() and bool((x >= 0).all()) and len(x) == 3
    assert x.sum().shape == () and device.upload(np.float32(3)).shape == ()


def test_a_view_shares_memory_and_a_copy_does_not(x):
    x[1:2] += 1
    y = x.reshape(4, 3)
    z = x.copy()
    x.fill(7)
    assert (y.get() == 7).all() and (z.get()[1] == HOST[1] + 1).all() and (z.get()[0] == HOST[0]).all()


def test_elementwise_results_keep_the_order_of_their_operands_as_in_cupy(device, x):
    """Kernels take arrays in C order only: what reads a transposed result must make it contiguous."""
    assert (x.T + 1).flags.f_contiguous and not (x.T + 1).flags.c_contiguous
    assert device.contiguous(x.T + 1).flags.c_contiguous
    with pytest.raises(ValueError, match="not in C order"):
        device._argument(x.T)


def test_bfloat16_meets_other_types_as_in_cupy(device, x):
    h = x.astype(device.bf16)
    assert (h + h).dtype == (h * 2).dtype == device.bf16
    assert (h + x).dtype == (h * 2.0).dtype == np.float32  # a Python float is no bfloat16 in CuPy 14.2 either
    h *= 0.5
    assert h.dtype == device.bf16
    with pytest.raises(TypeError, match="no common dtype"):
        h + x.astype(np.float16)
    with pytest.raises(TypeError, match="more than two axes"):
        h[None] @ h.T[None]


def test_fresh_memory_is_poisoned(device):
    assert np.isnan(device.empty((2, 3), np.float32).get()).all()
    assert np.isnan(device.empty(5, device.bf16).get().astype(np.float32)).all()
    assert (device.empty(3, np.int32).get() == -1).all()


def test_strided_views_stay_within_the_memory_of_their_array(x):
    rows = cp.lib.stride_tricks.as_strided(x[:, 1:3], (10,), (4,))
    np.testing.assert_array_equal(rows.get(), HOST.reshape(-1)[1:11])
    with pytest.raises(ValueError, match="leaves the memory"):
        cp.lib.stride_tricks.as_strided(x[:, 1:3], (12,), (4,))


# ---- kernels

SCALE = """
extern "C" __global__ void __launch_bounds__(32) scale(const REAL* x, REAL* y, int n, float factor, long long shift) {
    int i = blockIdx.x * 32 + threadIdx.x;
    if (i < n) y[i] = x[i] * factor + (float)shift;
}
"""


def kernel(device):
    return cp.RawModule(code=SCALE, options=("-std=c++17", "-DREAL=float")).get_function("scale")


def test_a_kernel_takes_typed_scalars_only(device, x):
    y = device.empty(x.shape, np.float32)
    kernel(device)((1,), (32,), (x, y, np.int32(12), np.float32(0.5), np.int64(3)))
    np.testing.assert_array_equal(y.get(), HOST / 2 + 3)
    with pytest.raises(TypeError, match="argument is int"):
        kernel(device)((1,), (32,), (x, y, 12, np.float32(0.5), np.int64(3)))


def test_shared_memory_beyond_48_kib_must_be_asked_for(device, x):
    function = kernel(device)
    with pytest.raises(RuntimeError, match="max_dynamic_shared_size_bytes"):
        function((1,), (32,), (x, x, np.int32(1), np.float32(1), np.int64(0)), shared_mem=50_000)


def test_launch_converts_numbers_and_skips_empty_grids(device, monkeypatch, tmp_path):
    monkeypatch.setattr("deltanet_ref.backends.cuda.device.KERNELS", tmp_path)
    (tmp_path / "scale.cu").write_text(SCALE)
    x, own = device.upload(HOST), Device(cp)
    y = own.empty(x.shape, np.float32)
    scale = own.kernel("scale", "scale", REAL=np.float32)
    own.launch(scale, 0, 32, x, y, 12, 2.0, np.int64(0))
    assert np.isnan(y.get()).all()
    own.launch(scale, (1, 1), 32, x, y, 12, 2.0, np.int64(1))
    np.testing.assert_array_equal(y.get(), HOST * 2 + 1)
    assert own.kernel("scale", "scale", REAL=np.float32).function is scale.function
    with pytest.raises(OverflowError):
        own.launch(scale, 1, 32, x, y, 1 << 31, 2.0, np.int64(0))
    with pytest.raises(TypeError, match="cannot take list"):
        own.launch(scale, 1, 32, [x])


# ---- streams and graphs


def test_captured_work_is_done_at_each_launch_and_not_before(device, x, stream):
    stream.begin_capture()
    y = x + 1
    y *= 2
    function = kernel(device)
    function((1,), (32,), (y, y, np.int32(12), np.float32(1), np.int64(1)))
    graph = stream.end_capture()
    assert np.isnan(y.get()).all()
    for value in (HOST, HOST - 5):
        x.set(value)
        graph.launch()
        np.testing.assert_array_equal(y.get(), 2 * value + 3)


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.get(),
        lambda x: float(x.sum()),
        lambda x: x.set(HOST),
        lambda x: cp.asarray(HOST),
        lambda x: x[np.array([0, 2])],
        lambda x: cp.concatenate([x] * 9),
        lambda x: cp.cuda.get_current_stream().synchronize(),
    ],
    ids=["get", "float", "set", "asarray", "index by an array", "concatenate nine", "synchronize"],
)
def test_transfers_are_refused_while_a_stream_captures(x, stream, forbidden):
    stream.begin_capture()
    with pytest.raises(cp.CaptureError):
        forbidden(x)


def test_products_of_cupy_are_refused_while_a_stream_captures(x, stream):
    stream.begin_capture()
    with pytest.raises(NotImplementedError, match="cuBLAS API during stream capture"):
        x @ x.T


def test_blocking_and_default_streams_do_not_capture():
    with pytest.raises(RuntimeError, match="legacy"):
        cp.cuda.get_current_stream().begin_capture()
    with pytest.raises(cp.CaptureError, match="non_blocking"):
        cp.cuda.Stream().begin_capture()


def test_a_graph_over_freed_memory_is_refused(device, x, stream):
    stream.begin_capture()
    y = x + 1
    graph = stream.end_capture()
    graph.launch()
    del y
    gc.collect()
    with pytest.raises(cp.FreedMemory):
        graph.launch()


# ---- memory


def test_an_allocator_of_functions_sees_every_allocation_and_free(device):
    base, log = cp.cuda.alloc(1 << 12), []

    def malloc(size, number):
        log.append(size)
        return base.ptr + 512 * len(log)

    with cp.cuda.using_allocator(cp.cuda.PythonFunctionAllocator(malloc, lambda ptr, number: log.append(-ptr)).malloc):
        x = device.zeros((3, 5), np.float32)
        view = x[1:]
        del x
        assert log == [60]
        place = view.data.ptr - 20
        del view
        gc.collect()
        assert log == [60, -place] and place == base.ptr + 512
    assert (base.mem.bytes[512:572] == 0).all() and base.mem.bytes[572] == 0xFF


def test_a_kernel_that_needs_more_shared_memory_than_the_card_has_is_refused_in_one_line(monkeypatch):
    """float32 with d_k 256 on a card of compute capability 8.9."""
    monkeypatch.setattr(
        cp.cuda, "Device", lambda: SimpleNamespace(attributes={"MaxSharedMemoryPerBlockOptin": 99 << 10})
    )
    device = Device(cp)
    q, v = device.zeros((1, 3, 1, 256), np.float32), device.zeros((1, 3, 1, 64), np.float32)
    g = device.zeros((1, 3, 1), np.float32)
    with pytest.raises(
        InputError, match="bytes of shared memory for these sizes, a block of this card has 101,376: use"
    ):
        gated_delta_rule_forward(device, q, q, v, g=g, beta=g)
