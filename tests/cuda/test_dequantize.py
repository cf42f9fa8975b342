"""Stored tensors on the CUDA backend, in the emulator: decoded as formats.quants does, multiplied against float64."""

from types import SimpleNamespace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES

from deltanet_ref import ops
from deltanet_ref.backends import interface
from deltanet_ref.backends.cuda import quants as cuda, stored as stored_of
from deltanet_ref.backends.cuda.emulator import jobs
from deltanet_ref.errors import InputError
from deltanet_ref.formats import quants
from deltanet_ref.formats.gguf import GGUFTensor
from tests.paths import FIXTURES
from tests.tolerances import assert_within, rounding

ROUNDED = 2.0**-8  # half a unit in the last place of bfloat16, which has 8 bits, relative
GGML = np.load(FIXTURES / "dequant.npz")  # what ggml quantised, and its float32 values
QUANTISED = [Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.Q5_K, Type.Q6_K]
SCALES = {Type.Q8_0: (0,), Type.Q4_0: (0,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}  # bytes in a block
every_type = pytest.mark.parametrize("kind", cuda.KERNELS, ids=lambda kind: kind.name)
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def dtype_of(device, name):
    return device.bf16 if name == "bfloat16" else np.dtype(name)


def random_bytes(kind, shape):
    """Any bytes: every number, scale and minimum, infinities, NaNs and subnormal scales."""
    return np.random.default_rng([kind, *shape]).integers(0, 256, quants.stored_bytes(kind, shape), np.uint8)


def tensor_of(kind, rows, width):
    """A tensor with scales, or plain numbers, as a model has them."""
    if kind not in SCALES:
        values = np.random.default_rng(kind).standard_normal((rows, width), np.float32)
        return GGUFTensor("w", (rows, width), kind, quants.quantize(values, kind))
    blocks = random_bytes(kind, (rows, width)).reshape(-1, GGML_QUANT_SIZES[kind][1])
    for at in SCALES[kind]:
        scales = np.random.default_rng(at).uniform(-0.02, 0.02, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return GGUFTensor("w", (rows, width), kind, blocks.reshape(-1))


def assert_same_bits(name, got, want):
    """The same bits, those of NaNs apart."""
    number = ~np.isnan(want.astype(np.float32))
    got_bits, want_bits = (np.ascontiguousarray(x).view(f"u{x.itemsize}") for x in (got, want))
    assert got.dtype == want.dtype and got.shape == want.shape, (name, got.dtype, got.shape, want.dtype, want.shape)
    wrong = np.argwhere(number & (got_bits != want_bits) | ~number & ~np.isnan(got.astype(np.float32)))
    if len(wrong):
        at = tuple(wrong[0])
        raise AssertionError(f"{name}: {len(wrong)} of {got.size} values, first {got[at]!r} for {want[at]!r} at {at}")


# ---- decoding


@every_type
@both_dtypes
@pytest.mark.parametrize("shape", [(1, 256), (7, 768), (3, 2, 512)])
def test_any_bytes_decode_as_in_formats_quants_to_the_bit(device, kind, dtype, shape):
    """In bfloat16: those float32 values, rounded once."""
    raw, dtype = random_bytes(kind, shape), dtype_of(device, dtype)
    with np.errstate(invalid="ignore"):
        expected = quants.dequantize(raw, kind, shape).astype(dtype)
    for stored in (raw, device.upload(raw)):
        assert_same_bits(kind.name, cuda.dequantize(device, stored, kind, shape, dtype).get(), expected)


@pytest.mark.parametrize("name", sorted({name.split("/")[0] for name in GGML.files}))
def test_what_ggml_quantised_decodes_as_ggml_does_to_the_bit(device, name):
    """Types without a kernel too: on the host."""
    raw, expected = GGML[f"{name}/raw"].reshape(-1), GGML[f"{name}/f32"]
    assert_same_bits(name, cuda.dequantize(device, raw, Type[name], expected.shape).get(), expected)


@both_dtypes
def test_every_float16_and_every_bfloat16_decodes_as_itself(device, dtype):
    """All 65,536 of each, in a row that is not whole accesses of a kernel."""
    every = np.arange((1 << 16) + 3).astype(np.uint16)
    for kind in (Type.F16, Type.BF16):
        with np.errstate(invalid="ignore"):
            expected = quants.dequantize(every.view(np.uint8), kind, every.shape).astype(dtype_of(device, dtype))
        found = cuda.dequantize(device, every.view(np.uint8), kind, every.shape, dtype_of(device, dtype)).get()
        assert_same_bits(kind.name, found, expected)


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.IQ4_NL, Type.F64, Type.Q4_K])
def test_other_types_and_float64_are_decoded_on_the_host(device, kind):
    raw = random_bytes(kind, (2, 256)) & 59  # no exponent of a NaN
    for dtype in [np.float64] if kind == Type.Q4_K else [np.float32, np.float64]:
        expected = quants.dequantize(raw, kind, (2, 256), dtype)
        for stored in (raw, device.upload(raw)):
            assert_same_bits(kind.name, cuda.dequantize(device, stored, kind, (2, 256), dtype).get(), expected)


