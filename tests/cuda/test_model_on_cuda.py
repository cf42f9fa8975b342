"""The whole path on the emulated card: a model's loss, gradients, training, decoding, its graphs, and its errors.

float32: within 8 noise floors of float64, as the other backends (tests/test_model.py); measured: 3.1 at most.
bfloat16: the reference has the same weights, rounded to bfloat16, in float64; a tensor's noise floor is what it changes
by when every activation that an operator returns moves by up to half a unit of bfloat16 (rounding.py). Kernels round
more often (sums of gradients, the matrices of a chunk, the probabilities of attention), but to the nearest, which moves
less than the largest move does. Limit: 2 floors; measured: 1.2 at most, 1.0 in the median.
"""

import re

import numpy as np
import pytest

import deltanet_ref as dr
from deltanet_ref import backends, ops
from deltanet_ref.backends import cuda, interface
from deltanet_ref.backends.cuda import stand_in
from deltanet_ref.backends.cuda.graph import Graph
from deltanet_ref.cli.main import main
from deltanet_ref.errors import InputError
from deltanet_ref.formats.gguf import read_gguf
from deltanet_ref.model.load import weights_from_gguf
from deltanet_ref.model.qwen35 import Qwen35
from deltanet_ref.oracle.diff import diff_traces
from deltanet_ref.oracle.trace import trace
from deltanet_ref.train.batches import Example
from tests.cuda.rounding import bfloat16_floors
from tests.paths import FIXTURES
from tests.tolerances import assert_close, assert_within_floors, weight_floors

MODEL, QUANTISED = "grouped/grouped-f32.gguf", "quant/quant-Q4_K_M.gguf"
FLOORS = {"float32": 8, "bfloat16": 2}
rng = np.random.default_rng(3)
IDS = rng.integers(0, 480, (1, 83))
LABELS = np.where(rng.random(IDS.shape) < 0.3, -100, IDS)
CU_SEQLENS = np.array([0, 67, 67, 68, 83])  # more than a chunk, an empty sequence, a single token
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture(scope="module")
def backend():
    return dr.get_backend("cuda-emulated")


def load(backend, dtype, name=MODEL, rounded=False):
    """A model; rounded: its matrices hold bfloat16 numbers."""
    config, weights, _ = weights_from_gguf(read_gguf(FIXTURES / name), dtype, backend, "expanded")
    if rounded:
        bfloat16 = cuda.emulated().dtypes["bfloat16"]
        for tensor, array in list(weights.items()):
            if array.ndim == 2 and "conv1d" not in tensor:
                weights[tensor] = array.astype(bfloat16).astype(array.dtype)
    return Qwen35(config, weights)


def attach(model, scale=1.0, trainable=True):
    """An adapter whose update is not zero; its numbers are bfloat16's."""
    adapter = dr.new_adapter(model, rank=3, alpha=5, seed=1)
    bfloat16 = cuda.emulated().dtypes["bfloat16"]
    for name, factor in adapter.tensors.items():
        value = (0.1 * np.random.default_rng(len(name)).standard_normal(factor.shape)).astype(bfloat16)
        adapter.tensors[name] = model.backend.xp.asarray(value.astype(model.backend.to_host(factor).dtype))
    model.attach(adapter, scale=scale, trainable=trainable)
    return adapter


def floors_of(compute, dtype):
    """Exact results and noise floors. compute: model -> list of NumPy arrays."""
    if dtype == "float32":
        model = load(ops, "float64")
        return compute(model), weight_floors(model, compute, np.float32)
    return compute(load(ops, "float64", rounded=True)), bfloat16_floors(
        lambda backend: compute(load(backend, "float64", rounded=True))
    )


def base_results(model):
    logits = model.logits(IDS, cu_seqlens=CU_SEQLENS)
    loss, grads = model.loss_and_grads(IDS, LABELS, cu_seqlens=CU_SEQLENS)
    return [model.backend.to_host(x) for x in (logits, loss, *grads.values())]


def lora_results(model):
    if not model.adapters:
        attach(model, trainable=False, scale=-0.7)
        attach(model)
    loss, grads = model.loss_and_grads(IDS, LABELS, cu_seqlens=CU_SEQLENS, wrt="lora")
    return [model.backend.to_host(x) for x in (loss, *grads.values())]


def test_the_backend_keeps_the_contract(backend):
    assert interface.violations(backend) == []


