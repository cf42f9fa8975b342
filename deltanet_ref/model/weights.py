"""The model's tensors by GGUF name: stored as in the file, converted to the model's dtype when used."""
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type

from deltanet_ref.errors import InputError
from deltanet_ref.formats import quants
from deltanet_ref.formats.gguf import GGUFTensor
from deltanet_ref.model.tensors import expected_tensors, wide_dtype

UNQUANTISED = (*quants.PLAIN, Type.BF16)
MODES = ("auto", "mapped", "expanded")
SHARE = 0.5                   # of the available memory, for tensors that "auto" keeps decoded


class Weights(Mapping):
    """GGUF name -> array of the model's dtype, in network order.

    A bfloat16 model holds its matrices in bfloat16 and everything else (norms, convolutions, gates) in float32:
    wide_dtype, which is also that of adapters and of gradients of weights. In other models all have one dtype.

    A stored tensor is a GGUFTensor (its bytes stay in the file's map, quantised) or a dense array. Dense arrays, and
    float32 tensors in a float32 model, are returned without a copy: do not write into them, replace them by
    w[name] = array. A tensor with values that are not finite raises InputError when it is first used.

    stored   name -> GGUFTensor or array
    mode     "mapped": a tensor is decoded at each use. "expanded": once, when it is first needed as a whole, and kept
             in the model's dtype. "auto": mapped where the backend decodes the type fast, which costs 2 % of a pass
             over many tokens; the others expanded, if together they take at most SHARE of the available memory. On a
             device all are expanded, if they take at most SHARE of its free memory
    backend  backends.interface.Backend: where the arrays live and what multiplies them
    """

    def __init__(self, config, stored: Mapping, dtype, backend, mode: str = "mapped"):
        self.dtype, self.backend = np.dtype(dtype), backend
        self.wide_dtype = wide_dtype(dtype)
        expected = expected_tensors(config)
        self._shapes = {name: spec.shape for name, spec in expected.items()}
        self._dtypes = {name: self.dtype if spec.is_matrix else self.wide_dtype for name, spec in expected.items()}
        self._stored = {name: self._plain(name, tensor) for name, tensor in stored.items()}
        self._kept = dict.fromkeys(self._to_keep(mode))          # name -> array, None until it is needed
        self.version = 0                                         # counts replacements of tensors
        self._resident = {}                                      # name -> stored tensor where products read it
        self._checked = set()                                    # names of tensors known to be finite

    def _plain(self, name, tensor):
        """A dense tensor, or one stored in the dtype it is used in, as an array of the backend; others as they are."""
        dtype = self._dtypes[name]
        if isinstance(tensor, GGUFTensor):
            unchanged = tensor.type in quants.PLAIN and quants.PLAIN[tensor.type] == dtype
            copied = self.backend.device is not None and tensor.type in UNQUANTISED      # to the device in any case
            if not (unchanged or copied):
                return tensor
            tensor = quants.dequantize(tensor.raw, tensor.type, tensor.shape, self.wide_dtype)
        return self.backend.xp.asarray(tensor if dtype == self.wide_dtype else np.asarray(tensor).astype(dtype))

    def _to_keep(self, mode):
        if mode not in MODES:
            raise InputError(f"weights={mode!r} is unknown: use {', '.join(map(repr, MODES))}")
        stored = [name for name in self._stored if self._is_stored(name)]
        if mode == "expanded":
            return stored
        if mode == "mapped":
            return []
        slow = [name for name in stored if not self._decodes(name)]
        if self.backend.memory_of is None:
            return slow if self._size(slow) <= SHARE * available_memory() else []
        _, free = self.backend.memory_of(lambda: None)
        return next((names for names in (stored, slow) if self._size(names) <= SHARE * free), [])

    def _size(self, names):
        """Bytes of these tensors, decoded."""
        return sum(math.prod(self.shape(name)) for name in names) * self.dtype.itemsize

    def _is_stored(self, name):
        """Whether the tensor is kept in the bytes of a file, not as an array."""
        return isinstance(self._stored[name], GGUFTensor)

    def _decodes(self, name):
        """Whether the backend decodes a stored tensor itself."""
        tensor, stored = self._stored[name], self.backend.stored
        return stored is not None and stored.decodes(tensor.type, tensor.shape)

    def __getitem__(self, name):
        self._check(name)
        tensor = self._stored[name]
        if not self._is_stored(name):
            return tensor
        if name not in self._kept:
            return self._decode(name, tensor.raw, tensor.shape)
        if self._kept[name] is None:
            self._kept[name] = self._decode(name, tensor.raw, tensor.shape)
        return self._kept[name]

    def embedding_forward(self, name: str, tokens):
        """w[name][tokens]: tokens int (...) -> (..., D). Decodes only the rows that are used, or reads them where the
        tensor is kept as an array."""
        if not self._is_stored(name) or self._kept.get(name) is not None:
            return self.backend.embedding_forward(tokens, self[name])
        if self._decodes(name):
            self._check(name)
            return self.backend.stored.embedding_forward(tokens, self._on_backend(name), self.dtype)
        used, index = np.unique(tokens, return_inverse=True)
        return self.backend.embedding_forward(index.reshape(tokens.shape), self.rows(name, used))

    def rows(self, name: str, ids):
        """w[name][ids], (n, D) for int ids (n,) or a slice.

        Decodes only these rows; a slice of an expanded tensor decodes and keeps the whole tensor.
        """
        if not self._is_stored(name) or name in self._kept and isinstance(ids, slice):
            return self[name][ids]
        self._check(name)
        tensor = self._stored[name]
        if isinstance(ids, slice) and self._decodes(name):
            tensor = self._on_backend(name)                       # on a device they are not uploaded again
        raw = quants.rows(tensor.raw, tensor.type, tensor.shape, ids)
        count = len(range(*ids.indices(tensor.shape[0]))) if isinstance(ids, slice) else len(ids)
        return self._decode(name, raw, (count, *tensor.shape[1:]))

    def _decode(self, name, raw, shape):
        """An array from bytes of the stored tensor `name`: all of them, or some rows."""
        type, dtype = self._stored[name].type, self._dtypes[name]
        if self.backend.stored is not None:
            return self.backend.stored.dequantize(raw, type, shape, dtype)
        decoded = quants.dequantize(raw, type, shape, self.wide_dtype)
        return self.backend.xp.asarray(decoded.astype(dtype, copy=False))

    def _check(self, name):
        """Raise InputError, when the tensor is first used, if it holds NaN or infinity."""
        if name in self._checked:
            return
        tensor = self._stored[name]
        if not (quants.stored_finite(tensor.raw, tensor.type) if self._is_stored(name) else self._is_finite(tensor)):
            raise not_finite(name)
        self._checked.add(name)

    def _is_finite(self, array):
        """The sum first, which NaN and infinity reach; it can also overflow."""
        with np.errstate(over="ignore", invalid="ignore"):
            return bool(self.backend.xp.isfinite(array.sum())) or bool(self.backend.xp.isfinite(array).all())

    def linear_forward(self, names: list, x) -> list:
        """y = x w^T for several tensors w: x (..., in) -> list of y (..., out).

        A backend that multiplies stored tensors does so, all of names in one call: always with few rows of x, otherwise
        where w is not kept decoded.
        """
        ops = self.backend
        few = ops.stored is not None and x.size <= ops.stored.few_rows * x.shape[-1]
        as_stored = [name for name in names if self._multiplied_as_stored(name) and (few or name not in self._kept)]
        results = {}
        if as_stored:
            for name in as_stored:
                self._check(name)
            products = ops.stored.linear_forward(x, [self._on_backend(name) for name in as_stored])
            results = dict(zip(as_stored, products, strict=True))
        return [results[name] if name in results else ops.linear_forward(x, self[name]) for name in names]

    def linear_backward_input(self, name: str, dy):
        """dx = dy w: dy (..., out) -> dx (..., in)."""
        if name not in self._kept and self._multiplied_as_stored(name):
            return self.backend.stored.linear_backward_input(dy, self._on_backend(name))
        return self.backend.linear_backward_input(dy, self[name])

    def _on_backend(self, name):
        """A stored tensor with its bytes where the backend multiplies it."""
        if name not in self._resident:
            self._resident[name] = self.backend.stored.resident(self._stored[name])
        return self._resident[name]

    def _multiplied_as_stored(self, name):
        return self._is_stored(name) and self.wide_dtype == np.float32 and self._decodes(name)

    def __setitem__(self, name, array):
        array = self.backend.xp.asarray(array, self._dtypes[name])
        if array.shape != self.shape(name):
            raise InputError(f"{name} is {self.shape(name)}, it cannot be replaced by an array of {array.shape}")
        self._stored[name] = array
        self.version += 1

    def shape(self, name: str) -> tuple:
        """The tensor's shape, rows first; nothing is decoded."""
        return self._shapes[name]

    def stored_type(self, name: str) -> Type:
        """The type in which the tensor is kept."""
        if self._is_stored(name):
            return self._stored[name].type
        return {"float64": Type.F64, "bfloat16": Type.BF16}.get(self._stored[name].dtype.name, Type.F32)

    def __contains__(self, name):
        return name in self._shapes

    def __iter__(self):
        return iter(self._shapes)

    def __len__(self):
        return len(self._shapes)


def not_finite(name: str) -> InputError:
    """The error for a tensor with NaN or infinity in it."""
    return InputError(f"{name} holds values that are not finite (NaN or infinity): the file is damaged or its training "
                      "diverged; download or convert the model again")


def available_memory() -> int:
    """Bytes that can be allocated without swapping: Linux's estimate, elsewhere half of all memory."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
