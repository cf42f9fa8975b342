"""The model's tensors by GGUF name: stored as in the file, brought to the model's dtype when used."""
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type

from deltanet_ref.errors import InputError
from deltanet_ref.formats import quants
from deltanet_ref.model.tensors import expected_tensors

MODES = ("auto", "mapped", "expanded")
SHARE = 0.5                   # of the available memory that tensors may take which "auto" keeps decoded


class Weights(Mapping):
    """GGUF name -> array of the model's dtype, in network order.

    A stored tensor is a GGUFTensor (its bytes stay in the file's map, quantised) or a dense array. Dense arrays, and
    float32 tensors in a float32 model, come without a copy: do not write into them, replace them by w[name] = array.

    mode     "mapped": a tensor is decoded at each use. "expanded": once, when it is first needed as a whole, and kept in
             the model's dtype. "auto": mapped where the decoder is fast, which costs 2 % of a pass over many tokens;
             the others expanded, if together they take at most SHARE of the available memory
    decoder  what decodes: formats.quants, or a backend with a dequantize of its own and with `decodes`, which tells the
             types that are fast
    """

    def __init__(self, config, stored, dtype, mode="mapped", decoder=quants):
        self.dtype = np.dtype(dtype)
        self._shapes = {name: spec.shape for name, spec in expected_tensors(config).items()}
        self._stored, self._decoder = {name: self._plain(tensor) for name, tensor in stored.items()}, decoder
        self._kept = dict.fromkeys(self._to_keep(mode))          # name -> array, None until it is needed

    def _plain(self, tensor):
        """A tensor that is stored in the model's dtype as an array, the others as they are."""
        dense = isinstance(tensor, np.ndarray)
        if not dense and tensor.type in quants.PLAIN and quants.PLAIN[tensor.type] == self.dtype:
            return quants.dequantize(tensor.raw, tensor.type, tensor.shape, self.dtype)
        return tensor

    def _to_keep(self, mode):
        if mode not in MODES:
            raise InputError(f"weights={mode!r} is unknown: use {', '.join(map(repr, MODES))}")
        stored = [name for name, tensor in self._stored.items() if not isinstance(tensor, np.ndarray)]
        if mode == "expanded":
            return stored
        slow = [name for name in stored if mode == "auto" and not self._decodes(name)]
        size = sum(math.prod(self.shape(name)) for name in slow) * self.dtype.itemsize
        return slow if size <= SHARE * available_memory() else []

    def _decodes(self, name):
        tensor = self._stored[name]
        return hasattr(self._decoder, "decodes") and self._decoder.decodes(tensor.type, tensor.shape)

    def __getitem__(self, name):
        tensor = self._stored[name]
        if isinstance(tensor, np.ndarray):
            return tensor
        if name not in self._kept:
            return self._decode(tensor.raw, tensor.type, tensor.shape)
        if self._kept[name] is None:
            self._kept[name] = self._decode(tensor.raw, tensor.type, tensor.shape)
        return self._kept[name]

    def rows(self, name, ids):
        """w[name][ids], (n, D) for int ids (n,) or a slice: only these rows are decoded, or, of what is kept, with a slice
        all."""
        tensor = self._stored[name]
        if isinstance(tensor, np.ndarray) or name in self._kept and isinstance(ids, slice):
            return self[name][ids]
        raw = quants.rows(tensor.raw, tensor.type, tensor.shape, ids)
        count = len(range(*ids.indices(tensor.shape[0]))) if isinstance(ids, slice) else len(ids)
        return self._decode(raw, tensor.type, (count, *tensor.shape[1:]))

    def _decode(self, raw, type, shape):
        return self._decoder.dequantize(raw, type, shape, self.dtype)

    def linear_forward(self, ops, names, x):
        """y = x w^T for several tensors w: x (..., in) -> list of y (..., out).

        A backend that multiplies stored tensors does so, all of names in one go: with few rows of x always, otherwise
        where w is not kept.
        """
        few = x.size <= getattr(ops, "FEW", 0) * x.shape[-1]
        as_stored = [name for name in names if self._multiplied_as_stored(ops, name) and (few or name not in self._kept)]
        results = {}
        if as_stored:
            products = ops.stored_linear_forward(x, [self._stored[name] for name in as_stored])
            results = dict(zip(as_stored, products))
        return [results[name] if name in results else ops.linear_forward(x, self[name]) for name in names]

    def linear_backward_input(self, ops, name, dy):
        """dx = dy w: dy (..., out) -> dx (..., in)."""
        if name not in self._kept and self._multiplied_as_stored(ops, name):
            return ops.stored_linear_backward_input(dy, self._stored[name])
        return ops.linear_backward_input(dy, self[name])

    def _multiplied_as_stored(self, ops, name):
        tensor = self._stored[name]
        return (not isinstance(tensor, np.ndarray) and self.dtype == np.float32 and hasattr(ops, "stored_linear_forward")
                and ops.decodes(tensor.type, tensor.shape))

    def __setitem__(self, name, array):
        array = np.asarray(array, self.dtype)
        if array.shape != self.shape(name):
            raise InputError(f"{name} is {self.shape(name)}, it cannot be replaced by an array of {array.shape}")
        self._stored[name] = array

    def shape(self, name):
        """The tensor's shape, rows first; nothing is decoded."""
        return self._shapes[name]

    def stored_type(self, name):
        """The type in which the tensor is kept, a gguf.GGMLQuantizationType."""
        tensor = self._stored[name]
        if isinstance(tensor, np.ndarray):
            return Type.F64 if tensor.dtype == np.float64 else Type.F32
        return tensor.type

    def __contains__(self, name):
        return name in self._shapes

    def __iter__(self):
        return iter(self._shapes)

    def __len__(self):
        return len(self._shapes)


def available_memory():
    """Bytes that can be taken without swapping: what Linux estimates, elsewhere half of all memory."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
