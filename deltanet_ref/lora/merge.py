"""A base model with adapters merged in: W + sum of scale (alpha / r) B A, written tensor by tensor."""

from functools import partial
from pathlib import Path

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.lora.adapter import open_adapter
from deltanet_ref.model.convert import Written, check_output, open_base, write_base


def merge(base: Path | str, adapters: list[tuple], output: Path | str, type: str | None = None) -> list[Written]:
    """Writes base + adapters to a GGUF file (output ends in .gguf) or a new HF directory.

    base      a GGUF file or an HF directory
    adapters  list of (GGUF adapter or PEFT directory, scale)
    type      one of model.convert.CHOICES; None keeps each tensor's type, and copies tensors that no adapter changes
    returns   a Written for each tensor that was re-encoded with a loss
    raises    InputError before anything is written: files that do not match, types that cannot be written, and
              activated LoRAs, which do not act on what precedes their invocation
    """
    base = open_base(base)
    opened = [(open_adapter(path, base.config), scale) for path, scale in adapters]
    for (path, _), (adapter, _) in zip(adapters, opened):
        if "invocation_tokens" in adapter.metadata:
            raise InputError(
                f"{path}: is an activated LoRA, which acts only from its invocation tokens on and cannot "
                "be merged: attach it at run time"
            )
    targets = dict.fromkeys(target for adapter, _ in opened for target in adapter.targets)
    changes = {target: partial(merged, target=target, adapters=opened) for target in targets}
    check_output(base, output, type, changes)
    return write_base(base, output, type, changes)


def merged(w: np.ndarray, *, target: str, adapters: list[tuple]) -> np.ndarray:
    """W + sum of scale (alpha / r) B A in float64, for w (out, in), the tensor `target`; adapters: (Adapter, scale)."""
    w = w.astype(np.float64)
    for adapter, scale in adapters:
        if target in adapter.targets:
            a, b = (adapter.tensors[f"{target}.lora_{factor}"].astype(np.float64) for factor in "ab")
            w += scale * adapter.scale(target) * b @ a
    return w
