"""Cases and answers as files, for implementations in any language: safetensors, npz, or GGUF.

An input file holds a case's inputs by name, numbers such as scale as arrays (1,) of float64. An answer file holds
outputs, and gradients and intermediates where there are some, under the kit's names.
"""
import zipfile
from pathlib import Path

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.formats.files import atomic_write
from deltanet_ref.formats.gguf import read_gguf, write_gguf
from deltanet_ref.formats.quants import dequantize
from deltanet_ref.formats.safetensors import read_safetensors, write_safetensors


def _write_npz(path, arrays):
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _read_npz(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: is no npz file of plain arrays: {error}") from error


def _write_gguf(path, arrays):
    """Integers as I64; ggml has four axes at most and so have the cases."""
    write_gguf(path, {"general.architecture": "deltanet_ref-case"}, arrays)


def _read_gguf(path):
    file = read_gguf(path)
    return {name: dequantize(t.raw, t.type, t.shape, np.float64 if t.type.name == "F64" else np.float32)
            for name, t in file.tensors.items()}


FORMATS = {
    "safetensors": (write_safetensors, lambda path: dict(read_safetensors(path))),
    "npz": (_write_npz, _read_npz),
    "gguf": (_write_gguf, _read_gguf),
}


def write_case(path, inputs):
    """Write the inputs of a case, name -> array or number; None and tuples of numbers become absent and arrays."""
    arrays = {name: np.atleast_1d(np.asarray(value)) for name, value in inputs.items() if value is not None}
    FORMATS[Path(path).suffix[1:]][0](path, arrays)


def read_answers(path):
    """name -> array. Raises InputError when the file is damaged or not there."""
    return FORMATS[Path(path).suffix[1:]][1](path)
