"""The training loop, for any arrays and any function that returns their loss and gradients."""

import itertools
import math
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from deltanet_ref.errors import InputError
from deltanet_ref.train.memory import peak_memory


class Diverged(ArithmeticError):
    """The loss or a gradient is no longer finite. The step that found this changed nothing."""


class TrainRecord(NamedTuple):
    """Measurements since the previous record."""

    iteration: int
    loss: float  # mean over the trained tokens of these iterations
    learning_rate: float  # of the last iteration
    iterations_per_second: float
    tokens_per_second: float  # all tokens that went through the model, trained or not
    trained_tokens: int  # since the start
    peak_memory: int  # bytes, since train.memory.start_phase


class EvalRecord(NamedTuple):
    """A validation. At iteration 1 it is before the update, at all others after it."""

    iteration: int
    loss: float
    seconds: float


@dataclass
class History:
    """The outcome of fit."""

    losses: list = field(default_factory=list)  # of every iteration, before its update
    evaluations: list = field(default_factory=list)  # EvalRecord
    tokens: int = 0  # all tokens that went through the model
    trained_tokens: int = 0  # tokens with a label
    seconds: float = 0.0  # in training steps, without validation
    interrupted: bool = False  # by Ctrl-C


def fit(
    parameters: dict,
    loss_and_grads,
    batches,
    *,
    steps: int,
    optimizer,
    schedule,
    clip: float | None = None,
    accumulation: int = 1,
    evaluate=None,
    eval_every: int = 0,
    log_every: int = 10,
    on_log=None,
    on_step=None,
    save=None,
    save_every: int = 0,
) -> History:
    """Minimise the loss: in each step draw batches, compute the mean gradient, clip it and update the parameters.

    parameters      name -> array, updated in place
    loss_and_grads  batch -> (mean loss over the batch.kept trained tokens, name -> its gradient, fresh arrays)
    batches         iterable of Batch with at least steps * accumulation items
    optimizer       has .step(parameters, gradients, learning rate, clip), as AdamW
    schedule        step (1 .. steps) -> learning rate
    clip            maximum global gradient norm, or None
    accumulation    batches per step; the mean is over all their trained tokens, as if they were one batch
    evaluate        () -> validation loss; called before the first step, every eval_every steps (never if 0), at the end
    on_log          called with each EvalRecord, and with a TrainRecord every log_every steps and at the end
    on_step         called after each step with (iteration, loss)
    save            called every save_every steps (never if 0); the caller saves the final result
    returns         History; interrupted is True if Ctrl-C ended training after a whole step (a second Ctrl-C interrupts
                    at once)

    Raises Diverged when the loss or the gradient is not finite; that step changes no parameter and saves nothing.
    """
    history, batches = History(), iter(batches)
    emit = on_log or (lambda record: None)

    def validate(iteration):
        start = time.perf_counter()
        record = EvalRecord(iteration, evaluate(), time.perf_counter() - start)
        history.evaluations.append(record)
        emit(record)

    if evaluate and steps:
        validate(1)
    window = _Window()
    with _stop_after_step() as stop, np.errstate(over="ignore", invalid="ignore"):  # checked below, so no warning
        for iteration in range(1, steps + 1):
            start = time.perf_counter()
            micro = list(itertools.islice(batches, accumulation))
            loss, gradients = _mean_loss_and_grads(loss_and_grads, micro, iteration)
            learning_rate = schedule(iteration)
            if not math.isfinite(optimizer.step(parameters, gradients, learning_rate, clip)):
                raise Diverged(
                    f"the gradient is not finite at iteration {iteration} (loss {loss:.4g}): lower the learning rate"
                )
            del gradients  # otherwise they would be kept until those of the next step exist

            kept, tokens = sum(b.kept for b in micro), sum(b.tokens.size for b in micro)
            seconds = time.perf_counter() - start
            history.losses.append(loss)
            history.tokens += tokens
            history.trained_tokens += kept
            history.seconds += seconds
            window.add(loss, kept, tokens, seconds)
            last = iteration == steps or stop.requested
            if on_step:
                on_step(iteration, loss)
            if last or (log_every and iteration % log_every == 0):
                emit(window.record(iteration, learning_rate, history.trained_tokens))
                window = _Window()
            if evaluate and not stop.requested and (last or (eval_every and iteration % eval_every == 0)):
                validate(iteration)
            if save and save_every and iteration % save_every == 0 and not last:
                save()
            if stop.requested:
                history.interrupted = iteration < steps
                break
    return history


def _mean_loss_and_grads(loss_and_grads, micro, iteration):
    """Mean over the kept tokens of all micro-batches: sum_i (kept_i / kept) loss_i, and the gradients likewise."""
    kept = sum(batch.kept for batch in micro)
    if not kept:
        raise InputError(
            f"no trained token is left at iteration {iteration}: the batches ran out, or all their labels are ignored"
        )
    mean, total = 0.0, {}
    for batch in micro:
        loss, gradients = loss_and_grads(batch)
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at iteration {iteration}: lower the learning rate")
        if len(micro) == 1:
            return loss, gradients
        weight = batch.kept / kept
        mean += weight * float(loss)
        for name, gradient in gradients.items():
            gradient *= weight
            if name in total:
                total[name] += gradient
            else:
                total[name] = gradient
    return mean, total


class _Window:
    """Sums since the last record."""

    def __init__(self):
        self.iterations, self.loss, self.kept, self.tokens, self.seconds = 0, 0.0, 0, 0, 0.0

    def add(self, loss, kept, tokens, seconds):
        self.iterations += 1
        self.loss += loss * kept
        self.kept += kept
        self.tokens += tokens
        self.seconds += seconds

    def record(self, iteration, learning_rate, trained_tokens):
        return TrainRecord(
            iteration,
            self.loss / self.kept,
            learning_rate,
            self.iterations / self.seconds,
            self.tokens / self.seconds,
            trained_tokens,
            peak_memory(),
        )


class _Stop:
    requested = False


@contextmanager
def _stop_after_step():
    """Turn the first Ctrl-C into stop.requested, so that no update is left half done; the second interrupts at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield stop
        return

    def handler(signum, frame):
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
