"""Learning rates over the steps of a run."""
import math

from deltanet_ref.errors import InputError

SHAPES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def schedule(shape, lr, steps, warmup=0, final=0.0):
    """step -> learning rate, for steps 1 .. steps.

    Steps 1 .. warmup rise linearly to lr (step s has lr s / warmup); the rest falls from lr along SHAPES[shape]
    towards final lr, which the step after the last would reach. Raises InputError for an unknown shape.
    """
    if shape not in SHAPES:
        raise InputError(f"schedule {shape!r} is unknown: use one of {', '.join(SHAPES)}")

    def learning_rate(step):
        if step <= warmup:
            return lr * step / warmup
        progress = (step - 1 - warmup) / max(steps - warmup, 1)
        return lr * (final + (1.0 - final) * SHAPES[shape](progress))

    return learning_rate
