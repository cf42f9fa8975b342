"""HF's Qwen3.5 in float64 throughout, by its torch code alone.

`model.double()` is not float64: HF casts to float32 in the norms, the gates, rotary positions, softmax, the delta rule
and the loss. Here the installed source of transformers is loaded once more with each of these casts made float64, and
without the decorator that would put FLA's or causal_conv1d's kernels in the place of its torch functions.
"""

import importlib.util
import re
import sys
import types
from unittest import mock

import transformers.integrations


def _in_float64(name):
    """The installed module `name` as a new module in which every cast to float32 is one to float64."""
    spec = importlib.util.find_spec(name)
    source, casts = re.subn(r"\.float\(\)|torch\.float(32)?\b", _widened, spec.loader.get_source(name))
    assert casts, f"{name} holds no cast to float32: transformers has changed, so must this module"
    module = types.ModuleType(name + "_float64")
    module.__file__, module.__package__ = spec.origin, spec.parent
    sys.modules[module.__name__] = module  # transformers looks its classes up there
    exec(compile(source, spec.origin, "exec"), module.__dict__)
    return module


def _widened(cast):
    return ".double()" if cast[0] == ".float()" else "torch.float64"


def _torch_only(name, package, internal_path=None):
    return lambda torch_function: torch_function


with mock.patch.object(transformers.integrations, "use_kernel_func_from_hub_with_fallback", _torch_only):
    modeling = _in_float64("transformers.models.qwen3_5.modeling_qwen3_5")
loss = _in_float64("transformers.loss.loss_utils")


class Qwen3_5ForCausalLM(modeling.Qwen3_5ForCausalLM):
    """HF's model: float64 parameters, eager attention, float64 loss. Text only."""

    def __init__(self, config):
        config._attn_implementation = "eager"
        super().__init__(config)
        self.double()
        self.loss_function = loss.ForCausalLMLoss
