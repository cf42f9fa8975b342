"""Small random Qwen3.5 models made by HF, and what HF's float64 code computes with them."""

import math

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from tests.peers import hf_float64

DELTA, ATTENTION = "linear_attention", "full_attention"

# No two sizes of a model are equal. Each shape has something that the others lack.
SHAPES = {
    # as many value heads as key heads, two attention layers out of step, tied
    "H_v = H_k": dict(
        vocab_size=97,
        hidden_size=44,
        intermediate_size=52,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=24,
        linear_num_key_heads=3,
        linear_num_value_heads=3,
        linear_key_head_dim=10,
        linear_value_head_dim=14,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        layer_types=[DELTA, ATTENTION, DELTA, DELTA, ATTENTION],
        rope_parameters=dict(rope_type="default", rope_theta=1e6, partial_rotary_factor=0.25, mrope_section=[1, 1, 1]),
    ),
    # every fourth layer is attention, as published; d_k > d_v; a convolution of three taps
    "H_v = 2 H_k": dict(
        vocab_size=89,
        hidden_size=36,
        intermediate_size=58,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=18,
        linear_value_head_dim=9,
        linear_conv_kernel_dim=3,
        rms_norm_eps=1e-6,
        num_hidden_layers=5,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25, mrope_section=[1, 1, 0]),
    ),
    # attention first, half of each head rotated, a kernel of five taps, a large eps
    "H_v = 3 H_k": dict(
        vocab_size=83,
        hidden_size=40,
        intermediate_size=62,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=28,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=8,
        linear_value_head_dim=13,
        linear_conv_kernel_dim=5,
        rms_norm_eps=1e-2,
        layer_types=[ATTENTION, DELTA, DELTA, ATTENTION, DELTA],
        rope_parameters=dict(rope_type="default", rope_theta=5e5, partial_rotary_factor=0.5, mrope_section=[3, 2, 2]),
    ),
    # no attention at all; one key head
    "only delta layers, tied": dict(
        vocab_size=79,
        hidden_size=30,
        intermediate_size=42,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=1,
        linear_num_value_heads=3,
        linear_key_head_dim=12,
        linear_value_head_dim=7,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-4,
        tie_word_embeddings=True,
        layer_types=[DELTA, DELTA],
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25, mrope_section=[1, 1, 0]),
    ),
    # no delta layer; as many query heads as key heads
    "only attention": dict(
        vocab_size=73,
        hidden_size=34,
        intermediate_size=46,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=5,
        linear_value_head_dim=6,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6,
        layer_types=[ATTENTION, ATTENTION, ATTENTION],
        rope_parameters=dict(rope_type="default", rope_theta=1e3, partial_rotary_factor=0.5, mrope_section=[2, 1, 1]),
    ),
}


def text_config(shape):
    """HF's config of one of the SHAPES, or of another dict like them."""
    layers = shape.get("num_hidden_layers", len(shape.get("layer_types", ())))
    return Qwen3_5TextConfig(**shape | dict(num_hidden_layers=layers), max_position_embeddings=300)


def random_model(shape, seed, dtype=torch.float32):
    """HF's own model class with lively weights: none is zero, no norm is neutral, decays from weak to strong."""
    model = Qwen3_5ForCausalLM(text_config(shape)).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            mean, deviation = _distribution(name, p)
            p.copy_(mean + deviation * torch.randn(p.shape, generator=generator))
    return model


def _distribution(name, p):
    """Mean and standard deviation of a parameter's entries."""
    if name.endswith("linear_attn.norm.weight"):
        return 1.0, 0.3
    if name.endswith("A_log"):
        return 0.5, 1.0  # exp(A_log) mostly between 0.2 and 12
    if name.endswith("dt_bias"):
        return -1.5, 1.0
    if p.ndim == 1:
        return 0.0, 0.3  # the norms that hold w of 1 + w
    if "embed_tokens" in name:
        return 0.0, 1.0
    return 0.0, 1.0 / math.sqrt(p[0].numel())


def in_float64(model):
    """The same values in HF's float64 code."""
    wide = hf_float64.Qwen3_5ForCausalLM(model.config).eval()
    wide.load_state_dict(model.state_dict())
    return wide


def hidden_states(model, tokens):
    """The embeddings, each block's output and the last norm's, (B, L, D) NumPy each."""
    outputs, stack = [], [model.model.embed_tokens, *model.model.layers, model.model.norm]
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output.numpy())) for module in stack
    ]
    with torch.no_grad():
        model(torch.tensor(tokens), use_cache=False)
    for hook in hooks:
        hook.remove()
    return outputs


def logits_loss_and_grads(model, tokens, labels, mask=None):
    """(B, L, V), float, {HF name: array}; mask (B, L) is HF's attention_mask, 0 at the padding."""
    model.zero_grad()
    out = model(
        torch.tensor(tokens),
        labels=torch.tensor(labels),
        use_cache=False,
        attention_mask=None if mask is None else torch.tensor(mask),
    )
    out.loss.backward()
    return out.logits.detach().numpy(), out.loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters()}
