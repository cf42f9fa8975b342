"""Two steps of LoRA training against PEFT and torch's AdamW, from the same random A and B."""
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Qwen3_5ForCausalLM

import deltanet_ref as dr
from deltanet_ref.lora.bridge import reorder
from deltanet_ref.model.tensors import linear_tensors
from deltanet_ref.train.batches import Example
from tests.delta_rule import relative
from tests.paths import FIXTURES
from tests.peers import hf_float64

LR, DECAY, CLIP, STEPS = 1e-2, 0.1, 0.05, 2      # the clip is below the gradient's norm: it acts
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj_qkv", "in_proj_z",
           "in_proj_b", "in_proj_a", "out_proj"]


def random_adapter(model):
    adapter, rng = dr.new_adapter(model, rank=4, alpha=8, seed=0), np.random.default_rng(1)
    for name, x in adapter.tensors.items():
        adapter.tensors[name] = (rng.standard_normal(x.shape) * 0.1).astype(np.float32).astype(model.dtype)
    return adapter


def theirs_after(name, directory, tokens, dtype):
    """The factors under our names, grouped order, after STEPS steps by PEFT and torch."""
    hf = Qwen3_5ForCausalLM.from_pretrained(FIXTURES / name / "hf", dtype=torch.float32, attn_implementation="eager")
    if dtype == "float64":
        exact = hf_float64.Qwen3_5ForCausalLM(hf.config)
        exact.load_state_dict(hf.state_dict())
        hf = exact
    peft = get_peft_model(hf, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
                          autocast_adapter_dtype=False)
    set_peft_model_state_dict(peft, load_file(directory / "adapter_model.safetensors"))
    trained = [p for p in peft.parameters() if p.requires_grad]
    assert trained and all(p.dtype == getattr(torch, dtype) for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY)
    for _ in range(STEPS):
        ids = torch.tensor(tokens)
        optimizer.zero_grad()
        peft(input_ids=ids, labels=ids).loss.backward()
        assert torch.nn.utils.clip_grad_norm_(trained, CLIP) > CLIP
        optimizer.step()
    return {n: p.detach().numpy() for n, p in peft.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["eq", "grouped"])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-6), ("float32", 1e-3)])
def test_two_steps_equal_peft_and_torch(name, dtype, tolerance, tmp_path):
    model = dr.load_model(FIXTURES / name / "hf", dtype=dtype)
    adapter = random_adapter(model)
    adapter.save_peft(tmp_path)
    start = {n: x.copy() for n, x in adapter.tensors.items()}
    text = np.random.default_rng(2).integers(0, 440, 65)
    theirs = theirs_after(name, tmp_path, text[None], dtype)
    dr.train(model, adapter, [Example(text, text, "here")], steps=STEPS, batch_size=1, lr=LR, warmup=0, schedule="constant",
             weight_decay=DECAY, clip=CLIP)
    ours = reorder(adapter.tensors, model.config, to="grouped")
    start = reorder(start, model.config, to="grouped")
    by_hf_name = {spec.hf_name.removesuffix(".weight"): n for n, spec in linear_tensors(model.config).items()}
    assert len(theirs) == len(ours)
    for key, value in theirs.items():
        module, factor = key.removeprefix("base_model.model.").removesuffix(".default.weight").rsplit(".lora_", 1)
        mine = f"{by_hf_name[module]}.lora_{factor.lower()}"
        assert relative(ours[mine] - start[mine], value - start[mine]) < tolerance, mine
