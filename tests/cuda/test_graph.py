"""Arenas and graphs of steps: a plan never overlaps, a graph computes what the step computes, and nothing that depends
on the inputs can be baked into it."""

from types import SimpleNamespace

import numpy as np
import pytest

from deltanet_ref.backends.cuda import arena, stand_in as cp
from deltanet_ref.backends.cuda.arena import Allocation, Arena, peak, plan, recording
from deltanet_ref.backends.cuda.device import Device
from deltanet_ref.backends.cuda.graph import Graph, Steps


@pytest.fixture
def device():
    return Device(cp)


def random_allocations(seed, n=200):
    rng = np.random.default_rng(seed)
    begin = np.sort(rng.choice(4 * n, n, replace=False))
    return [
        Allocation(int(rng.integers(0, 10**5)), int(b), None if rng.random() < 0.1 else int(b + rng.integers(1, 200)))
        for b in begin
    ]


def together(a, b):
    return (a.end is None or b.begin < a.end) and (b.end is None or a.begin < b.end)


@pytest.mark.parametrize("seed", range(3))
def test_no_two_arrays_of_a_plan_overlap_while_both_are_needed(seed):
    planned = plan(random_allocations(seed))
    places = list(zip(planned.allocations, planned.offsets, strict=True))
    for i, (a, at_a) in enumerate(places):
        assert at_a % arena.ALIGNMENT == 0 and at_a + a.size <= planned.size
        for b, at_b in places[:i]:
            assert not together(a, b) or at_a + a.size <= at_b or at_b + b.size <= at_a or not a.size * b.size
    assert peak(planned.allocations) <= planned.size <= 1.25 * peak(planned.allocations)


def test_a_plan_of_nested_and_of_consecutive_arrays_is_tight():
    nested = [Allocation(512, 1, 6), Allocation(1024, 2, 5), Allocation(100, 3, 4)]
    consecutive = [Allocation(512, 1, 2), Allocation(1000, 3, 4), Allocation(512, 5)]
    assert plan(nested).size == peak(nested) == 2048
    assert plan(consecutive).size == peak(consecutive) == 1024
    assert plan([]).size == 0


def test_an_arena_refuses_a_step_that_is_not_the_planned_one(device):
    def step(n):
        first = device.empty(n, np.float32)
        return first, device.empty(3, np.float32)

    with recording(cp) as recorder:
        kept = step(5)
    assert [a.size for a in recorder.allocations] == [20, 12] and recorder.allocations[0].end is None
    del kept
    planned = Arena(cp, plan(recorder.allocations))
    with planned.handing_out():
        first, second = step(5)
    assert second.data.ptr - first.data.ptr in (512, -512)
    with pytest.raises(RuntimeError, match="24 bytes, 20 were planned"), planned.handing_out():
        step(6)
    with pytest.raises(RuntimeError, match="1 allocations, 2 were planned"), planned.handing_out():
        device.empty(5, np.float32)


WEIGHTS = np.random.default_rng(1).standard_normal((10, 4)).astype(np.float32)
CONSTANT = np.arange(4, dtype=np.float32)


def kept(device, tokens, labels):
    return device.upload(labels, np.float32, make=lambda labels: labels[labels >= 0])


def make_step(device, weights, read=kept):
    """A step with products, temporaries and elementwise work on tokens (T,) and labels (T,)."""

    def step(tokens, labels):
        x = device.matmul(device.upload(tokens, np.float32).reshape(-1, 1), device.upload(CONSTANT).reshape(1, -1))
        h = device.matmul(x, weights, transpose_b=True)
        h = h * 2.0 + 1.0
        return h.sum(), {"h": h, "x": x + 1.0, "kept": read(device, tokens, labels) * 3.0}

    return step


def inputs(seed, T=6):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 50, T)
    labels[[1, 4]] = -100
    return dict(tokens=rng.integers(0, 50, T), labels=labels)


def test_a_graph_computes_what_the_step_computes(device):
    weights, steps = device.upload(WEIGHTS), Steps(device)
    step, kept = make_step(device, weights), []
    for seed in range(4):
        want = step(**inputs(seed))
        loss, grads = steps.run("shape", inputs(seed), inputs(99), step)
        assert float(loss) == float(want[0])
        for name in want[1]:
            np.testing.assert_array_equal(grads[name].get(), want[1][name].get(), err_msg=name)
        kept.append((grads["h"], want[1]["h"].get()))
    for grads, want in kept:  # results are the caller's: later launches do not change them
        np.testing.assert_array_equal(grads.get(), want)
    assert isinstance(steps._shapes["shape"], Graph)
    weights *= 2.0  # in place: the graph reads the new values
    want = step(**inputs(9))[1]["h"].get()
    np.testing.assert_array_equal(steps.run("shape", inputs(9), inputs(99), step)[1]["h"].get(), want)


