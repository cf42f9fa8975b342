"""What a kind of layer is: one object that holds everything the rest of the project knows about it.

From it are derived: the fields of the configuration, the tensor table (and with it loading, conversion, LoRA targets
and the search for gradients), the stages of a trace, state, forward and backward.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np

# ---- fields of the configuration

def size(gguf: str, default: int | float | None = None, kind: type = np.uint32):
    """A field of a Config that a GGUF file holds as one number, under "<architecture>.<gguf>".

    default: HF's where config.json lacks it (as in transformers 5.23); kind: NumPy's type of the GGUF value.
    """
    return field(metadata={"gguf": gguf, "default": default, "kind": kind})


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Configuration fields of one kind of layer, under HF's names; a subclass declares them and derives sizes.

    Config inherits from the Fields of all kinds and calls these methods on each of them by name:
    DeltaNetFields.to_gguf(config).
    """

    @classmethod
    def from_gguf(cls, keys) -> dict:
        """Field name -> value. keys: config.GGUFKeys, which collects what is missing or wrong."""
        return {f.name: keys.number(f.metadata["gguf"], f.metadata["kind"]) for f in fields(cls) if f.metadata}

    @classmethod
    def from_hf(cls, text: Mapping, problems: list) -> dict:
        """Field name -> value, from config.json's text model; what is not supported is appended to problems."""
        return {f.name: text.get(f.name, f.metadata["default"]) for f in fields(cls) if f.metadata}

    def to_gguf(self) -> dict:
        """GGUF key (without the architecture) -> value, beyond the fields declared by size()."""
        return {}

    def to_hf(self) -> dict:
        """config.json's entries, beyond the fields declared by size()."""
        return {}

    def problems(self) -> list:
        """What is wrong with the values, beyond numbers that are not positive; a line each."""
        return []


def shortest(x: float) -> float:
    """The shortest number that equals x in float32, as GGUF holds it: 1e-06 again, not 9.999999974752427e-07."""
    return float(str(np.float32(x)))


# ---- tensors and stages

class TensorRow(NamedTuple):
    """A row of the tensor table; letters are those of Kind.sizes and model.tensors."""
    name: str                       # GGUF: "attn_qkv.weight", within the block
    hf_name: str                    # HF: "linear_attn.in_proj_qkv.weight", within the layer
    shape: tuple                    # letters, rows first, as GGUF stores it
    v_heads: tuple | None = None    # (axis over the value heads, letter of the entries before them, letter of a head's)
    value: str = "same"             # GGUF's value from HF's: "same", "one_plus", "minus_exp" or "squeeze"
    linear: bool = False            # y = x w^T: a LoRA target


class Stage(NamedTuple):
    """A named tensor of a trace; a layer passes it to layer.see(name=array), its gradient to layer.see_gradients."""
    name: str
    axes: tuple                     # letters
    meaning: str
    parameters: tuple = ()          # the tensors of the model that produce it
    gradient: bool = True           # whether d.name is recorded
    v_heads: tuple | None = None    # as of TensorRow


class Kind(NamedTuple):
    """A kind of mixer or feed-forward.

    forward(x, layer, *, shared, state, cu_seqlens) -> y, state, cache     x (B, L, D) -> y (B, L, D)
    backward(dy, layer, cache, grads, need_dx) -> dx or None               gradients of the tensors go to grads

    The state of a mixer is a NamedTuple of arrays, None before the first token; a feed-forward has none, and neither
    takes nor returns shared, state or cu_seqlens. A cache is a tuple, None where no backward follows.
    """
    fields: type[Fields]
    tensors: tuple[TensorRow, ...]
    stages: tuple[Stage, ...]
    sizes: Callable                 # Config -> {letter: int} of its tensors and stages
    forward: Callable
    backward: Callable
    output: str                     # the linear map into the residual stream; rebuild leaves its product out
    shared: Callable | None = None  # (config, backend, positions, dtype) -> shared: once for all layers of the kind

    @property
    def linear_maps(self) -> tuple:
        """Names of the tensors that are linear maps."""
        return tuple(row.name for row in self.tensors if row.linear)