@both_dtypes
@pytest.mark.parametrize("results", [base_results, lora_results])
def test_logits_loss_and_every_gradient_are_those_of_ops(backend, dtype, results):
    exact, floors = floors_of(results, dtype)
    model = load(backend, dtype)
    names = ["logits", "loss"] if results is base_results else ["loss"]
    got = results(model)
    wrt = "all" if results is base_results else "lora"
    grads = model.loss_and_grads(IDS, LABELS, cu_seqlens=CU_SEQLENS, wrt=wrt)[1]
    assert {g.dtype.name for g in grads.values()} == {"float32"}
    assert_within_floors(names + list(grads), got, exact, floors, FLOORS[dtype])


@both_dtypes
def test_what_is_kept_between_forward_and_backward_does_not_change_a_bit(backend, dtype):
    model = load(backend, dtype)
    attach(model)
    results = [
        model.loss_and_grads(IDS, LABELS, cu_seqlens=CU_SEQLENS, wrt="lora", keep=keep)
        for keep in ("everything", "products", "inputs")
    ]
    for loss, grads in results[1:]:
        assert loss == results[0][0]
        for name, gradient in grads.items():
            np.testing.assert_array_equal(gradient.get(), results[0][1][name].get(), err_msg=name)


BATCHES = [(11, 29, 43), (40, 43), (1, 4, 79), (90, 5), (30, 33, 23)]  # lengths; all fill up to 96 tokens
TRAINED = [0.5, 0.5, 0.55, 0.5, 0.45]  # of the labels: 33 .. 48 in a step


@both_dtypes
def test_a_replayed_step_has_the_bits_of_the_step(backend, dtype, monkeypatch):
    """Batches of other lengths and other trained tokens are one shape: the first runs as it is, the second is captured,
    all later ones are launches."""
    model = load(backend, dtype)
    attach(model)
    device = backend.run_step.__self__.device
    steps, direct = cuda.Steps(device), cuda.Steps(device, graphs=False)
    for seed, (lengths, share) in enumerate(zip(BATCHES, TRAINED, strict=True)):
        rng, cu_seqlens = np.random.default_rng(seed), np.cumsum([0, *lengths])
        ids = rng.integers(0, 480, (1, cu_seqlens[-1]))
        labels = np.where(rng.random(ids.shape) < share, ids, -100)
        results = []
        for run in (direct.run, steps.run):
            monkeypatch.setattr(backend, "run_step", run)
            results.append(model.loss_and_grads(ids, labels, cu_seqlens=cu_seqlens, wrt="lora"))
        (want_loss, want), (loss, grads) = results
        assert loss == want_loss and set(grads) == set(want)
        for name in want:
            np.testing.assert_array_equal(grads[name].get(), want[name].get(), err_msg=name)
        # and what fills the step up changes nothing but the order of sums
        monkeypatch.setattr(backend, "run_step", None)
        loss, grads = model.loss_and_grads(ids, labels, cu_seqlens=cu_seqlens, wrt="lora")
        assert abs(loss - want_loss) < 1e-5 * want_loss
        for name in want if dtype == "float32" else ():
            assert_close(f"{name}, {lengths}", grads[name].get(), want[name].get(), 1e-4)
    (graph,) = steps._shapes.values()
    assert isinstance(graph, Graph), steps.refused
    monkeypatch.setattr(backend, "run_step", steps.run)  # another shape is another step
    model.loss_and_grads(IDS[:, :5], IDS[:, :5], wrt="lora")
    assert len(steps._shapes) == 2


@both_dtypes
def test_three_training_steps_have_the_losses_of_ops(backend, dtype):
    """Relative to how far the losses fall: float32 1e-4; bfloat16 2 %: the parameters of both differ by AdamW's
    normalised steps where a gradient is within its noise."""
    losses = []
    examples = [Example(IDS[0, a:b], LABELS[0, a:b], "") for a, b in ((0, 11), (11, 40), (40, 83))]
    for model in (load(backend, dtype), load(ops, "float64", rounded=dtype == "bfloat16")):
        adapter = attach(model)
        report = dr.train(model, adapter, examples, steps=3, batch_size=3, lr=1e-2, weight_decay=0.1, clip=0.5)
        assert ("on the device" in report.peak_memory) == (model.backend is backend)
        losses.append(np.array(report.losses))
    assert losses[1][0] - losses[1][-1] > 0.05
    limit = {"float32": 1e-4, "bfloat16": 2e-2}[dtype] * (losses[1][0] - losses[1][-1])
    if dtype == "bfloat16":
        limit += abs(losses[0][0] - losses[1][0])  # of the first step, before any update
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=limit)


