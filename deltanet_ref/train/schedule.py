"""Learning rate schedules."""

import math
from collections.abc import Callable

from deltanet_ref.errors import InputError, shown

SHAPES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def schedule(shape: str, lr: float, steps: int, warmup: int = 0, final: float = 0.0) -> Callable[[int], float]:
    """step -> learning rate, for steps 1 .. steps.

    Linear warmup: step s <= warmup has lr s / warmup. Then decay along SHAPES[shape] from lr towards final lr, which
    step steps + 1 would have. Raises InputError for an unknown shape.
    """
    if shape not in SHAPES:
        raise InputError(f"the schedule {shown(shape)} is unknown: use one of {', '.join(SHAPES)}")

    def learning_rate(step):
        if step <= warmup:
            return lr * step / warmup
        progress = (step - 1 - warmup) / max(steps - warmup, 1)
        return lr * (final + (1.0 - final) * SHAPES[shape](progress))

    return learning_rate
