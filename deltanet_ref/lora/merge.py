"""A base model with adapters worked in: W + sum of scale (alpha / r) B A, written tensor by tensor."""
from functools import partial

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.lora.adapter import open_adapter
from deltanet_ref.model.convert import check_output, open_base, write_base


def merge(base, adapters, output, type=None):
    """Writes base + adapters to a GGUF file (output ends in .gguf) or a new HF directory.

    base      a GGUF file or an HF directory
    adapters  list of (GGUF adapter or PEFT directory, scale)
    type      of model.convert.CHOICES; None keeps the type of each tensor, and the bytes of all that no adapter changes
    returns   a model.convert.Written for each tensor that was encoded anew and lost something by it
    raises    InputError, before anything is written: files that do not fit, types that cannot be written, and activated
              LoRAs, which leave the base as it is before their invocation
    """
    base = open_base(base)
    opened = [(open_adapter(path, base.config), scale) for path, scale in adapters]
    for (path, _), (adapter, _) in zip(adapters, opened):
        if "invocation_tokens" in adapter.metadata:
            raise InputError(f"{path}: is an activated LoRA, which acts from its invocation tokens on only: it cannot "
                             "be merged")
    targets = dict.fromkeys(target for adapter, _ in opened for target in adapter.targets)
    changes = {target: partial(merged, target=target, adapters=opened) for target in targets}
    check_output(base, output, type, changes)
    return write_base(base, output, type, changes)


def merged(w, *, target, adapters):
    """W + sum of scale (alpha / r) B A in float64, for the tensor `target`. w (out, in); adapters: (Adapter, scale)s."""
    w = w.astype(np.float64)
    for adapter, scale in adapters:
        if target in adapter.targets:
            a, b = (adapter.tensors[f"{target}.lora_{factor}"].astype(np.float64) for factor in "ab")
            w += scale * adapter.scale(target) * b @ a
    return w
