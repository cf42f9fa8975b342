"""safetensors files and HF's sharded directories: a mapping of arrays that are read on access, and writing."""

import json
import math
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from deltanet_ref.errors import InputError, shown
from deltanet_ref.formats.files import atomic_write, parse_json, read_json, utf8

DTYPES = {
    "I64": "<i8",
    "F64": "<f8",
    "F32": "<f4",
    "I32": "<i4",
    "BF16": "<u2",
    "F16": "<f2",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}  # the library writes tensors in this order of their dtypes: all stay aligned
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items() if name != "BF16"}
MAX_DIMENSIONS = 8
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class StoredTensor(NamedTuple):
    """One tensor as stored."""

    dtype: str  # safetensors' name
    shape: tuple
    raw: np.ndarray  # (nbytes,) uint8, a read-only view of the file


class SafeTensors(Mapping):
    """name -> array, read on access: BF16 as float32, all else in its own dtype. metadata: the header's, str -> str."""

    def __init__(self, stored: dict, metadata: dict):
        self._stored, self.metadata = stored, metadata

    def __getitem__(self, name: str) -> np.ndarray:
        stored = self._stored[name]
        if stored.dtype not in DTYPES:
            raise InputError(f"the tensor {shown(name)} has the unsupported type {stored.dtype}: convert it to BF16")
        values = stored.raw.view(DTYPES[stored.dtype]).reshape(stored.shape)
        if stored.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def __iter__(self):
        return iter(self._stored)

    def __len__(self):
        return len(self._stored)

    def shape(self, name: str) -> tuple:
        """The tensor's shape, without reading it."""
        return self._stored[name].shape

    def stored(self, name: str) -> StoredTensor:
        """The tensor's bytes in the file, with their dtype and shape."""
        return self._stored[name]


def read_safetensors(path: Path | str) -> SafeTensors:
    """Opens a .safetensors file, or an HF directory with one file or with shards and an index.

    Raises InputError for files that are missing or damaged, or that contradict the index.
    """
    path = Path(path)
    if not path.is_dir():
        return SafeTensors(*_open(path))
    if not (path / INDEX).exists():
        return SafeTensors(*_open(path / SINGLE))
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{path / INDEX}: is not a safetensors index: fetch it again")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if not name.endswith(".safetensors") or "/" in name or "\\" in name]:
        raise InputError(
            f"{path / INDEX}: refers to {shown(outside[0])}, which is not a .safetensors file of this "
            "directory: fetch it again"
        )
    shards = {name: _open(path / name)[0] for name in names}
    missing = sorted(name for name, shard in weight_map.items() if name not in shards[shard])
    if missing:
        raise InputError(f"{path}: the shards lack tensors that the index lists: {', '.join(missing)}")
    return SafeTensors({name: shards[shard][name] for name, shard in weight_map.items()}, {})


def _open(path):
    """The tensors and metadata of one file. The library checks the header; the views are ours, as NumPy has no BF16."""
    try:
        with safe_open(path, "numpy") as f:
            metadata = f.metadata() or {}
        data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    except SafetensorError as e:
        raise InputError(f"{path}: is not a safetensors file ({e}): fetch or convert it again") from e
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror or 'no such file'}") from e
    start = 8 + int(data[:8].view("<u8")[0])
    header = parse_json(path, data[8:start].tobytes())
    header.pop("__metadata__", None)
    stored = {
        name: StoredTensor(t["dtype"], tuple(t["shape"]), data[start:][slice(*t["data_offsets"])])
        for name, t in header.items()
    }
    for name, (_, shape, _) in stored.items():
        if len(shape) > MAX_DIMENSIONS or math.prod(filter(None, shape)) > sys.maxsize // 8:  # what NumPy takes
            raise InputError(
                f"{path}: the tensor {shown(name)} has the shape {shown(shape)}: the file is damaged, "
                "fetch or convert it again"
            )
    return stored, metadata


def write_safetensors(path: Path | str, tensors: dict, metadata: dict | None = None) -> None:
    """Writes a .safetensors file, atomically.

    tensors: name -> array, or (raw, dtype, shape), as for BF16: dtype is safetensors' name, raw an array of the bytes
    or a function that returns one, called when the tensor is written. metadata: str -> str, or None.
    Layout (github.com/huggingface/safetensors): the length of the header, u64; the header, JSON; the tensors' data.
    """
    stored = {name: tensor if isinstance(tensor, tuple) else _stored(tensor) for name, tensor in tensors.items()}
    place = {dtype: i for i, dtype in enumerate(DTYPES)}
    stored = dict(sorted(stored.items(), key=lambda item: (place[item[1][1]], item[0])))
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, (_, dtype, shape) in stored.items():
        start, end = end, end + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = utf8(json.dumps(header, separators=(",", ":"), ensure_ascii=False))
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, (raw, _, _) in stored.items():
            f.write(np.ascontiguousarray(raw() if callable(raw) else raw))
            if f.tell() != 8 + len(text) + header[name]["data_offsets"][1]:
                raise ValueError(f"the bytes given for {name} do not match its dtype and shape")


def _stored(array):
    """An array as (raw, dtype, shape)."""
    array = np.asarray(array, order="C")  # ascontiguousarray would turn 0-D into 1-D
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return array.reshape(-1).view(np.uint8), NAMES[array.dtype], array.shape
