"""A step as one CUDA graph: captured when its shape comes a second time, launched from then on.

A graph replays kernels with the same arguments. What differs between steps of one shape are numbers that come from the
host, through Device.upload. While a step is recorded, each upload is one of two kinds: of an input of the step (an
array that the caller names, or what a function makes of it), which goes to a buffer that is filled again before every
launch; or a constant of the shape, which is uploaded once and kept. To make sure that nothing else depends on the
inputs, the captured run, in which no kernel is executed, sees other numbers in them: an upload that differs then, or an
allocation of another size, raises NotRepeatable.

Arrays of the step lie in an arena (arena.py).
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import numpy as np

from deltanet_ref.backends.cuda.arena import Arena, NotRepeatable, plan, recording
from deltanet_ref.backends.cuda.device import on_host
from deltanet_ref.backends.packed import PackedArrays


class Input(NamedTuple):
    """An upload that is made before every launch."""

    name: str
    make: Callable | None  # of the input, as Device.upload takes it
    shape: tuple  # of the input, as it was given
    array: object  # on the device


class Uploads:
    """Takes the place of Device.upload in a step. Uploads are numbered; the captured run must repeat the recorded ones.

    inputs: name -> NumPy array, overwritten in place between the runs
    """

    def __init__(self, device, inputs: dict):
        self.device, self.inputs = device, inputs
        self.allocator = device.xp.cuda.get_allocator()  # uploads do not lie in the arena
        self.made, self.capturing, self._next = [], False, 0  # made: (Input or None, host array, array of the device)

    def capture(self):
        """The recorded run has ended, the captured one begins."""
        self.capturing, self._next = True, 0

    def __call__(self, host, dtype=None, make=None):
        """Device.upload."""
        name = next((name for name, array in self.inputs.items() if _is_view_of(host, array)), None)
        value = on_host(host, dtype, make)
        number, self._next = self._next, self._next + 1
        if not self.capturing:
            with self.device.xp.cuda.using_allocator(self.allocator):
                array = self.device.xp.asarray(value)
            self.made.append((name and Input(name, make, host.shape, array), value, array))
            return array
        found, before, array = self.made[number] if number < len(self.made) else (None, None, None)
        same = array is not None and before.shape == value.shape and before.dtype == value.dtype
        if not same or (found and found.name) != name or name is None and not _equal(before, value):
            raise NotRepeatable(
                f"upload {number} of the step ({value.dtype} {value.shape}) is not an input and depends on one: "
                "the step cannot become a graph"
            )
        return array

    def fill(self):
        """Upload the inputs again."""
        for found, value, array in self.made:
            if found:
                array.set(on_host(self.inputs[found.name].reshape(found.shape), value.dtype, found.make))


def _is_view_of(x, whole):
    """Whether x is all of an array in the same order, perhaps in another shape."""
    return (
        isinstance(x, np.ndarray)
        and x.flags.c_contiguous
        and (x.dtype, x.size, x.ctypes.data) == (whole.dtype, whole.size, whole.ctypes.data)
    )


def _equal(a, b):
    return a.tobytes() == b.tobytes()


class Graph:
    """One step of one shape, ready to launch."""

    def __init__(self, device, inputs: dict, other: dict, step: Callable, memory: Callable):
        """Records the step and captures it on the current stream, where it must have run before: it may not compile,
        load libraries, or decode weights any more.

        other   other inputs of the same shape
        step    (**inputs) -> tuples and lists of device arrays, and of dicts of arrays, which become PackedArrays
        memory  size -> MemoryPointer, which may be in use by other graphs
        """
        self.inputs = {name: np.array(array, order="C") for name, array in inputs.items()}
        self._uploads = Uploads(device, self.inputs)
        with device.uploading(self._uploads), recording(device.xp) as recorder:
            results = _packed(device.xp, step(**self.inputs))
        self.plan = plan(recorder.allocations)  # the results live on
        del results
        self._arena = Arena(device.xp, self.plan, memory(self.plan.size))
        self._set(other)
        self._uploads.capture()
        stream = device.xp.cuda.get_current_stream()
        with device.uploading(self._uploads), self._arena.handing_out():
            stream.begin_capture()
            try:
                self._results = _packed(device.xp, step(**self.inputs))
            finally:  # a stream that still captures could not be used any more
                self._graph = stream.end_capture()

    def launch(self, inputs: dict):
        """The results for these inputs: copies, since the next launch overwrites the arena."""
        self._set(inputs)
        self._uploads.fill()
        self.replay()
        return _copied(self._results)

    def _set(self, inputs):
        for name, array in inputs.items():
            self.inputs[name][...] = array

    def replay(self):
        """Do the work once more, with the inputs as they are; the results stay in the arena."""
        self._graph.launch()


def _packed(xp, x):
    """The same with each dict of arrays packed: to copy it takes one launch."""
    if isinstance(x, dict):
        return PackedArrays.of(xp, x)
    return type(x)(_packed(xp, value) for value in x) if isinstance(x, tuple | list) else x


def _copied(x):
    if isinstance(x, tuple | list):
        return type(x)(map(_copied, x))
    return x.copy() if hasattr(x, "copy") else x


class Steps:
    """Runs steps: of each shape the first as it is, the others as a graph.

    All graphs share one block of memory, since only one runs at a time and its results are copied. A shape that needs a
    larger block replaces it, and the other graphs are captured again when their shapes come next.

    most  shapes that are remembered; the one that was not used for the longest time goes first
    """

    def __init__(self, device, graphs: bool = True, most: int = 8):
        """graphs=False: every step is run as it is, for debugging."""
        self.device, self.graphs, self.most = device, graphs, most
        self._stream = device.xp.cuda.Stream(non_blocking=True) if graphs else None
        self._shapes: dict[Hashable, Graph | str | None] = {}  # None: seen once. str: why it cannot be a graph
        self._memory, self._size = None, 0

    @property
    def refused(self) -> list[str]:
        """Why steps of some shapes are run as they are."""
        return [found for found in self._shapes.values() if isinstance(found, str)]

    def run(self, key, inputs, other, step):
        """run_step of the interface."""
        if not self.graphs:
            return step(**inputs)
        self.device.xp.cuda.get_current_stream().synchronize()  # what the step reads has been computed
        with self._stream:
            results = self._run(key, inputs, other, step)
            self._stream.synchronize()
        return results

    def _block(self, size):
        """MemoryPointer of at least this size, shared by all graphs."""
        if size > self._size:
            for key, found in self._shapes.items():
                self._shapes[key] = None if isinstance(found, Graph) else found
            self._memory, self._size = None, 0  # freed before the new one is allocated, which may fail
            self._memory, self._size = self.device.xp.cuda.alloc(size), size
        return self._memory

    def _run(self, key, inputs, other, step):
        new = key not in self._shapes
        found = self._shapes.pop(key, None)
        if found is None and not new:
            try:
                found = Graph(self.device, inputs, other, step, self._block)
            except NotRepeatable as error:
                found = str(error)
        self._shapes[key] = found
        while len(self._shapes) > self.most:
            del self._shapes[next(iter(self._shapes))]
        return found.launch(inputs) if isinstance(found, Graph) else step(**inputs)
