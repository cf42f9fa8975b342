"""Limits of the numeric tests, and assertions that name what failed, where, and by how much.

No limit is an error measured on one machine. Each is one of these, and the test says which:

  noise floor     how far float64 results move when every argument moves by up to half a unit in the last place of the
                  tested dtype, plus the rounding of the result. A computation in that dtype cannot be expected to do
                  better, so its error is judged in floors: `noise_floors` times a factor stated in the test. The floor
                  is a property of the function and its arguments, not of the processor.
  rounding(n)     n roundings in a row: at most n eps of the magnitudes that take part. For a sum of n terms the
                  magnitude is the sum of their absolute values (`rounding(n) * magnitude`).
  STORED[dtype]   half a unit in the last place, relative: what storing a number in that format may change.
"""

import numpy as np

STORED = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def half_ulp(dtype):
    """Relative error of one rounding to float32 or float64."""
    return STORED[np.dtype(dtype).name]


def rounding(n, dtype=np.float64):
    """Bound on the relative effect of n roundings in a row: n eps."""
    return n * float(np.finfo(dtype).eps)


def noise_floors(compute, arguments, dtype, draws=4):
    """The noise floor of each result, as a norm (absolute).

    compute    maps a list of float64 arrays to a list of float64 arrays
    arguments  the arrays that it is called with, as the tested computation gets them
    dtype      float32 or float64, that of the tested computation
    draws      random perturbations; the worst one counts

    The perturbation is that of float32 for either dtype, scaled afterwards: at half a unit of float64 the rounding of
    the float64 arithmetic itself would be measured.
    """
    rng, step = np.random.default_rng(0), half_ulp(np.float32)
    arguments = [np.asarray(x, np.float64) for x in arguments]
    exact = compute(arguments)
    moved = np.zeros(len(exact))
    for _ in range(draws):
        perturbed = compute([x * (1 + step * rng.uniform(-1, 1, x.shape)) for x in arguments])
        moved = np.maximum(moved, [np.linalg.norm(p - e) for p, e in zip(perturbed, exact, strict=True)])
    return half_ulp(dtype) * (moved / step + [np.linalg.norm(e) for e in exact])


def weight_floors(model, compute, dtype, draws=3):
    """Noise floors of compute(model), a list of arrays, when every weight of the float64 model moves."""
    weights = {name: model.weights[name] for name in model.weights}

    def with_weights(arrays):
        for name, x in zip(weights, arrays):
            model.weights[name] = x
        return compute(model)

    try:
        return noise_floors(with_weights, list(weights.values()), dtype, draws)
    finally:
        for name, x in weights.items():
            model.weights[name] = x


def relative(got, want):
    """Norm of the difference over the norm of want; infinite if got has a value that is not finite."""
    assert np.shape(got) == np.shape(want), f"shape {np.shape(got)}, expected {np.shape(want)}"
    if not np.isfinite(got).all():
        return np.inf
    return float(np.linalg.norm(np.subtract(got, want)) / max(np.linalg.norm(want), 1e-300))


def assert_close(name, got, want, limit):
    """The norm of got - want is below limit times the norm of want."""
    _same_shape(name, got, want)
    error = relative(got, want)
    assert error < limit, f"{name}: relative error {error:.3g}, limit {limit:.3g}; {_largest(got, want)}"


def assert_within(name, got, want, bound):
    """|got - want| <= bound for every element; bound broadcasts."""
    _same_shape(name, got, want)
    off = np.abs(np.subtract(got, want))
    bad = np.argwhere(~(off <= bound))
    if len(bad):
        worst = tuple(max(bad, key=lambda i: off[tuple(i)]))
        limit = np.broadcast_to(bound, off.shape)[worst]
        raise AssertionError(
            f"{name}: {len(bad)} of {off.size} values beyond their bound; "
            f"{_values(got, want, worst)}, off by {off[worst]:.3g}, bound {limit:.3g}"
        )


def assert_within_floors(names, got, exact, floors, factor):
    """Each result's error, as a norm, is at most factor noise floors. All results beyond it are listed."""
    failures = []
    for name, g, e, floor in zip(names, got, exact, floors, strict=True):
        _same_shape(name, g, e)
        error = np.linalg.norm(np.subtract(g, e)) if np.isfinite(g).all() else np.inf
        if not error <= factor * floor:
            failures.append(
                f"{name}: error of {error / floor if floor else np.inf:.3g} noise floors, limit {factor} "
                f"(error {error:.3g}, floor {floor:.3g}); {_largest(g, e)}"
            )
    assert not failures, "\n".join(failures)


def assert_identical(name, got, want):
    """The same dtype, shape and values (0 equals -0, NaN equals NaN)."""
    got, want = np.asarray(got), np.asarray(want)
    _same_shape(name, got, want)
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, expected {want.dtype}"
    bad = np.argwhere((got != want) & ~((got != got) & (want != want)))
    if len(bad):
        first = _values(got, want, tuple(bad[0]))
        raise AssertionError(f"{name}: {len(bad)} of {got.size} values differ; first: {first}; {_largest(got, want)}")


def _same_shape(name, got, want):
    assert np.shape(got) == np.shape(want), f"{name}: shape {np.shape(got)}, expected {np.shape(want)}"


def _values(got, want, index):
    place = f" at {[int(i) for i in index]}" if index else ""
    return f"got {np.asarray(got)[index]!r}, expected {np.asarray(want)[index]!r}{place}"


def _largest(got, want):
    """The largest difference in words: both values, their place, and units in the last place of got's dtype."""
    got, want = np.asarray(got), np.asarray(want)
    if not got.size or got.dtype.kind != "f":
        return f"{got.dtype} values"
    if not np.isfinite(got).all():
        return "not finite: " + _values(got, want, tuple(np.argwhere(~np.isfinite(got))[0]))
    off = np.abs(got - want)
    index = np.unravel_index(np.argmax(off), off.shape)
    unit = np.spacing(np.abs(want[index]).astype(got.dtype))
    return f"largest difference {off[index]:.3g} ({off[index] / unit:.3g} ulp): {_values(got, want, index)}"
