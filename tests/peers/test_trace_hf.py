"""HF's own model, traced by the hook: tensor for tensor and gradient for gradient what `trace` writes."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import deltanet_ref as dr
from deltanet_ref.oracle.diff import diff_traces
from deltanet_ref.oracle.hf_hook import hf_trace
from deltanet_ref.oracle.trace import read_trace, trace, write_trace
from tests.paths import FIXTURES
from tests.peers import hf_models
from tests.peers.hf_models import SHAPES

TOKENS = np.random.default_rng(2).integers(0, 70, 133)  # two chunks and a part


def our_trace(directory, dtype):
    return trace(dr.load_model(directory, backend="numpy", dtype=dtype), TOKENS, backward=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tensor_and_gradient_equals_hfs_float64(shape, tmp_path):
    hf = hf_models.random_model(SHAPES[shape], seed=list(SHAPES).index(shape))
    hf.save_pretrained(tmp_path)
    ours, theirs = our_trace(tmp_path, "float64"), hf_trace(hf_models.in_float64(hf), TOKENS, backward=True)
    result = diff_traces(ours, theirs)
    assert (result.first(), result.count("MISSING"), result.unknown, result.tolerance) == (None, 0, [], 1e-11)
    assert all(x.any() for x in theirs.tensors.values())


@pytest.mark.parametrize("name", ["eq", "grouped"])
def test_hfs_float32_raises_no_alarm(name, tmp_path):
    hf = AutoModelForCausalLM.from_pretrained(FIXTURES / name / "hf", dtype=torch.float32)
    write_trace(tmp_path / "theirs.safetensors", hf_trace(hf, TOKENS, backward=True))
    result = diff_traces(our_trace(FIXTURES / name / "hf", "float64"), read_trace(tmp_path / "theirs.safetensors"))
    assert result.equal() and result.tolerance == 3e-5 and max(row.error for row in result.rows) > 1e-8


def test_the_hook_finds_a_mistake_in_hfs_model():
    hf = AutoModelForCausalLM.from_pretrained(FIXTURES / "grouped" / "hf", dtype=torch.float32)
    with torch.no_grad():
        hf.model.layers[2].input_layernorm.weight -= 1
    result = diff_traces(our_trace(FIXTURES / "grouped" / "hf", "float64"), hf_trace(hf, TOKENS, backward=True))
    assert result.first().name == "blk.2.attn_norm" and "w instead of 1 + w" in result.reasons[0]


def test_the_hook_leaves_the_model_as_it_was():
    hf = AutoModelForCausalLM.from_pretrained(FIXTURES / "eq" / "hf", dtype=torch.float32)
    implementation, row = hf.config._attn_implementation, torch.tensor(TOKENS[None])
    with torch.no_grad():
        before = hf(row).logits
    forward_only = hf_trace(hf, TOKENS)
    assert not any(name.startswith("d.") for name in forward_only.tensors) and len(forward_only.tensors) == 92
    with torch.no_grad():
        assert torch.equal(hf(row).logits, before)
    assert hf.config._attn_implementation == implementation
    assert not any(module._forward_hooks for module in hf.modules())
