"""Records the same trace from Hugging Face's Qwen3.5 model (torch, transformers), with hooks on modules and functions.

model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
write_trace("theirs.safetensors", hf_trace(model, tokens, backward=True))
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from unittest import mock

from deltanet_ref.model.config import Config
from deltanet_ref.model.tensors import expected_tensors
from deltanet_ref.oracle.trace import Trace, trace_table

# module of a block: names in the trace of its first input and of its output
MODULES = {
    "": (None, "out"),
    "input_layernorm": (None, "attn_norm"),
    "post_attention_layernorm": ("mid", "ffn_norm"),
    "mlp.gate_proj": (None, "ffn_gate"),
    "mlp.up_proj": (None, "ffn_up"),
    "mlp.down_proj": ("ffn_act", "ffn_out"),
    "linear_attn.in_proj_qkv": (None, "qkv"),
    "linear_attn.in_proj_z": (None, "z"),
    "linear_attn.in_proj_b": (None, "b"),
    "linear_attn.in_proj_a": (None, "a"),
    "linear_attn.norm": (None, "o_gated"),
    "linear_attn.out_proj": (None, "mixer_out"),
    "self_attn.q_proj": (None, "q_proj gate"),
    "self_attn.k_proj": (None, "k_proj"),
    "self_attn.v_proj": (None, "v"),
    "self_attn.q_norm": (None, "q_norm"),
    "self_attn.k_norm": (None, "k_norm"),
    "self_attn.o_proj": ("o_gated", "mixer_out"),
}


def hf_trace(model, tokens: Sequence[int], backward: bool = False) -> Trace:
    """Record a forward of a Qwen3_5ForCausalLM over tokens (L,), and with `backward` the backward of its loss.

    Afterwards the model is as before, except that `backward` leaves gradients in its parameters.
    """
    import torch
    import transformers

    source, config = sys.modules[type(model.model).__module__], Config.from_hf(model.config.to_dict())
    block, taps = "", {}  # name -> (tensor, conversion of it and its gradient to the trace's layout)

    def tap(name, x, layout=lambda x: x):
        taps[block + name] = x, layout
        if x.requires_grad:
            x.retain_grad()

    def halves(x):  # rows per head: d of the query, d of the gate
        return x.unflatten(-1, (config.num_attention_heads, 2, -1)).unbind(-2)

    def hook(prefix, names):
        def run(module, inputs, output):
            nonlocal block
            block = prefix
            if names[0]:
                tap(names[0], inputs[0])
            if names[1] == "q_proj gate":
                tap("q_proj", output, lambda x: halves(x)[0])
                tap("gate", output, lambda x: halves(x)[1])
            else:
                tap(names[1], output)

        return run

    def conv(x, w, *args, run=source.causal_conv1d_fn, **options):  # x (B, channels, L), w (channels, K)
        y = run(x, w, *args, **options)
        tap("conv", y, lambda x: x.mT)
        tap("conv_state", x.detach(), lambda x: torch.nn.functional.pad(x, (w.shape[1], 0))[..., 1 - w.shape[1] :].mT)
        return y

    def delta(q, k, v, run=source.torch_chunk_gated_delta_rule, **options):  # HF normalises q and k in this one
        q, k = source.l2norm(q), source.l2norm(k)
        o, S = run(q, k, v, **options | {"use_qk_l2norm_in_kernel": False, "output_final_state": True})
        for name, x in {"q": q, "k": k, "v": v, "g": options["g"], "beta": options["beta"], "o": o, "S": S}.items():
            tap(name, x)
        return o, S

    def attention(module, q, k, v, *args, run=source.eager_attention_forward, **options):  # q, k (B, H, L, d)
        o, weights = run(module, q, k, v, *args, **options)
        tap("q", q, lambda x: x.transpose(1, 2))
        tap("k", k, lambda x: x.transpose(1, 2))
        tap("o", o)
        return o, weights

    row = torch.tensor([list(tokens)], device=model.device)
    with ExitStack() as stack:  # undoes every change to the model, also after an error
        stack.enter_context(
            mock.patch.multiple(
                source, causal_conv1d_fn=conv, torch_chunk_gated_delta_rule=delta, eager_attention_forward=attention
            )
        )
        stack.enter_context(torch.set_grad_enabled(backward))
        stack.callback(setattr, model.config, "_attn_implementation", model.config._attn_implementation)
        model.config._attn_implementation = "eager"
        modules = [
            (f"blk.{i}.", module, MODULES[path])
            for i, layer in enumerate(model.model.layers)
            for path, module in layer.named_modules()
            if path in MODULES
        ]
        modules += [
            ("", model.model.embed_tokens, (None, "embed")),
            ("", model.model.norm, (None, "output_norm")),
            ("", model.lm_head, (None, "logits")),
        ]
        for prefix, module, names in modules:
            stack.callback(module.register_forward_hook(hook(prefix, names)).remove)
        loss = model(row, labels=row, use_cache=False).loss
        found = {name: layout(x.detach()) for name, (x, layout) in taps.items()} | {"loss": loss.detach()}
    if backward:
        model.zero_grad()
        loss.backward()
        found |= {f"d.{name}": layout(x.grad) for name, (x, layout) in taps.items() if x.grad is not None}
        parameters = dict(model.named_parameters())
        for spec in expected_tensors(config).values():
            p = parameters[spec.hf_name]
            found[f"d.{spec.name}"] = p.grad / -p.detach().exp() if spec.value == "minus_exp" else p.grad
    table = trace_table(config, row.shape[1])
    tensors = {name: _numpy(found[name], table[name].shape) for name in table if name in found}
    return Trace(
        tensors,
        config,
        row[0].tolist(),
        str(model.dtype).removeprefix("torch."),
        model.config._name_or_path,
        f"transformers {transformers.__version__}",
    )


def _numpy(x, shape):
    x = x.double() if str(x.dtype) == "torch.float64" else x.float()  # NumPy has no bfloat16
    return x.reshape(shape).cpu().numpy().copy()
