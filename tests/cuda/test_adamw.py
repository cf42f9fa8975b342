"""AdamW at once on packed arrays: the same numbers as array by array, whatever the order, clipping or padding."""

import math

import numpy as np
import pytest

from deltanet_ref.backends import get_backend
from deltanet_ref.backends.packed import PackedArrays
from deltanet_ref.train.adamw import AdamW

SHAPES = {"a": (3, 5), "b": (7,), "c": (4, 2), "d": (1, 301)}
STEPS = 3
# 12 roundings of float32 of numbers that are of the size of p (an update is at most lr), in STEPS steps
LIMIT = 12 * STEPS * 2.0**-24


@pytest.fixture(scope="module")
def emulated(device):
    return get_backend("cuda-emulated")


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("limit", [None, 1.0, 1e3])
def test_steps_equal_those_of_the_definition(emulated, limit):
    want = {name: p.astype(np.float64) for name, p in arrays(0).items()}
    got = {name: emulated.xp.asarray(p) for name, p in arrays(0).items()}
    reference, optimizer = AdamW(weight_decay=0.1), AdamW(weight_decay=0.1, backend=emulated)
    for step in range(STEPS):
        gradients = arrays(step + 1)
        norm = reference.step(want, {name: g.astype(np.float64) for name, g in gradients.items()}, 0.1, limit)
        given = {name: emulated.xp.asarray(gradients[name]) for name in ("c", "a", "d", "b")}
        if step == 1:  # as a captured step returns them, in another order
            given = PackedArrays.of(emulated.xp, {name: given[name] for name in "dbca"})
        assert abs(optimizer.step(got, given, 0.1, limit) / norm - 1) < 400 * 2.0**-24  # a sum of 331 squares
    assert list(got) == list(SHAPES)
    for name in SHAPES:
        error = np.abs(emulated.to_host(got[name]) - want[name]).max()
        assert error < LIMIT * np.abs(want[name]).max(), f"{name}: error {error:.3g}"


def test_parameters_that_were_replaced_are_updated_and_moments_go_on(emulated):
    parameters = {name: emulated.xp.asarray(p) for name, p in arrays(0).items()}
    optimizer = AdamW(backend=emulated)
    gradients = {name: emulated.xp.asarray(g) for name, g in arrays(1).items()}
    optimizer.step(parameters, gradients, 0.1)
    moments = {name: emulated.to_host(m) for name, m in optimizer.m.items()}
    parameters["b"] = emulated.xp.asarray(np.full(7, 5, np.float32))
    optimizer.step(parameters, {name: emulated.xp.zeros(s, np.float32) for name, s in SHAPES.items()}, 0.1)
    # m after a gradient of zero is 0.9 m, and the update follows it
    sign = -np.sign(moments["b"])
    assert (np.sign(emulated.to_host(parameters["b"]) - 5) == sign).all()
    assert np.abs(emulated.to_host(optimizer.m["b"]) - 0.9 * moments["b"]).max() < 1e-7


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(emulated, bad):
    parameters = {name: emulated.xp.asarray(p) for name, p in arrays(0).items()}
    optimizer = AdamW(weight_decay=0.1, backend=emulated)
    gradients = arrays(1)
    gradients["d"][0, 300] = bad
    norm = optimizer.step(parameters, {name: emulated.xp.asarray(g) for name, g in gradients.items()}, 0.1, 1.0)
    assert not math.isfinite(norm) and optimizer.t == 0
    for name, p in arrays(0).items():
        np.testing.assert_array_equal(emulated.to_host(parameters[name]), p)
        assert not emulated.to_host(optimizer.m[name]).any() and not emulated.to_host(optimizer.v[name]).any()


def test_packed_arrays_start_at_accesses_of_16_bytes_and_keep_zeros_between(emulated):
    packed = PackedArrays.of(emulated.xp, {name: emulated.xp.asarray(p) for name, p in arrays(0).items()})
    assert all(x.data.ptr % 16 == 0 for x in packed.values())
    total = sum(float(np.square(p, dtype=np.float64).sum()) for p in arrays(0).values())
    assert abs(float(np.square(packed.whole.get(), dtype=np.float64).sum()) - total) < 1e-12 * total
    copy = packed.copy()
    copy["a"][...] = 0
    np.testing.assert_array_equal(packed["a"].get(), arrays(0)["a"])
