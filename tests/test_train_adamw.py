import numpy as np
import pytest

from deltanet_ref import ops
from deltanet_ref.backends import numba_cpu
from deltanet_ref.errors import InputError
from deltanet_ref.train.adamw import AdamW, clip_by_global_norm
from deltanet_ref.train.schedule import schedule
from tests.paths import FIXTURES

TORCH = np.load(FIXTURES / "train" / "adamw.npz")
NAMES = ("a", "b")
STEPS = len(TORCH["learning_rates"])


@pytest.mark.parametrize("backend", [ops, numba_cpu])
def test_six_clipped_steps_equal_torch(backend):
    parameters = {name: TORCH[f"{name}/0"].copy() for name in NAMES}
    optimizer = AdamW(tuple(TORCH["betas"]), float(TORCH["eps"]), float(TORCH["weight_decay"]), backend=backend)
    for step in range(1, STEPS + 1):
        gradients = {name: TORCH[f"{name}/gradient/{step}"].copy() for name in NAMES}
        norm = clip_by_global_norm(gradients, float(TORCH["clip"]))
        assert norm == pytest.approx(float(TORCH[f"norm/{step}"]), rel=1e-14)
        optimizer.step(parameters, gradients, float(TORCH["learning_rates"][step - 1]))
        for name in NAMES:  # the same float64 operations in another order
            np.testing.assert_allclose(parameters[name], TORCH[f"{name}/{step}"], rtol=1e-13, atol=1e-14)


def test_update_is_in_place_and_keeps_float32():
    parameter = np.ones((2, 3), np.float32)
    optimizer = AdamW(weight_decay=0.1)
    optimizer.step({"w": parameter}, {"w": np.full((2, 3), 0.5)}, 0.01)
    assert optimizer.m["w"].dtype == optimizer.v["w"].dtype == parameter.dtype == np.float32
    # the first step of Adam is lr in the direction of the gradient, whatever its size
    np.testing.assert_allclose(parameter, (1 - 0.01 * 0.1) - 0.01, rtol=1e-6)


def test_only_chosen_arrays_decay():
    parameters = {"w": np.ones((2, 3)), "norm": np.ones(3)}
    optimizer = AdamW(weight_decay=0.5, decays=lambda name, array: array.ndim > 1)
    optimizer.step(parameters, {name: np.zeros_like(p) for name, p in parameters.items()}, 0.1)
    assert np.all(parameters["w"] == 1 - 0.1 * 0.5) and np.all(parameters["norm"] == 1)


def test_names_must_agree():
    with pytest.raises(InputError, match="only one has b"):
        AdamW().step({"a": np.ones(2)}, {"a": np.ones(2), "b": np.ones(2)}, 0.1)


def test_clipping_scales_to_the_limit_and_not_below_it():
    gradients = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    assert clip_by_global_norm(gradients, None) == clip_by_global_norm(gradients, 6.0) == 5.0
    assert gradients["a"][0] == 3.0
    clip_by_global_norm(gradients, 1.0)
    # up to torch's 1e-6 in the ratio
    assert np.hypot(gradients["a"][0], gradients["b"][0, 0]) == pytest.approx(1.0, abs=1e-6)


def test_schedule_warms_up_linearly_then_follows_its_shape():
    cosine = schedule("cosine", 0.4, steps=24, warmup=4)
    assert [cosine(s) for s in (1, 2, 4, 5)] == pytest.approx([0.1, 0.2, 0.4, 0.4])
    assert cosine(15) == pytest.approx(0.2)  # half way down
    assert 0 < cosine(24) < 0.01
    linear = schedule("linear", 0.4, steps=10)
    assert [linear(s) for s in (1, 6)] == pytest.approx([0.4, 0.2])
    assert {schedule("constant", 0.4, steps=10)(s) for s in range(1, 11)} == {0.4}
    assert schedule("cosine", 0.4, steps=8, final=0.25)(9) == pytest.approx(0.1)


def test_unknown_schedule_is_refused():
    with pytest.raises(InputError, match="constant, linear, cosine"):
        schedule("cubic", 0.1, 5)
