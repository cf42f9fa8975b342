"""Stored tensors on the numba backend: decoded against ggml and the gguf package, multiplied against float64."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import deltanet_ref as dr
from deltanet_ref.backends import numba_cpu as nb
from deltanet_ref.backends.numba_cpu import quants as stored, threads as kernel_threads
from deltanet_ref.errors import InputError
from deltanet_ref.formats import quants
from deltanet_ref.formats.gguf import GGUFTensor, read_gguf
from deltanet_ref.model.load import weights_from_gguf
from tests.paths import FIXTURES
from tests.tolerances import relative

ROOT = Path(__file__).parents[1]
GGML = np.load(FIXTURES / "dequant.npz")
STORED = sorted({name.split("/")[0] for name in GGML.files})
MODELS = {name: FIXTURES / "quant" / f"quant-{name}.gguf" for name in ("q8_0", "Q4_K_M")}
every_type = pytest.mark.parametrize("kind", stored.LAYOUTS, ids=lambda kind: kind.name)


def bits(values):
    return np.ascontiguousarray(values).view(f"u{values.itemsize}")


def random_tensor(kind, rows, width, seed=0):
    """Any bytes, with scales and plain numbers as a model has them."""
    layout, rng = stored.LAYOUTS[kind], np.random.default_rng(seed)
    blocks = rng.integers(0, 256, rows * width // layout.values * layout.block.itemsize, np.uint8).view(layout.block)
    for field in {"d", "m"} & set(layout.block.names):
        blocks[field] = rng.uniform(-0.02, 0.02, len(blocks)).astype(np.float16).view(np.uint16)
    numbers = rng.standard_normal((len(blocks), layout.values), np.float32)
    for field, plain in {
        "half": numbers.astype(np.float16).view(np.uint16),
        "upper": numbers.view(np.uint32) >> 16,
    }.items():
        if field in layout.block.names:
            blocks[field] = plain
    return GGUFTensor("w", (rows, width), kind, blocks.view(np.uint8))


def gguf_values(tensor):
    return gguf.quants.dequantize(tensor.raw.reshape(tensor.shape[0], -1), tensor.type)


# ---- decoding


@every_type
def test_every_type_decodes_as_in_the_gguf_package_bit_for_bit(kind):
    tensor = random_tensor(kind, 7, 768)
    assert nb.decodes(kind, tensor.shape)
    for shape in [(7, 768), (7, 3, 256), (5376,)]:
        assert np.array_equal(bits(nb.dequantize(tensor.raw, kind, shape)), bits(gguf_values(tensor).reshape(shape)))


@pytest.mark.parametrize("name", STORED)
def test_what_ggml_quantised_decodes_as_ggml_does_bit_for_bit(name):
    raw, expected = GGML[f"{name}/raw"], GGML[f"{name}/f32"]
    assert np.array_equal(bits(nb.dequantize(raw, Type[name], expected.shape)), bits(expected))
    wide = nb.dequantize(raw, Type[name], expected.shape, np.float64)
    assert np.array_equal(bits(wide), bits(expected.astype(np.float64)))


def test_every_float16_becomes_the_same_float32():
    """All 65,536 of them: tiny ones, zeros, infinities."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    expected = halves.view(np.float16).astype(np.float32)
    found = nb.dequantize(halves.view(np.uint8), Type.F16, (1 << 16,))
    number = ~np.isnan(expected)
    assert np.array_equal(bits(found[number]), bits(expected[number])) and np.isnan(found[~number]).all()


@pytest.mark.parametrize(
    "kind, width",
    [(Type.TQ2_0, 256), (Type.IQ2_S, 512), (Type.F64, 64), (Type.F32, 64), (Type.F16, 33), (Type.BF16, 5)],
)
def test_other_types_and_odd_rows_are_left_to_the_gguf_package(kind, width):
    assert not nb.decodes(kind, (3, width))
    raw = np.random.default_rng(1).integers(0, 60, quants.stored_bytes(kind, (3, width)), np.uint8)
    found, expected = (decode(raw, kind, (3, width), np.float64) for decode in (nb.dequantize, quants.dequantize))
    assert np.array_equal(bits(found), bits(expected))
    with pytest.raises(InputError, match="Q8_1"):
        nb.dequantize(np.zeros(36, np.uint8), Type.Q8_1, (32,))


def test_bytes_and_shape_must_agree():
    with pytest.raises(InputError, match="68 bytes, 34 were given"):
        nb.dequantize(np.zeros(34, np.uint8), Type.Q8_0, (2, 32))


