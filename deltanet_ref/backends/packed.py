"""Arrays that lie in one: what is done to all of them takes one launch on a GPU."""

import math
from collections.abc import Mapping

ALIGNED = 4  # elements: views of float32 start at multiples of 16 bytes


class PackedArrays(dict):
    """name -> view of `whole`, a 1-D array: the arrays one after the other, each filled up with zeros to ALIGNED.

    layout  ((name, shape), ...): two of the same layout have every element at the same place
    """

    def __init__(self, whole, layout: tuple):
        super().__init__()
        self.whole, self.layout, start = whole, layout, 0
        for name, shape in layout:
            self[name] = whole[start : start + math.prod(shape)].reshape(shape)
            start += _room(shape)

    @classmethod
    def zeros(cls, xp, layout: tuple, dtype) -> "PackedArrays":
        """Arrays of zeros."""
        return cls(xp.zeros(sum(_room(shape) for _, shape in layout), dtype), layout)

    @classmethod
    def of(cls, xp, arrays: Mapping) -> "PackedArrays":
        """Copies of arrays of one dtype; itself if it is a PackedArrays already."""
        if isinstance(arrays, cls):
            return arrays
        layout = tuple((name, tuple(x.shape)) for name, x in arrays.items())
        packed = cls.zeros(xp, layout, next(iter(arrays.values())).dtype)
        for name, x in arrays.items():
            packed[name][...] = x
        return packed

    def copy(self) -> "PackedArrays":
        """The same in other memory."""
        return PackedArrays(self.whole.copy(), self.layout)


def _room(shape):
    return -(-math.prod(shape) // ALIGNED) * ALIGNED
