"""Every backend keeps the contract of backends/interface.py, and a model runs on a backend that has no more than
that."""

from types import SimpleNamespace

import numpy as np
import pytest

import deltanet_ref as dr
from deltanet_ref import ops
from deltanet_ref.backends import CPU_BACKENDS, interface
from deltanet_ref.formats.gguf import read_gguf
from deltanet_ref.model.load import weights_from_gguf
from deltanet_ref.model.qwen35 import Qwen35
from deltanet_ref.train.batches import Example
from tests.device_backend import BACKEND, DeviceArray, to_host
from tests.paths import FIXTURES

IDS = np.random.default_rng(3).integers(0, 480, (1, 37))
CU_SEQLENS = np.array([0, 11, 12, 37])


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_every_backend_keeps_the_contract(name):
    assert interface.violations(dr.get_backend(name)) == []


def test_the_minimal_backend_of_these_tests_keeps_the_contract_without_any_optional_capability():
    assert interface.violations(BACKEND) == []
    assert all(getattr(BACKEND, name) is None for name in interface.OPTIONAL)


def broken(**changes):
    names = vars(ops) | changes
    return SimpleNamespace(**{name: x for name, x in names.items() if x is not ...})


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(swiglu_forward=...), "swiglu_forward is missing"),
        (dict(stored=...), "stored is missing"),
        (dict(to_host=lambda array: array), "to_host(array) must be to_host(x"),
        (dict(rope_forward=lambda x, sin, cos: x), "rope_forward(x, sin, cos) must be rope_forward(x, cos, sin)"),
        (dict(l2_norm_forward=lambda x, eps=1e-5: x), "eps=1e-05"),
        (dict(gated_delta_rule_step=3), "gated_delta_rule_step is 3: it must be a function"),
        (dict(device=0), "device is 0: it must be a str or None"),
        (dict(delta_layer_step=lambda qkv: qkv), "delta_layer_step(qkv) must be delta_layer_step(qkv, z, b, a"),
        (dict(stored=SimpleNamespace(few_rows=4, decodes=lambda type, shape: True)), "stored.dequantize is missing"),
    ],
)
def test_what_departs_from_the_contract_is_named(changes, named):
    found = interface.violations(broken(**changes))
    assert any(named in line for line in found), found


def models(name):
    """The same GGUF on ops and on the device backend."""
    file = read_gguf(FIXTURES / name)
    loaded = []
    for backend in (ops, BACKEND):
        config, weights, _ = weights_from_gguf(file, "float32", backend)
        loaded.append(Qwen35(config, weights))
    return loaded


@pytest.mark.parametrize("name", ["grouped/grouped-f32.gguf", "quant/quant-Q4_K_M.gguf"])
@pytest.mark.parametrize("keep", ["everything", "products", "inputs"])
def test_forward_and_backward_need_only_the_contract(name, keep):
    """Arrays that NumPy cannot touch come out with the bits of ops: gradients of the base and of an adapter."""
    host, device = models(name)
    logits = device.logits(IDS, cu_seqlens=CU_SEQLENS)
    assert isinstance(logits, DeviceArray)
    np.testing.assert_array_equal(to_host(logits), host.logits(IDS, cu_seqlens=CU_SEQLENS))
    for model in (host, device):
        adapter = dr.new_adapter(model, rank=3, alpha=5, seed=1)
        for n, factor in adapter.tensors.items():
            value = np.random.default_rng(len(n)).standard_normal(factor.shape).astype(np.float32)
            adapter.tensors[n] = model.backend.xp.asarray(0.1 * value)
        model.attach(adapter, name="a")
    for wrt in ("all", "lora"):
        (loss, grads), (want_loss, want) = (
            model.loss_and_grads(IDS, IDS, cu_seqlens=CU_SEQLENS, wrt=wrt, keep=keep) for model in (device, host)
        )
        assert loss == want_loss and set(grads) == set(want)
        for n in want:
            assert isinstance(grads[n], DeviceArray), n
            np.testing.assert_array_equal(to_host(grads[n]), want[n], err_msg=n)


@pytest.mark.parametrize("name", ["grouped/grouped-f32.gguf", "quant/quant-Q4_K_M.gguf"])
def test_training_and_saving_need_only_the_contract(name, tmp_path):
    """Two steps of AdamW with clipping and weight decay leave the same bytes in the adapter's file as on ops."""
    examples = [Example(IDS[0, a:b], IDS[0, a:b], "") for a, b in ((0, 11), (11, 37))]
    for model, path in zip(models(name), ("host.gguf", "device.gguf"), strict=True):
        adapter = dr.new_adapter(model, rank=3, alpha=5, seed=1)
        dr.train(model, adapter, examples, steps=2, batch_size=2, lr=1e-2, weight_decay=0.1, clip=0.5)
        assert all(isinstance(x, model.backend.xp.ndarray) for x in adapter.tensors.values())
        adapter.save_gguf(tmp_path / path)
    assert (tmp_path / "host.gguf").read_bytes() == (tmp_path / "device.gguf").read_bytes()


@pytest.mark.parametrize("name", ["grouped/grouped-f32.gguf", "quant/quant-Q4_K_M.gguf"])
def test_decoding_needs_only_the_contract(name):
    """Prefill in two pieces and steps, the KV buffer included; and sampling."""
    host, device = models(name)
    sampled = [
        list(dr.generate(model, IDS[0, :9].tolist(), max_tokens=5, seed=2, return_ids=True)) for model in (host, device)
    ]
    assert sampled[0] == sampled[1]
    states = [None, None]
    for piece in (IDS[0, :20], IDS[0, 20:30], *IDS[0, 30:].tolist()):
        outputs = []
        for i, model in enumerate((host, device)):
            run = model.prefill if np.ndim(piece) else model.step
            logits, states[i] = run(piece, states[i])
            outputs.append(to_host(logits))
        np.testing.assert_array_equal(*outputs)
    for mine, theirs in zip(states[0].blocks, states[1].blocks, strict=True):
        for x, y in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(to_host(y), x)
