"""Cases and answers as files for implementations in any language: safetensors, npz or GGUF.

An input file holds the inputs of a case by name; numbers such as scale are float64 arrays of shape (1,). An answer file
holds outputs, and optionally gradients and intermediates, under the kit's names.
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
        raise InputError(f"{path}: not an npz file of plain arrays: {error}") from error


def _write_gguf(path, arrays):
    """Integers are stored as I64. ggml allows at most four axes; no case has more."""
    write_gguf(path, {"general.architecture": "deltanet_ref-case"}, arrays)


def _read_gguf(path):
    file = read_gguf(path)
    return {
        name: dequantize(t.raw, t.type, t.shape, np.float64 if t.type.name == "F64" else np.float32)
        for name, t in file.tensors.items()
    }


FORMATS = {
    "safetensors": (write_safetensors, lambda path: dict(read_safetensors(path))),
    "npz": (_write_npz, _read_npz),
    "gguf": (_write_gguf, _read_gguf),
}


def write_case(path: Path | str, inputs: dict) -> None:
    """Write arrays by name, in the format of the suffix. Numbers and tuples become arrays; None is left out."""
    arrays = {name: np.atleast_1d(np.asarray(value)) for name, value in inputs.items() if value is not None}
    FORMATS[Path(path).suffix[1:]][0](path, arrays)


def read_answers(path: Path | str) -> dict[str, np.ndarray]:
    """Read arrays by name, in the format of the suffix. Raises InputError for a damaged or missing file."""
    return FORMATS[Path(path).suffix[1:]][1](path)
