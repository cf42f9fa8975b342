"""The memory of a step, planned: one block that holds every array of it, those that never exist together in one place.

A captured graph keeps addresses, so its arrays must stay where they are: they lie in an arena that lives as long as the
graph. record() runs the step once and notes when each allocation begins and ends; plan() gives each a place; the step
that is captured then makes the same allocations in the same order, and Arena hands out the places.

    with recording(xp) as recorder: step()          allocations, in order
    arena = Arena(xp, plan(recorder.allocations))
    with arena.handing_out(): step()                the same step, in the arena
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

ALIGNMENT = 512  # of every array, as in CuPy's pool


class NotRepeatable(RuntimeError):
    """A step does something that depends on its inputs and not only on its shape."""


class Allocation(NamedTuple):
    """Bytes that were needed from one moment to another; moments count allocations and frees."""

    size: int
    begin: int
    end: int | None = None  # None: they still are


class Plan(NamedTuple):
    """Where each allocation lies, and the size of the whole."""

    allocations: tuple[Allocation, ...]
    offsets: tuple[int, ...]
    size: int


class Recorder:
    """Notes the allocations of a step, which come from the allocator in use so far."""

    def __init__(self, xp):
        self.allocations: list[Allocation] = []
        self._base, self._moment, self._live = xp.cuda.get_allocator(), 0, {}
        self._open = True

    def malloc(self, size, device):
        """Address of new bytes."""
        pointer = self._base(size)
        self._live[pointer.ptr] = len(self.allocations), pointer
        self.allocations.append(Allocation(size, self._tick()))
        return pointer.ptr

    def free(self, ptr, device):
        """The bytes are not needed any more."""
        number, _ = self._live.pop(ptr)
        if self._open:  # what outlives the step has no end
            self.allocations[number] = self.allocations[number]._replace(end=self._tick())

    def close(self):
        """The step has ended."""
        self._open = False

    def _tick(self):
        self._moment += 1
        return self._moment


@contextmanager
def recording(xp) -> Iterator[Recorder]:
    """A Recorder of all allocations in this thread inside the with block."""
    recorder = Recorder(xp)
    try:
        with xp.cuda.using_allocator(xp.cuda.PythonFunctionAllocator(recorder.malloc, recorder.free).malloc):
            yield recorder
    finally:
        recorder.close()


def plan(allocations: Sequence[Allocation]) -> Plan:
    """Give the largest the lowest place first, then each the lowest that is free while it is needed.

    Greedy by size: Pisarchyk and Lee 2020, "Efficient Memory Management for Deep Neural Net Inference". No plan is
    smaller than peak(allocations).
    """
    n = len(allocations)
    sizes = np.array([-(-a.size // ALIGNMENT) * ALIGNMENT for a in allocations], np.int64)
    begin = np.array([a.begin for a in allocations], np.int64)
    end = np.array([np.iinfo(np.int64).max if a.end is None else a.end for a in allocations], np.int64)
    offsets, placed = np.zeros(n, np.int64), np.zeros(n, bool)
    for i in np.argsort(-sizes, kind="stable"):
        others = np.flatnonzero(placed & (begin < end[i]) & (end > begin[i]))
        others = others[np.argsort(offsets[others], kind="stable")]
        place = 0
        for j in others:
            if offsets[j] >= place + sizes[i]:
                break
            place = max(place, offsets[j] + sizes[j])
        offsets[i], placed[i] = place, True
    size = int((offsets + sizes).max(initial=0))
    return Plan(tuple(allocations), tuple(offsets.tolist()), size)


def peak(allocations: Sequence[Allocation]) -> int:
    """The most bytes that are needed at one moment, each allocation rounded up to ALIGNMENT."""
    changes = []
    for a in allocations:
        size = -(-a.size // ALIGNMENT) * ALIGNMENT
        changes += [(a.begin, size), *([(a.end, -size)] if a.end is not None else [])]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


class Arena:
    """A block of memory with the places of a plan."""

    def __init__(self, xp, plan: Plan, memory=None):
        """memory: a MemoryPointer with at least plan.size bytes behind it; new memory if None."""
        self.xp, self.plan = xp, plan
        self.memory = xp.cuda.alloc(max(plan.size, 1)) if memory is None else memory
        self._next = 0

    @contextmanager
    def handing_out(self) -> Iterator[None]:
        """Allocations inside the with block, which must be those of the plan in their order, get their places."""
        self._next = 0
        allocator = self.xp.cuda.PythonFunctionAllocator(self._malloc, lambda ptr, device: None)
        with self.xp.cuda.using_allocator(allocator.malloc):
            yield
        if self._next != len(self.plan.offsets):
            raise NotRepeatable(f"the step made {self._next} allocations, {len(self.plan.offsets)} were planned")

    def _malloc(self, size, device):
        number, self._next = self._next, self._next + 1
        planned = self.plan.allocations[number].size if number < len(self.plan.allocations) else None
        if size != planned:
            raise NotRepeatable(f"allocation {number} of the step is of {size} bytes, {planned} were planned")
        return self.memory.ptr + self.plan.offsets[number]
