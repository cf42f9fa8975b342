"""The dense feed-forward of Qwen3.5: down(SiLU(gate(x)) * up(x))."""
from dataclasses import dataclass
from typing import NamedTuple

from deltanet_ref.errors import shown
from deltanet_ref.model.layers.kind import Fields, Kind, Stage, TensorRow, size

UP_GATE = ("ffn_up.weight", "ffn_gate.weight")
DOWN = "ffn_down.weight"

TENSORS = (
    TensorRow("ffn_gate.weight", "mlp.gate_proj.weight", ("F", "D"), linear=True),
    TensorRow("ffn_up.weight", "mlp.up_proj.weight", ("F", "D"), linear=True),
    TensorRow("ffn_down.weight", "mlp.down_proj.weight", ("D", "F"), linear=True),
)
STAGES = (
    Stage("ffn_gate", ("L", "F"), "projected: the half that goes through SiLU", ("ffn_gate.weight",)),
    Stage("ffn_up", ("L", "F"), "projected: the other half", ("ffn_up.weight",)),
    Stage("ffn_act", ("L", "F"), "SiLU(ffn_gate) times ffn_up"),
    Stage("ffn_out", ("L", "D"), "ffn_act projected back", ("ffn_down.weight",), gradient=False),
)


@dataclass(frozen=True, kw_only=True)
class SwigluFields(Fields):
    """Configuration of the dense feed-forward."""
    intermediate_size: int = size("feed_forward_length", 12288)

    @classmethod
    def from_hf(cls, text, problems):
        if text.get("hidden_act", "silu") != "silu":
            problems.append(f"hidden_act {shown(text['hidden_act'])} is not supported, only 'silu'")
        return super().from_hf(text, problems)

    def to_hf(self):
        return {"hidden_act": "silu"}


class SwigluCache(NamedTuple):
    """Kept by swiglu_layer_forward."""
    up_gate: tuple            # LinearCache
    swiglu: tuple
    down: tuple               # LinearCache


def swiglu_layer_forward(x, layer):
    """x (B, L, D) -> y (B, L, D), SwigluCache."""
    # 1  project up twice
    (up, gate), up_gate = layer.linear_maps_forward(UP_GATE, x)
    # 2  SiLU(gate) * up
    h, swiglu = layer.ops.swiglu_forward(gate, up)
    # 3  project back
    y, down = layer.linear_forward(DOWN, h)
    layer.see(ffn_gate=gate, ffn_up=up, ffn_act=h, ffn_out=y)
    return y, SwigluCache(up_gate, swiglu, down)


def swiglu_layer_backward(dy, layer, cache, grads, need_dx=True):
    """dx (B, L, D), or None unless needed; gradients of the layer's tensors go to grads."""
    # 3  project back
    dh = layer.linear_backward(DOWN, dy, cache.down, grads)
    # 2  SiLU(gate) * up
    dgate, dup = layer.ops.swiglu_backward(dh, cache.swiglu)
    layer.see_gradients(ffn_gate=dgate, ffn_up=dup, ffn_act=dh)
    # 1  project up twice
    return layer.linear_maps_backward(UP_GATE, (dup, dgate), cache.up_gate, grads, need_dx)


KIND = Kind(fields=SwigluFields, tensors=TENSORS, stages=STAGES, sizes=lambda c: {"F": c.intermediate_size},
            forward=swiglu_layer_forward, backward=swiglu_layer_backward, output=DOWN)
