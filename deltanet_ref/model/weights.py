"""The model's tensors by GGUF name: stored as in the file, brought to the model's dtype when used."""
from collections.abc import Mapping

import numpy as np
from gguf import GGMLQuantizationType as Type

from deltanet_ref.errors import InputError
from deltanet_ref.formats import quants
from deltanet_ref.model.tensors import expected_tensors


class Weights(Mapping):
    """GGUF name -> array of the model's dtype, in network order.

    A stored tensor is a GGUFTensor (its bytes stay in the file's map, quantised, and are decoded at each use) or a
    dense array. Dense arrays, and float32 tensors in a float32 model, come without a copy: do not write into them,
    replace them by w[name] = array.
    """

    def __init__(self, config, stored, dtype):
        self.dtype = np.dtype(dtype)
        self._shapes = {name: spec.shape for name, spec in expected_tensors(config).items()}
        self._stored = stored

    def __getitem__(self, name):
        tensor = self._stored[name]
        if isinstance(tensor, np.ndarray):
            return tensor
        return quants.dequantize(tensor.raw, tensor.type, tensor.shape, self.dtype)

    def rows(self, name, ids):
        """w[name][ids], (n, D) for int ids (n,): of a quantised table only these rows are decoded."""
        tensor = self._stored[name]
        if isinstance(tensor, np.ndarray):
            return tensor[ids]
        raw = quants.rows(tensor.raw, tensor.type, tensor.shape, ids)
        return quants.dequantize(raw, tensor.type, (len(ids), *tensor.shape[1:]), self.dtype)

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