def test_decoding_token_by_token_is_decoding_at_once(backend):
    def last_logits(model):
        state, outputs = None, []
        for piece in (IDS[0, :20], IDS[0, 20:30], *IDS[0, 30:34].tolist()):
            logits, state = (model.prefill if np.ndim(piece) else model.step)(piece, state)
            outputs.append(model.backend.to_host(logits))
        return outputs

    exact, floors = floors_of(last_logits, "float32")
    got = last_logits(load(backend, "float32"))
    assert_within_floors([f"logits {i}" for i in range(len(got))], got, exact, floors, FLOORS["float32"])


@both_dtypes
def test_generation_chooses_the_tokens_of_ops(backend, dtype):
    chosen = [
        list(dr.generate(model, IDS[0, :9].tolist(), max_tokens=6, temperature=0, return_ids=True))
        for model in (load(backend, dtype), load(ops, "float64", rounded=dtype == "bfloat16"))
    ]
    assert chosen[0] == chosen[1]


@both_dtypes
@pytest.mark.parametrize("mode", ["mapped", "expanded"])
def test_a_quantised_model_computes_with_its_decoded_weights(backend, dtype, mode):
    """mapped: bytes stay quantised on the card, also those of the embedding; and its steps become graphs."""
    file = read_gguf(FIXTURES / QUANTISED)
    model = Qwen35(*weights_from_gguf(file, dtype, backend, mode)[:2])
    attach(model)
    steps = backend.run_step.__self__
    known = set(steps._shapes)
    loss, grads = model.loss_and_grads(IDS, LABELS, cu_seqlens=CU_SEQLENS, wrt="lora")
    again, replayed = model.loss_and_grads(IDS, LABELS, cu_seqlens=CU_SEQLENS, wrt="lora")  # captured
    (key,) = set(steps._shapes) - known
    assert isinstance(steps._shapes[key], Graph), steps.refused
    assert again == loss and all((replayed[name].get() == grads[name].get()).all() for name in grads)
    exact = load(ops, "float64", QUANTISED, rounded=dtype == "bfloat16")
    attach(exact)
    want, want_grads = exact.loss_and_grads(IDS, LABELS, cu_seqlens=CU_SEQLENS, wrt="lora")
    assert abs(loss - want) < {"float32": 1e-5, "bfloat16": 2e-2}[dtype] * want
    for name, gradient in grads.items():
        error = np.linalg.norm(gradient.get() - want_grads[name]) / np.linalg.norm(want_grads[name])
        assert error < {"float32": 1e-4, "bfloat16": 0.3}[dtype], f"{name}: {error:.3g}"


# ---- choosing the backend


def test_cuda_without_its_packages_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    cuda.card.cache_clear()
    with pytest.raises(InputError, match=r"needs packages.*cupy and ml_dtypes: pip install 'deltanet_ref\[cuda13\]'"):
        dr.get_backend("cuda")
    assert main(["generate", str(FIXTURES / MODEL), "-p", "x", "--backend", "cuda"]) == 2
    error = capsys.readouterr().err.strip()
    assert "cuda13" in error and "\n" not in error


def test_cuda_without_a_card_says_so():
    pytest.importorskip("cupy")
    if backends.has_card():
        pytest.skip("there is a card")
    with pytest.raises(InputError, match="finds no card.*numba"):
        dr.get_backend("cuda")


def test_auto_is_cuda_where_there_is_a_card_and_says_so(backend, monkeypatch):
    assert dr.get_backend("auto").name == "cuda" if backends.has_card() else "numba"
    monkeypatch.setattr(backends, "has_card", lambda: True)
    monkeypatch.setattr(backends, "find_spec", lambda name: True)
    monkeypatch.setattr(cuda, "card", lambda: backend)
    assert dr.load_model(FIXTURES / MODEL).notes == [f"backend cuda-emulated: {backend.device}"]
    assert dr.get_backend("auto", "float64").name == "numba"