@pytest.mark.parametrize(
    "read",
    [
        lambda device, tokens, labels: device.upload(labels[labels >= 0], np.float32),
        lambda device, tokens, labels: device.upload(np.unique(tokens, return_inverse=True)[1], np.float32),
        lambda device, tokens, labels: device.upload(tokens + 1, np.float32),
        lambda device, tokens, labels: device.empty(int(tokens[0]) + 1, np.float32),
    ],
    ids=["chosen labels", "index of tokens", "computed", "size"],
)
def test_what_depends_on_the_inputs_in_another_way_does_not_become_a_graph(device, read):
    """It is run as it is, its numbers stay right, and the reason is kept."""
    steps, step = Steps(device), make_step(device, device.upload(WEIGHTS), read)
    for seed in (0, 1, 2):
        want = step(**inputs(seed))[1]["h"].get()
        np.testing.assert_array_equal(steps.run("shape", inputs(seed), inputs(99), step)[1]["h"].get(), want)
    assert steps.refused == [steps._shapes["shape"]]


def test_a_failing_capture_leaves_the_stream_usable(device):
    steps, weights, calls = Steps(device), device.upload(WEIGHTS), []

    def failing(tokens, labels):
        calls.append(tokens)
        result = make_step(device, weights)(tokens, labels)
        if len(calls) == 3:
            result[0].get()  # allowed in the first two runs, refused in the capture
        return result

    steps.run("a", inputs(0), inputs(99), failing)
    with pytest.raises(cp.CaptureError):
        steps.run("a", inputs(1), inputs(99), failing)
    assert not steps._stream.is_capturing() and device._uploads is None
    assert float(steps.run("b", inputs(2), inputs(99), make_step(device, weights))[0])


def test_without_graphs_the_step_is_called_each_time(device):
    steps, calls = Steps(device, graphs=False), []
    step = SimpleNamespace(run=lambda **arrays: calls.append(arrays))
    for seed in range(3):
        steps.run("shape", inputs(seed), None, step.run)
    assert len(calls) == 3


def test_only_the_most_recent_graphs_are_kept(device):
    steps, step = Steps(device, most=2), make_step(device, device.upload(WEIGHTS))
    for T in (5, 6, 7, 5):
        for _ in range(2):
            steps.run(T, inputs(0, T), inputs(99, T), step)
    assert list(steps._shapes) == [7, 5]


def test_a_shape_that_needs_more_memory_replaces_the_block_of_all(device):
    """The graphs in the old block are captured again: their numbers stay right."""
    steps, step = Steps(device), make_step(device, device.upload(WEIGHTS))
    for T in (6, 600, 6, 6, 600):
        for _ in range(2):
            want = step(**inputs(T, T))[1]["h"].get()
            np.testing.assert_array_equal(steps.run(T, inputs(T, T), inputs(99, T), step)[1]["h"].get(), want)
    assert steps._shapes[6]._arena.memory is steps._shapes[600]._arena.memory


def test_a_block_that_cannot_be_had_leaves_later_steps_whole(device, monkeypatch):
    steps, step = Steps(device), make_step(device, device.upload(WEIGHTS))
    for _ in range(2):
        steps.run(6, inputs(6, 6), inputs(99, 6), step)
    steps.run(600, inputs(0, 600), inputs(99, 600), step)
    with monkeypatch.context() as patch:
        patch.setattr(cp.cuda, "alloc", lambda size: (_ for _ in ()).throw(cp.OutOfMemoryError("no")))
        with pytest.raises(cp.OutOfMemoryError):
            steps.run(600, inputs(0, 600), inputs(99, 600), step)
    for T in (6, 7, 6, 7):  # both have their places in one block again
        want = step(**inputs(T, T))[1]["h"].get()
        np.testing.assert_array_equal(steps.run(T, inputs(T, T), inputs(99, T), step)[1]["h"].get(), want)
    assert steps._memory is not None and steps._size >= steps._shapes[7].plan.size
