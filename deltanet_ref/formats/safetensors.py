"""safetensors files and HF's sharded directories of them: a lazily read mapping of arrays, and writing."""
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from deltanet_ref.errors import InputError
from deltanet_ref.formats.files import atomic_write

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
          "U8": "u1", "BOOL": "?"}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class StoredTensor(NamedTuple):
    """Where one tensor lies."""
    dtype: str              # safetensors' name
    shape: tuple
    raw: np.ndarray         # (nbytes,) uint8, a read-only view of the file


class SafeTensors(Mapping):
    """name -> array, read when asked for; BF16 comes as float32, everything else in its own dtype."""

    def __init__(self, stored, metadata):
        self._stored, self.metadata = stored, metadata

    def __getitem__(self, name):
        stored = self._stored[name]
        if stored.dtype not in DTYPES:
            raise InputError(f"the tensor {name!r} has the type {stored.dtype}, which is not read: convert it to BF16")
        values = stored.raw.view(DTYPES[stored.dtype]).reshape(stored.shape)
        if stored.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def __iter__(self):
        return iter(self._stored)

    def __len__(self):
        return len(self._stored)

    def shape(self, name):
        return self._stored[name].shape


def read_safetensors(path):
    """Opens a .safetensors file, or an HF directory (one file, or shards with an index) -> SafeTensors.

    Raises InputError for files that are missing, damaged or disagree with the index.
    """
    path = Path(path)
    if not path.is_dir():
        return SafeTensors(*_open(path))
    if not (path / INDEX).exists():
        return SafeTensors(*_open(path / SINGLE))
    try:
        weight_map = json.loads((path / INDEX).read_text("utf-8"))["weight_map"]
        shards = {name: _open(path / Path(name).name)[0] for name in sorted(set(weight_map.values()))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{path / INDEX}: is no safetensors index: fetch it again") from e
    missing = sorted(name for name, shard in weight_map.items() if name not in shards[shard])
    if missing:
        raise InputError(f"{path}: tensors that the index names are in no shard: {', '.join(missing)}")
    return SafeTensors({name: shards[shard][name] for name, shard in weight_map.items()}, {})


def _open(path):
    """The tensors and metadata of one file. The library checks the header; for BF16 the views are ours."""
    try:
        with safe_open(path, "numpy") as f:
            metadata = f.metadata() or {}
        data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    except SafetensorError as e:
        raise InputError(f"{path}: is no safetensors file ({e}): fetch or convert it again") from e
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or 'no such file'}") from e
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    stored = {name: StoredTensor(t["dtype"], tuple(t["shape"]), data[start:][slice(*t["data_offsets"])])
              for name, t in header.items()}
    return stored, metadata


def write_safetensors(path, tensors, metadata=None):
    """Writes name -> array, to a temporary name that is renamed when it is whole. metadata: str -> str, or None."""
    with atomic_write(path) as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, temporary, metadata)
