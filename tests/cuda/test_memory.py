"""The memory that large models need for LoRA, from the plans of their steps' arenas: a dry run on a device that
launches nothing, and whose memory is never touched.

Counted: the base as stored (all matrices Q4_K; Q4_K_M, a few of whose matrices are Q6_K, is up to 15 % larger and the
limits leave that), the adapter with AdamW's moments and gradients, the arena, cuBLAS's workspace. Not counted: the CUDA
context, 0.3 to 0.5 GB. An arena grows linearly with the layers: measured with 4 and 8.
"""

import gc
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import deltanet_ref as dr
from deltanet_ref.backends import cuda
from deltanet_ref.backends.cuda import blas, stand_in
from deltanet_ref.backends.cuda.arena import peak, plan, recording
from deltanet_ref.backends.cuda.device import on_host
from deltanet_ref.formats import quants
from deltanet_ref.formats.gguf import GGUFTensor, read_gguf
from deltanet_ref.model.load import weights_from_gguf
from deltanet_ref.model.qwen35 import Qwen35
from deltanet_ref.model.tensors import expected_tensors
from deltanet_ref.model.weights import Weights
from tests.cuda.resources import Listing, config_08b
from tests.paths import FIXTURES
from tests.test_load import ATTENTION, DELTA

CONTEXT, LAYERS, RANK, LENGTH = 0.5e9, 32, 16, 1024
LARGE = {
    "4B": dict(hidden_size=2560, intermediate_size=9216, tie_word_embeddings=True),
    "9B": dict(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False),
}


class Dry(Listing):
    """No upload either."""

    def upload(self, host_array, dtype=None, make=None):
        host = on_host(host_array, dtype, make)
        return self.empty(host.shape, host.dtype)


def quantised_model(backend, layers, sizes):
    """A bfloat16 model with matrices in Q4_K, and the bytes of its tensors."""
    config = replace(
        config_08b(),
        layer_types=tuple([DELTA] * 3 + [ATTENTION]) * (layers // 4),
        num_hidden_layers=layers,
        vocab_size=248320,
        num_attention_heads=16,
        num_key_value_heads=4,
        linear_num_value_heads=32,
        max_position_embeddings=4096,
        **sizes,
    )
    stored = {}
    for name, spec in expected_tensors(config).items():
        if spec.is_matrix:
            raw = np.zeros(quants.stored_bytes(Type.Q4_K, spec.shape), np.uint8)  # untouched: not in memory
            fields = dict(name=name, type=Type.Q4_K, shape=spec.shape, raw=raw)
            stored[name] = GGUFTensor(*(fields.get(field) for field in GGUFTensor._fields))
        else:
            stored[name] = -np.ones(spec.shape, np.float32)
    weights = Weights(config, stored, backend.dtypes["bfloat16"], backend, "mapped")
    weights._checked = set(stored)
    size = sum(t.raw.nbytes if isinstance(t, GGUFTensor) else t.nbytes for t in stored.values())
    return Qwen35(config, weights), size


@pytest.fixture
def untouched(monkeypatch):
    """Memory of the stand-in that the system need not provide."""
    monkeypatch.setattr(stand_in.Memory, "poisoned", False)
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name, limit", [("4B", 8e9), ("9B", 12e9)])
def test_large_models_train_on_small_cards(untouched, name, limit):
    """Q4_K_M, 1024 tokens, checkpointing: 4B in 8 GB, 9B in 12 GB."""
    backend = cuda.backend_of(Dry(), "dry", "none")
    backend.run_step = None
    arenas, totals = [], []
    for layers in (4, 8):
        model, base = quantised_model(backend, layers, LARGE[name])
        adapter = dr.new_adapter(model, rank=RANK)
        model.attach(adapter, trainable=True)
        ids = np.zeros((1, LENGTH), np.int64)
        model.loss_and_grads(ids[:, :64], ids[:, :64], wrt="lora", keep="inputs")  # uploads the base
        with recording(stand_in) as recorder:
            model.loss_and_grads(ids, ids, wrt="lora", keep="inputs")
        planned = plan(recorder.allocations)
        assert planned.size <= 1.05 * peak(recorder.allocations)
        arenas.append(planned.size)
        factors = sum(x.nbytes for x in adapter.tensors.values())
        totals.append(1.15 * base + 4 * factors + planned.size + blas.WORKSPACE + CONTEXT)
    total = totals[0] + (totals[1] - totals[0]) * (LAYERS - 4) / 4
    assert total < limit, f"{total / 1e9:.2f} GB, arenas of 4 and 8 layers: {[f'{a / 1e9:.2f}' for a in arenas]}"
    print(f"{name}: {total / 1e9:.2f} GB, arenas of 4 and 8 layers: {[f'{a / 1e9:.2f}' for a in arenas]}")


@pytest.mark.parametrize("share, kept", [(2.1, True), (1.9, False)])
def test_weights_are_decoded_once_where_the_card_has_room_for_it(monkeypatch, share, kept):
    """auto: in bfloat16 on the card if half of its free memory is enough, otherwise they stay quantised."""
    backend = cuda.emulated()
    file = read_gguf(FIXTURES / "quant/quant-Q4_K_M.gguf")
    _, mapped, _ = weights_from_gguf(file, "bfloat16", backend, "mapped")
    decoded = sum(2 * np.prod(mapped.shape(name)) for name in mapped if mapped._is_stored(name))
    monkeypatch.setattr(stand_in.Memory, "total", backend.held_memory() + int(share * decoded))
    _, weights, _ = weights_from_gguf(file, "bfloat16", backend, "auto")
    assert bool(weights._kept) == kept and not mapped._kept
