"""Other people's engines on the same card, where they are installed. Each function is run in a process of its own.

A peer that is missing raises ImportError, and the report says so.
"""

import numpy as np

from bench.gpu.items import ITEMS, RULES
from bench.gpu.timing import LIMITS, median_seconds, random_batches, timed_steps

CHECKED = 512  # tokens whose o is compared: the rule is causal


def peer_fla(name):
    """The delta rule of flash-linear-attention (Triton)."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return _rule(name, lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g, beta, scale=q.shape[-1] ** -0.5)[0])


def peer_flash_qla(name):
    """The delta rule of FlashQLA (TileLang)."""
    from flash_qla import chunk_gated_delta_rule

    return _rule(name, lambda q, k, v, g, beta: chunk_gated_delta_rule(q, k, v, g, beta, scale=q.shape[-1] ** -0.5)[0])


def peer_cudnn(name):
    """cuDNN's fused rule, which TransformerEngine calls (its arguments were read, not tried)."""
    from cudnn.linear_attention.ops import gated_delta_net

    def forward(q, k, v, g, beta):
        o = gated_delta_net(q=q, k=k, v=v, g=g, beta=beta, scale=q.shape[-1] ** -0.5)
        return o[0] if isinstance(o, tuple | list) else o

    return _rule(name, forward)


def _rule(name, forward):
    """Seconds of forward, and of forward and backward, of a torch function at one of the shapes of RULES."""
    import torch

    from deltanet_ref.ops import gated_delta_rule as gdr

    sizes = RULES[name]
    x = ITEMS["gated_delta_rule"].inputs(np.random.default_rng(0), sizes)
    types = dict.fromkeys(x, torch.bfloat16) | dict(g=torch.float32)
    device = {n: torch.from_numpy(a).to("cuda", types[n]) for n, a in x.items()}
    with torch.no_grad():
        o = forward(**device)[:1, :CHECKED].double().cpu().numpy()
    host = {n: a[:1, :CHECKED].double().cpu().numpy() for n, a in device.items()}
    want, _, _ = gdr.chunk_forward(host["q"], host["k"], host["v"], g=host["g"], beta=host["beta"])
    error = float(np.linalg.norm(o - want) / np.linalg.norm(want))
    if not error <= LIMITS["bfloat16"]:
        return dict(right=False, errors=dict(bfloat16=error))
    with torch.no_grad():
        record = dict(right=True, errors=dict(bfloat16=error), forward=_eager_and_graph(lambda: forward(**device)))
    for tensor in device.values():
        tensor.requires_grad_()
    do = torch.randn(device["v"].shape, dtype=torch.bfloat16, device="cuda")

    def both():
        for tensor in device.values():
            tensor.grad = None
        forward(**device).backward(do)

    return record | dict(both=_eager_and_graph(both))


def _eager_and_graph(run):
    import torch

    record = dict(eager_s=median_seconds(run, torch.cuda.synchronize))
    try:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
        record["graph_s"] = median_seconds(graph.replay, torch.cuda.synchronize)
    except Exception as error:  # a peer that cannot be captured is timed eagerly alone
        record["no_graph"] = f"{type(error).__name__}: {error}"[:200]
    return record


def peer_hf_peft(shape, length, sequences, steps):
    """A LoRA step by HF + PEFT in bfloat16: rank 16, all linear layers, all tokens trained, no checkpointing."""
    import torch
    from models import config_of
    from peft import LoraConfig, get_peft_model
    from train_step import HF_TARGETS
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    from deltanet_ref.model.convert import hf_config

    torch.manual_seed(0)
    config = Qwen3_5TextConfig.from_dict(hf_config(config_of(shape), "bfloat16"))
    with torch.device("cuda"):
        model = Qwen3_5ForCausalLM(config).to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=HF_TARGETS))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)

    def step(tokens):
        tokens = torch.from_numpy(tokens).cuda()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    batches = random_batches(config.vocab_size, sequences, length, steps)
    return timed_steps(step, batches, torch.cuda.synchronize) | dict(memory_bytes=torch.cuda.max_memory_reserved())