def test_a_processor_that_cannot_convert_or_shuffle_decodes_the_same_bits(tmp_path):
    """LLVM would end the process if a kernel needed a conversion that is not there."""
    script = """if True:
        import numpy as np
        from gguf import GGMLQuantizationType as Type
        from deltanet_ref.backends import numba_cpu as nb
        from tests.test_numba_quants import bits, gguf_values, random_tensor
        for kind in (Type.F16, Type.IQ4_NL):
            tensor = random_tensor(kind, 3, 64)
            assert np.array_equal(bits(nb.dequantize(tensor.raw, kind, tensor.shape)), bits(gguf_values(tensor)))"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)


# ---- products


def products(tensors, x):
    return nb.stored_linear_forward(x, tensors)


@every_type
@pytest.mark.parametrize("rows", [1, 3, nb.FEW, nb.FEW + 1])
def test_products_equal_those_with_the_decoded_values_in_float64(kind, rows):
    """Each entry to 4 units of the last place of the sum of absolute terms; measured: 0.6 and, backward, 2.8 at
    most."""
    tensor = random_tensor(kind, 37, 1280)
    x = np.random.default_rng(rows).standard_normal((1, rows, 1280), np.float32)
    (y,) = products([tensor], x)
    w, wide = gguf_values(tensor).astype(np.float64), x.astype(np.float64)
    assert y.shape == (1, rows, 37) and y.dtype == np.float32
    assert (np.abs(y - wide @ w.T) <= 4 * np.finfo(np.float32).eps * (np.abs(wide) @ np.abs(w).T)).all()
    dy = np.random.default_rng(9).standard_normal((rows, 37), np.float32)
    dx, wide = nb.stored_linear_backward_input(dy, tensor), dy.astype(np.float64)
    assert dx.shape == (rows, 1280)
    assert (np.abs(dx - wide @ w) <= 4 * np.finfo(np.float32).eps * (np.abs(wide) @ np.abs(w))).all()


@every_type
def test_what_is_not_finite_stays_visible_and_zeros_give_zero(kind):
    tensor = random_tensor(kind, 5, 768)
    x = np.random.default_rng(4).standard_normal((1, 768), np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        x[0, 300] = bad
        assert not np.isfinite(products([tensor], x)[0]).any()
    for small in (0, 1e-40):
        assert np.abs(products([tensor], np.full((1, 768), small, np.float32))[0]).max() < 1e-37


def test_an_outlier_among_the_inputs_costs_the_others_no_more_than_in_float32():
    """Its own term is rounded to 2^-24 of itself; the others, 2^-20 of it, to 2^-31 of it. Measured: 0.8 units."""
    tensor, rng = random_tensor(Type.Q4_K, 200, 256), np.random.default_rng(5)
    x = rng.standard_normal((1, 256), np.float32)
    x[0, 77] = 1e6
    w, wide = gguf_values(tensor).astype(np.float64), x.astype(np.float64)
    error = np.linalg.norm(products([tensor], x)[0] - wide @ w.T)
    assert error < 2 * np.finfo(np.float32).eps * np.linalg.norm(np.abs(wide) @ np.abs(w).T)
    x[0, 77] = 0
    without = products([tensor], x)[0]
    assert relative(without, x.astype(np.float64) @ w.T) < 3e-7


def test_a_product_that_does_not_fit_is_refused():
    tensor = random_tensor(Type.Q4_K, 3, 256)
    for call in (
        lambda: products([tensor], np.ones((2, 512), np.float32)),
        lambda: products([tensor], np.ones((2, 256))),
        lambda: nb.stored_linear_backward_input(np.ones((2, 256), np.float32), tensor),
    ):
        with pytest.raises(InputError, match="must be float32 with (256|3) features"):
            call()


def test_several_tensors_at_once_give_the_bits_of_one_at_a_time_on_any_number_of_threads():
    tensors = [random_tensor(kind, 11 * i + 300, 512, seed=i) for i, kind in enumerate(stored.LAYOUTS)]
    before = kernel_threads.set_threads(1)
    try:
        for rows in (1, 5):
            x = np.random.default_rng(rows).standard_normal((rows, 512), np.float32)
            alone = [products([tensor], x)[0] for tensor in tensors]
            for threads in (1, 2, 3, 7):
                kernel_threads.set_threads(threads)
                assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(products(tensors, x), alone, strict=True))
    finally:
        kernel_threads.set_threads(before)


def test_a_tensor_larger_than_a_panel_is_multiplied_panel_by_panel(monkeypatch):
    tensor = random_tensor(Type.Q5_K, 70, 512)
    rng = np.random.default_rng(2)
    x, dy = (rng.standard_normal((nb.FEW + 1, n), np.float32) for n in (512, 70))
    whole = products([tensor], x)[0], nb.stored_linear_backward_input(dy, tensor)
    monkeypatch.setattr(stored, "PANEL_BYTES", 4 * 512 * 16)
    assert [(part.start, part.stop) for part, _ in stored.panels(tensor)] == [
        (0, 16),
        (16, 32),
        (32, 48),
        (48, 64),
        (64, 70),
    ]
    for found, expected in zip((products([tensor], x)[0], nb.stored_linear_backward_input(dy, tensor)), whole):
        assert relative(found, expected) < 5e-7  # either one is within 2.5e-7 of the exact product


def test_one_buffer_serves_all_products_and_each_thread_has_its_own(monkeypatch):
    tensors = [random_tensor(kind, 90, 512, seed=i) for i, kind in enumerate([Type.Q4_K, Type.Q8_0, Type.Q6_K])]
    x = np.random.default_rng(3).standard_normal((20, 512), np.float32)
    monkeypatch.setattr(stored, "_free_buffers", [])
    expected = [y.copy() for y in products(tensors, x)]
    assert len(stored._free_buffers) == 1
    with ThreadPoolExecutor(4) as executor:
        for found in executor.map(lambda _: products(tensors, x), range(40)):
            assert all(np.array_equal(a, b) for a, b in zip(found, expected))
    assert len(stored._free_buffers) <= 4


# ---- the weights of a model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["mapped", "expanded", "auto"])
def test_a_quantised_model_equals_hf_on_the_decoded_values_token_by_token_too(name, mode):
    """HF's float64 logits; float32's noise floor on this model, 3e-6, times six."""
    gold = np.load(FIXTURES / "quant" / "golden.npz")
    tokens, exact = gold["t33"], gold[f"{name}/hf_f64_dequantised/t33"]
    model = dr.load_model(MODELS[name], backend="numba", weights=mode)
    assert relative(model.logits(tokens[None])[0], exact) < 2e-5
    logits, state = model.prefill(tokens[:20])
    for t in range(20, 33):
        assert relative(logits, exact[t - 1]) < 2e-5, t
        logits, state = model.step(tokens[t], state)
    logits, _ = model.prefill(np.stack([tokens, tokens[::-1]])[:, :3])  # two sequences, 6 rows
    assert relative(logits[0], exact[2]) < 2e-5


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_modes_keep_what_they_say(backend, monkeypatch):
    """auto: what the gguf package would have to decode, where it fits."""
    file = read_gguf(MODELS["Q4_K_M"])

    def kept(mode, name="blk.2.attn_qkv.weight"):
        weights = weights_from_gguf(file, "float32", dr.get_backend(backend), mode)[1]
        return weights[name] is weights[name]

    assert kept("mapped", "blk.0.ssm_norm.weight")  # float32 in the file: its map
    assert not kept("mapped") and kept("expanded")
    assert kept("auto") == (backend == "numpy")
    monkeypatch.setattr("deltanet_ref.model.weights.available_memory", lambda: 10**6)
    assert not kept("auto") and kept("expanded")
    with pytest.raises(InputError, match="'auto', 'mapped', 'expanded'"):
        kept("lazy")


def test_mapped_weights_leave_one_panel_behind_and_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(stored, "_free_buffers", [])
    model = dr.load_model(MODELS["Q4_K_M"], backend="numba", weights="mapped")
    model.attach(dr.new_adapter(model, rank=3, seed=1))
    tokens = np.arange(30)[None]
    loss, _ = model.loss_and_grads(tokens, tokens, wrt="lora")
    assert [buffer.size for buffer in stored._free_buffers] == [512 * 256]  # the largest linear map
    expanded = dr.load_model(MODELS["Q4_K_M"], backend="numba", weights="expanded")
    assert abs(expanded.loss(tokens, tokens) / loss - 1) < 1e-6


def test_rows_are_those_of_the_whole():
    weights = weights_from_gguf(read_gguf(MODELS["Q4_K_M"]), "float32", nb)[1]
    tensor = read_gguf(MODELS["Q4_K_M"]).tensors["token_embd.weight"]
    whole = quants.dequantize(tensor.raw, tensor.type, tensor.shape)
    for ids in (np.array([479, 3, 3, 0]), slice(7, 100), slice(470, 999)):
        assert np.array_equal(weights.rows("token_embd.weight", ids), whole[ids])
