import math
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from deltanet_ref.errors import InputError
from deltanet_ref.train.adamw import AdamW
from deltanet_ref.train.loop import Diverged, EvalRecord, TrainRecord, fit

RNG = np.random.default_rng(5)
TARGETS = RNG.normal(size=(64, 3))


def batch(*rows):
    """Rows of TARGETS, as a batch with that many kept tokens, in twice as many tokens."""
    return SimpleNamespace(rows=list(rows), kept=len(rows), tokens=np.zeros((1, 2 * len(rows))))


class Quadratic:
    """loss = mean over the batch's rows of |w - target|^2 / 2, with the gradient by hand."""

    def __init__(self):
        self.parameters = {"w": np.zeros(3)}

    def __call__(self, batch):
        difference = self.parameters["w"] - TARGETS[batch.rows]
        return 0.5 * (difference**2).sum(1).mean(), {"w": difference.mean(0)}


def run(batches, steps, loss_and_grads=None, **options):
    problem = Quadratic()
    history = fit(
        problem.parameters,
        loss_and_grads or problem,
        batches,
        steps=steps,
        optimizer=AdamW(),
        schedule=lambda step: 0.1 / step,
        **options,
    )
    return problem.parameters["w"], history


def test_accumulated_micro_batches_equal_one_batch_of_all_their_tokens():
    whole, history = run([batch(*range(9)), batch(*range(20, 33))], steps=2)
    micro = [batch(0), batch(1, 2, 3, 4, 5), batch(6, 7, 8), batch(*range(20, 29)), batch(29, 30), batch(31, 32)]
    parts, accumulated = run(micro, steps=2, accumulation=3)
    np.testing.assert_allclose(parts, whole, rtol=1e-13)
    assert accumulated.losses == pytest.approx(history.losses, rel=1e-13)
    assert accumulated.trained_tokens == 22 and accumulated.tokens == 44


def test_loss_falls_to_the_minimum():
    problem = Quadratic()
    everything = [batch(*range(64))] * 300
    fit(problem.parameters, problem, everything, steps=300, optimizer=AdamW(), schedule=lambda step: 0.3 / step)
    np.testing.assert_allclose(problem.parameters["w"], TARGETS.mean(0), atol=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run_and_changes_nothing(bad, where):
    problem, seen, saves = Quadratic(), [], []

    def explodes(batch):
        loss, gradients = problem(batch)
        seen.append(problem.parameters["w"].copy())
        if len(seen) == 3:
            if where == "loss":
                loss = bad
            else:
                gradients["w"][1] = bad
        return loss, gradients

    with pytest.raises(Diverged, match="iteration 3.*lower the learning rate"):
        fit(
            problem.parameters,
            explodes,
            [batch(1, 2)] * 5,
            steps=5,
            optimizer=AdamW(),
            schedule=lambda step: 0.1,
            save=lambda: saves.append(1),
            save_every=3,
        )
    assert np.array_equal(problem.parameters["w"], seen[-1]) and not saves


def test_first_interrupt_lets_the_step_end_and_the_second_does_not():
    before = signal.getsignal(signal.SIGINT)
    problem = Quadratic()

    def interrupts_in_the_middle(batch):
        signal.raise_signal(signal.SIGINT)
        return problem(batch)

    history = fit(
        problem.parameters,
        interrupts_in_the_middle,
        [batch(1)] * 5,
        steps=5,
        optimizer=AdamW(),
        schedule=lambda step: 0.1,
        log_every=100,
    )
    assert history.interrupted and len(history.losses) == 1
    assert np.all(problem.parameters["w"] != 0)  # the update was made
    with pytest.raises(KeyboardInterrupt):
        fit(
            problem.parameters,
            lambda b: [interrupts_in_the_middle(b) for _ in range(2)][0],
            [batch(1)] * 5,
            steps=5,
            optimizer=AdamW(),
            schedule=lambda step: 0.1,
        )
    assert signal.getsignal(signal.SIGINT) is before


def test_fit_runs_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(run([batch(1)], steps=1)[1]))
    thread.start()
    thread.join()
    assert len(results[0].losses) == 1


def test_records_cover_every_iteration_once_and_weight_losses_by_tokens():
    records, losses = [], iter([3.0, 1.0, 2.0, 4.0, 0.0])
    batches = [batch(*range(n)) for n in (1, 3, 2, 2, 4)]
    run(batches, 5, lambda b: (next(losses), {"w": np.zeros(3)}), log_every=2, on_log=records.append)
    assert [type(r) for r in records] == [TrainRecord] * 3
    assert [(r.iteration, r.loss, r.trained_tokens) for r in records] == [(2, 1.5, 4), (4, 3.0, 8), (5, 0.0, 12)]
    assert [r.learning_rate for r in records] == [0.1 / 2, 0.1 / 4, 0.1 / 5]
    # 8 tokens in 2 iterations
    assert records[0].tokens_per_second == pytest.approx(records[0].iterations_per_second * 4)


def test_validation_comes_first_then_regularly_and_last_and_saves_come_between():
    order = []
    run(
        [batch(1)] * 8,
        8,
        evaluate=lambda: order.append("val") or 0.5,
        eval_every=3,
        save=lambda: order.append("save"),
        save_every=2,
        on_step=lambda iteration, loss: order.append(iteration),
        log_every=100,
    )
    assert order == ["val", 1, 2, "save", 3, "val", 4, "save", 5, 6, "val", "save", 7, 8, "val"]


def test_validations_are_recorded():
    records = []
    _, history = run([batch(1)] * 2, 2, evaluate=lambda: 0.25, on_log=records.append)
    assert history.evaluations == [r for r in records if isinstance(r, EvalRecord)]
    assert [(r.iteration, r.loss) for r in history.evaluations] == [(1, 0.25), (2, 0.25)]


def test_batches_that_run_out_are_reported():
    with pytest.raises(InputError, match="iteration 3: the batches ran out"):
        run([batch(1)] * 2, steps=3)
