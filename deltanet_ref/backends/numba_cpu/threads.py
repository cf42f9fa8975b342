"""The threads of the kernels: Python's own, each running compiled code without the interpreter lock.

Measured against numba's parallel loops (OpenMP), this compiles in less than half the time, survives a fork, and lets a
fast core take more tasks than a slow one. A helper starts in 5 to 20 us (OpenMP: 1 us while it spins, 50 us from
sleep). Nobody spins: a thread without work sleeps on a lock, so two busy processes next to it cost it its share of the
cores and no more.

Work is cut by its size and never by the number of threads, and tasks never add to the same sum: results do not depend
on which thread computes what.
"""
import os
from collections.abc import Callable
from queue import SimpleQueue
from threading import Lock, Thread
from typing import NamedTuple

from numba import config

from deltanet_ref.backends.cores import available_cores

PARTS = 8                     # of a thread's share of the tasks; it takes one at a time

number_of_threads = config.NUMBA_NUM_THREADS if "NUMBA_NUM_THREADS" in os.environ else available_cores()


def set_threads(n: int) -> int:
    """Run kernels on n threads from now on, more than there are cores if n says so. Returns the number until now."""
    global number_of_threads
    before, number_of_threads = number_of_threads, n
    return before


class Work(NamedTuple):
    """Tasks 0 .. tasks - 1 of a kernel with its arguments."""
    tasks: int
    run: Callable             # (first, last, *args) does tasks first .. last - 1
    args: list


def run_together(works: list) -> None:
    """Do every task of every Work, on this thread and on helpers as they become free. Raises what a task raised."""
    tasks = sum(work.tasks for work in works)
    step = max(1, tasks // (PARTS * number_of_threads))
    parts = [(work.run, first, min(first + step, work.tasks), work.args)
             for work in works for first in range(0, work.tasks, step)]
    wanted = min(number_of_threads, len(parts)) - 1
    left = iter(parts)                             # next() on it is atomic
    helping, errors = [], []                       # a lock for each helper that has begun, held until it is done

    def take_parts():
        for run, first, last, args in left:
            run(first, last, *args)

    def help():
        done = Lock()
        done.acquire()
        helping.append(done)                       # before it takes a part: one that begins late finds none
        try:
            take_parts()
        except BaseException as error:
            errors.append(error)
        finally:
            done.release()

    if wanted > 0:
        helpers.ask(help, wanted)
    take_parts()
    for done in helping:
        done.acquire()
    if errors:
        raise errors[0]


class Helpers:
    """Threads that wait for jobs. A ThreadPoolExecutor takes twice as long to start them."""

    def __init__(self):
        self.jobs, self.threads, self.starting = SimpleQueue(), 0, Lock()

    def ask(self, job, times):
        """Have job() called on `times` threads, without waiting for it."""
        with self.starting:
            for _ in range(times - self.threads):
                Thread(target=self._work, name="kernel", daemon=True).start()
                self.threads += 1
        for _ in range(times):
            self.jobs.put(job)

    def _work(self):
        while True:
            self.jobs.get()()


helpers = Helpers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=helpers.__init__)       # a forked child has none of the threads
