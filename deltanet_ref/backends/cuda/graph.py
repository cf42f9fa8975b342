"""A step as one CUDA graph: captured when its shape comes a second time, launched from then on.

A graph replays kernels with the same arguments. What differs between steps of one shape are numbers that come from the
host, through Device.upload. While a step is recorded, each upload is one of two kinds: of an input of the step (an
array that the caller names, or some rows of it), which goes to a buffer that is filled again before every launch; or a
constant of the shape (positions, boundaries of sequences), which is uploaded once and kept. To make sure that nothing
else depends on the inputs, the captured run, in which no kernel is executed, sees other numbers in them: an upload that
differs then, or an allocation of another size, raises NotRepeatable.

Arrays of the step lie in an arena (arena.py).
"""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import numpy as np

from deltanet_ref.backends.cuda.arena import Arena, NotRepeatable, plan, recording


class Input(NamedTuple):
    """An upload that is made before every launch."""

    name: str
    take: object  # index of the rows, or None
    shape: tuple
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

    def __call__(self, host, dtype=None, take=None):
        """Device.upload."""
        name = next((name for name, array in self.inputs.items() if _is_view_of(host, array)), None)
        value = np.array(host if take is None else host[take], dtype, order="C")
        number, self._next = self._next, self._next + 1
        if not self.capturing:
            with self.device.xp.cuda.using_allocator(self.allocator):
                array = self.device.xp.asarray(value)
            self.made.append((name and Input(name, take, host.shape, array), value, array))
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
                host = self.inputs[found.name].reshape(found.shape)
                array.set(np.array(host if found.take is None else host[found.take], value.dtype, order="C"))


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

    def __init__(self, device, inputs: dict, step: Callable, memory: Callable):
        """Records the step and captures it on the current stream, where it must have run before: it may not compile,
        load libraries, or decode weights any more.

        step    (**inputs) -> tuples, lists and dicts of device arrays
        memory  size -> MemoryPointer, which may be in use by other graphs
        """
        self.inputs = {name: np.array(array, order="C") for name, array in inputs.items()}
        self._uploads = Uploads(device, self.inputs)
        with device.uploading(self._uploads), recording(device.xp) as recorder:
            results = step(**self.inputs)
        self.plan = plan(recorder.allocations)  # the results live on
        del results
        self._arena = Arena(device.xp, self.plan, memory(self.plan.size))
        for array in self.inputs.values():
            _disturb(array)
        self._uploads.capture()
        stream = device.xp.cuda.get_current_stream()
        with device.uploading(self._uploads), self._arena.handing_out():
            stream.begin_capture()
            try:
                self._results = step(**self.inputs)
            finally:  # a stream that still captures could not be used any more
                self._graph = stream.end_capture()

    def launch(self, inputs: dict):
        """The results for these inputs: copies, since the next launch overwrites the arena."""
        for name, array in inputs.items():
            self.inputs[name][...] = array
        self._uploads.fill()
        self._graph.launch()
        return _copied(self._results)


def _disturb(array):
    """Other numbers of the same shape: in reverse order. Negative ones (ignored labels) keep their places."""
    kept = array >= 0
    array[kept] = array[kept][::-1]


def _copied(x):
    if isinstance(x, dict):
        return {name: _copied(value) for name, value in x.items()}
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

    def run(self, key, inputs, step):
        """step(**inputs). key: everything besides the numbers in inputs that the step depends on, their shapes too."""
        if not self.graphs:
            return step(**inputs)
        self.device.xp.cuda.get_current_stream().synchronize()  # what the step reads has been computed
        with self._stream:
            results = self._run(key, inputs, step)
            self._stream.synchronize()
        return results

    def _block(self, size):
        """MemoryPointer of at least this size, shared by all graphs."""
        if size > self._size:
            for key, found in self._shapes.items():
                self._shapes[key] = None if isinstance(found, Graph) else found
            self._memory = None  # freed before the new one is allocated
            self._memory, self._size = self.device.xp.cuda.alloc(size), size
        return self._memory

    def _run(self, key, inputs, step):
        new = key not in self._shapes
        found = self._shapes.pop(key, None)
        if found is None and not new:
            try:
                found = Graph(self.device, inputs, step, self._block)
            except NotRepeatable as error:
                found = str(error)
        self._shapes[key] = found
        while len(self._shapes) > self.most:
            del self._shapes[next(iter(self._shapes))]
        return found.launch(inputs) if isinstance(found, Graph) else step(**inputs)