def test_bytes_that_do_not_fit_are_refused(device):
    for raw, kind, dtype, message in [
        (np.zeros(34, np.uint8), Type.Q8_0, np.float32, "68 bytes, 34 were given"),
        (np.zeros(72, np.uint8), Type.Q8_1, np.float32, "Q8_1"),
        (np.zeros(68, np.uint8), Type.Q8_0, np.float16, "not float16"),
    ]:
        with pytest.raises(InputError, match=message):
            cuda.dequantize(device, raw, kind, (2, 32), dtype)


# ---- products


@every_type
@both_dtypes
@pytest.mark.parametrize("panel", [1 << 20, 5 * 256])
def test_products_equal_those_with_the_decoded_values_in_float64(device, monkeypatch, kind, dtype, panel):
    """float32: to 4 units of the sum of absolute terms, rounded n times at most. bfloat16: w rounded as decoded, y once
    more; float32 panels of dx are added before it is rounded."""
    monkeypatch.setattr(cuda, "PANEL", panel)
    dtype, tensor = dtype_of(device, dtype), tensor_of(kind, 37, 256)
    rng = np.random.default_rng(1)
    x, dy = (rng.standard_normal((2, 3, n)).astype(dtype) for n in (256, 37))
    w = quants.dequantize(tensor.raw, kind, tensor.shape).astype(dtype).astype(np.float64)
    unit = rounding(4, np.float32) + (ROUNDED if dtype == device.bf16 else 0)
    for stored in (tensor, cuda.resident(device, tensor)):
        (y,) = cuda.stored_linear_forward(device, device.upload(x), [stored])
        dx = cuda.stored_linear_backward_input(device, device.upload(dy), stored)
        for name, got, a, b in (("y", y, x, w.T), ("dx", dx, dy, w)):
            a = a.astype(np.float64)
            assert got.dtype == dtype
            magnitude = np.abs(a @ b) if dtype == device.bf16 else 0
            bound = rounding(4, np.float32) * (np.abs(a) @ np.abs(b)) + unit * magnitude
            assert_within(name, got.get().astype(np.float64), a @ b, bound)


def test_several_tensors_are_multiplied_in_one_call(device):
    tensors = [tensor_of(kind, 11 + 3 * i, 256) for i, kind in enumerate(QUANTISED)]
    x = device.upload(np.random.default_rng(2).standard_normal((4, 256), np.float32))
    together = cuda.stored_linear_forward(device, x, tensors)
    for y, tensor in zip(together, tensors, strict=True):
        (alone,) = cuda.stored_linear_forward(device, x, [tensor])
        assert y.shape == (4, tensor.shape[0]) and np.array_equal(y.get(), alone.get())


def test_a_product_that_does_not_fit_is_refused(device):
    tensor = tensor_of(Type.Q4_K, 3, 256)
    for call in (
        lambda: cuda.stored_linear_forward(device, device.zeros((2, 512), np.float32), [tensor]),
        lambda: cuda.stored_linear_forward(device, device.zeros((2, 256), np.float64), [tensor]),
        lambda: cuda.stored_linear_backward_input(device, device.zeros((2, 256), np.float32), tensor),
    ):
        with pytest.raises(InputError, match="must be float32 or bfloat16 with (256|3) features"):
            call()


def test_the_capability_keeps_the_contract(device):
    names = (*interface.Backend.__annotations__, *interface.OPERATORS)
    backend = SimpleNamespace(**{name: getattr(ops, name) for name in names})
    backend.stored = stored_of(device)
    assert interface.violations(backend) == []
    assert all(backend.stored.decodes(kind, (3, 512)) for kind in cuda.KERNELS)
    assert not backend.stored.decodes(Type.Q8_0, (3, 33)) and not backend.stored.decodes(Type.Q2_K, (3, 256))


# ---- races, bounds


@both_dtypes
@pytest.mark.parametrize("build", ["thread", "address"])
def test_sanitizers_find_nothing(device, dtype, build):
    """The last block of threads is not full, nor, for plain types, the last access."""
    with jobs.recording() as launches:
        for kind in cuda.KERNELS:
            shape = (9, 256) if kind in QUANTISED else (2051,)
            cuda.dequantize(device, random_bytes(kind, shape), kind, shape, dtype_of(device, dtype))
    assert jobs.run(launches, build).findings == []
