"""How all engines are timed: by the host's clock around many runs, the device synchronised before and after."""

import statistics
import time

import numpy as np

LIMITS = {"float32": 1e-5, "bfloat16": 4e-2}  # relative errors above which an engine is wrong and is not timed
ROUNDS = 7  # of a median
SECONDS = 0.05  # of one round
WARM_UP = 3  # steps before those that count


def median_seconds(run, synchronize) -> float:
    """Median seconds of run(), which only launches work."""
    run()
    once = seconds_of(run, synchronize, 1)
    n = max(1, int(SECONDS / once))
    return statistics.median(seconds_of(run, synchronize, n) for _ in range(ROUNDS))


def seconds_of(run, synchronize, n: int) -> float:
    """Seconds of one of n runs in a row."""
    synchronize()
    start = time.perf_counter()
    for _ in range(n):
        run()
    synchronize()
    return (time.perf_counter() - start) / n


def timed_steps(step, batches, synchronize) -> dict:
    """Training steps, one for each batch of tokens (sequences, length): seconds, tokens per second, losses."""
    losses, seconds = [], []
    for tokens in batches:
        synchronize()
        start = time.perf_counter()
        loss = step(tokens)
        synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
    median = statistics.median(seconds[WARM_UP:] or seconds)
    return dict(seconds=median, tokens_per_s=tokens.size / median, losses=losses, right=bool(np.isfinite(losses).all()))


def random_batches(vocabulary: int, sequences: int, length: int, steps: int) -> list:
    """The tokens of the steps, the same for every engine."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocabulary, (sequences, length)) for _ in range(steps)]