def test_a_dtype_that_a_backend_does_not_have_is_refused():
    for name, dtype, named in (("cuda-emulated", "float64", "numba"), ("numpy", "bfloat16", "cuda")):
        with pytest.raises(InputError, match=f"does not compute in {dtype}.*backend='{named}'"):
            dr.load_model(FIXTURES / MODEL, backend=name, dtype=dtype)
    with pytest.raises(InputError, match="'float16' is unknown: use 'float32' or 'bfloat16'"):
        dr.load_model(FIXTURES / MODEL, backend="cuda-emulated", dtype="float16")


# ---- memory


@pytest.mark.parametrize("share", [0.6, 0.3])
def test_out_of_memory_says_what_would_have_fitted(backend, monkeypatch, share):
    """And it is true: that many tokens fit, and those that did not are more."""
    model = load(backend, "float32")
    adapter = attach(model)
    ids = np.resize(IDS, (1, 400))
    monkeypatch.setattr(backend, "run_step", None)
    needed, _ = backend.memory_of(lambda: model.loss_and_grads(ids, ids, wrt="lora"))
    used = sum(block.size for block in stand_in.Memory.blocks)
    monkeypatch.setattr(stand_in.Memory, "total", int(used + share * needed))
    with pytest.raises(
        MemoryError, match="a step of 400 tokens needs about .* GB are free; about .* tokens fit"
    ) as error:
        dr.train(model, adapter, [Example(ids[0], ids[0], "")], steps=1)
    fitting, checkpointed = (int(n) for n in re.findall(r"about (\d+) tokens fit", str(error.value)))
    assert share * 300 < fitting < checkpointed <= 400
    for n, keep in ((fitting - 16, "products"), (checkpointed - 16, "inputs")):
        model.loss_and_grads(ids[:, :n], ids[:, :n], wrt="lora", keep=keep)
    with pytest.raises(MemoryError):
        model.loss_and_grads(ids[:, : fitting + 32], ids[:, : fitting + 32], wrt="lora", keep="products")


def test_a_step_uploads_no_quantised_weight_and_its_memory_is_measured_without_a_graph(backend, monkeypatch):
    """The head's bytes too stay on the card; and what a step needs is the same before and after its capture."""
    model = Qwen35(*weights_from_gguf(read_gguf(FIXTURES / QUANTISED), "bfloat16", backend, "mapped")[:2])
    attach(model)
    device = backend.run_step.__self__.device

    def step():
        model.loss_and_grads(IDS, LABELS, cu_seqlens=CU_SEQLENS, wrt="lora")

    step()
    needed, _ = backend.memory_of(step)
    uploads, upload = [], device.upload
    monkeypatch.setattr(
        device, "upload", lambda *args, **options: uploads.append(upload(*args, **options)) or uploads[-1]
    )
    backend.memory_of(step)
    assert 0 < sum(x.nbytes for x in uploads) < 8192 < model.weights._stored[model.head].raw.nbytes
    monkeypatch.undo()
    step()  # captured
    assert any(isinstance(found, Graph) for found in backend.run_step.__self__._shapes.values())
    assert backend.memory_of(step)[0] == needed


@both_dtypes
def test_a_trace_has_no_divergence_from_that_of_ops(backend, dtype):
    """Forward and backward, every stage of every layer, within what diff allows for the dtype. Gradients of parameters
    may be small by cancellation: they are judged by noise floors above."""
    tokens = IDS[0, :70]
    models = load(backend, dtype), load(ops, "float64", rounded=dtype == "bfloat16")
    ours, definition = (trace(model, tokens, backward=True) for model in models)
    rows = [row for row in diff_traces(definition, ours).rows if row.meaning != "gradient of the parameter"]
    assert [row for row in rows if row.status != "ok"] == [] and len(rows) > 100
    assert ours.dtype == dtype and len(ours.tensors) == len(definition.tensors)


def test_the_command_line_computes_in_bfloat16_on_a_device_unless_told(capsys, tmp_path):
    model = str(FIXTURES / MODEL)
    for options, dtype in (([], "bfloat16"), (["--dtype", "float32"], "float32")):
        command = [
            "trace",
            model,
            "--tokens",
            "3,1,4,1,5",
            "--backend",
            "cuda-emulated",
            "-o",
            str(tmp_path / f"{dtype}.safetensors"),
        ]
        assert main([*command, *options]) == 0
        assert f", {dtype}, loss" in capsys.readouterr().out
