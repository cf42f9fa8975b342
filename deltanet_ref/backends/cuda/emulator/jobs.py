"""Records launches and runs them again in processes of their own: under sanitizers, with a barrier switched off.

with recording() as launches:
    library.launch(...)
run(launches, "thread").findings            # races
run(launches, "address").findings           # bounds, alignment
switch_off_each(launches)                   # site -> what noticed that it was missing, or None
"""

import ctypes
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .build import HERE, KernelError, Library, Site, arguments, compile_source, host_program, read_sites, triple

SEEDS = (0, 1, 2, 3)  # orders of threads that a result must not depend on; 0 is the natural one
SECONDS = 120  # that a process may run

# The longest history: the first one of two accesses is seldom forgotten.
TSAN_OPTIONS = "exitcode=66:history_size=4:report_thread_leaks=0:atexit_sleep_ms=0"
# Not after the first report, where tasks with different sites switched off may lead to the same one.
TSAN_REPEATS = ":suppress_equal_stacks=0:suppress_equal_addresses=0"
ENVIRONMENT = {
    "ASAN_OPTIONS": "exitcode=66:detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


class Argument(NamedTuple):
    """An argument of a launch: an array, or a number.

    memory  index in Launch.memory; -1: a number, or a null pointer
    value   offset in that memory, or the bits of the number
    """

    memory: int
    value: int
    shape: tuple = ()
    dtype: np.dtype | None = None


class Launch(NamedTuple):
    """A launch with copies of the arrays as they were before it.

    memory  bytes; arrays that overlap share one
    shifts  address modulo 16 of each
    """

    library: Library
    name: str
    grid: tuple
    block: tuple
    shared_bytes: int
    memory: list[np.ndarray]
    shifts: list[int]
    args: list[Argument]


class Finding(NamedTuple):
    """What a sanitizer or the emulator reported.

    kind    "data race", "heap-buffer-overflow", "runtime error", "failed" (by the emulator), "crash", "timeout", ...
    file    of the kernel, where it is known, and line
    text    the report
    launch  its number
    """

    kind: str
    file: str
    line: int
    text: str
    launch: int


class Result(NamedTuple):
    """What became of launches.

    arrays  for each launch its arguments afterwards, None for numbers; None for a launch that did not end
    """

    findings: list[Finding]
    arrays: list[list[np.ndarray | None] | None]


# ---- recording


@contextmanager
def recording(recorders: list = Library.recorders) -> Iterator[list[Launch]]:
    """A list to which each launch inside the with block is added. Arguments must be arrays, not pointers.

    recorders  the list of functions that are told of launches: another class than Library may have its own
    """
    launches = []

    def record(library, name, grid, block, args, shared_bytes):
        launches.append(recorded(library, name, grid, block, args, shared_bytes))

    recorders.append(record)
    try:
        yield launches
    finally:
        recorders.remove(record)


def recorded(library: Library, name: str, grid, block, args, shared_bytes: int = 0) -> Launch:
    """A launch that is not run now."""
    for x in args:
        if isinstance(x, ctypes.c_void_p) and x.value:
            raise TypeError(f"a launch of {name} cannot be recorded: it was given a pointer, not an array")
    extents = sorted((x.ctypes.data, x.ctypes.data + x.nbytes) for x in args if isinstance(x, np.ndarray))
    merged = []
    for start, end in extents:
        if merged and (start < merged[-1][1] or start == merged[-1][0]):
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    memory = [np.frombuffer(ctypes.string_at(start, end - start), np.uint8) for start, end in merged]
    bound = []
    for x, value in zip(args, arguments(library.types(name), args, name)):
        if isinstance(x, np.ndarray):
            at = max(i for i, (start, _) in enumerate(merged) if start <= x.ctypes.data)
            bound.append(Argument(at, x.ctypes.data - merged[at][0], x.shape, x.dtype))
        else:
            bound.append(Argument(-1, int.from_bytes(bytes(value), "little")))
    shifts = [start % 16 for start, _ in merged]
    return Launch(library, name, triple(grid), triple(block), shared_bytes, memory, shifts, bound)


# ---- running


class Task(NamedTuple):
    """A launch to run. Of the tasks of a group, those after the first one that is not as expected are left out."""

    launch: Launch
    number: int  # of the launch
    off: Site | None = None
    seed: int = 0
    group: int | None = None
    expected: int = 0  # digest of the arrays; 0: any
    contents: bool = False  # return the memory


class Outcome(NamedTuple):
    """What became of a task."""

    state: str  # "expected", "another", "failed", "reported", "left out", "died"
    digest: int = 0
    seconds: float = 0.0
    message: str = ""
    sites: Sequence[Site] = ()
    memory: list[np.ndarray] | None = None


STATES = ("expected", "another", "failed", "reported", "left out")


def run(launches: Sequence[Launch], build: str = "plain", off: Site | None = None, seed: int = 0) -> Result:
    """Run launches, independent of each other, and collect what the build reports."""
    tasks = [Task(launch, i, off, seed, contents=True) for i, launch in enumerate(launches)]
    outcomes, findings = execute(tasks, build)
    return Result(findings, [_arrays(launch, outcome.memory) for launch, outcome in zip(launches, outcomes)])


def _arrays(launch, memory):
    """The arguments that are arrays, in the memory of a launch."""
    if memory is None:
        return None
    return [
        None
        if argument.memory < 0
        else np.ndarray(argument.shape, argument.dtype, memory[argument.memory], argument.value).copy()
        for argument in launch.args
    ]


def execute(tasks: Sequence[Task], build: str) -> tuple[list[Outcome], list[Finding]]:
    """Run tasks in one process, and in another one after each that ends the process."""
    paths = {id(task.launch.library): str(compile_source(task.launch.library.source, build).path) for task in tasks}
    outcomes, findings = [], []
    with tempfile.TemporaryDirectory() as directory:
        job, memory, results = (Path(directory, name) for name in ("job", "arrays", "results"))
        places = _write_arrays(memory, tasks)
        job.write_bytes(struct.pack("<I", len(tasks)) + b"".join(_encode(task, paths, places) for task in tasks))
        while len(outcomes) < len(tasks):
            results.write_bytes(b"")
            repeats = any(task.group is not None for task in tasks)
            status, errors = _process(host_program(build), [job, memory, results, len(outcomes)], repeats)
            done = len(outcomes)
            outcomes += _read_results(results.read_bytes(), tasks[done:])
            findings += _findings(errors, tasks)
            if len(outcomes) == len(tasks):
                break
            if f"emulator: task {len(outcomes)}\n" not in errors:  # not the kernel's fault
                raise KernelError(f"the emulator's process ended with status {status}: {errors[-1500:]}")
            task = tasks[len(outcomes)]
            if not any(finding.launch == task.number for finding in findings):
                findings.append(Finding(_death(status), "", 0, errors[-1500:], task.number))
            outcomes.append(Outcome("died", message=next(f.kind for f in findings[::-1] if f.launch == task.number)))
    findings += [
        Finding("failed", *_place(outcome.message), outcome.message, task.number)
        for task, outcome in zip(tasks, outcomes)
        if outcome.state == "failed"
    ]
    return outcomes, findings


def _process(program, args, repeats):
    """Exit status, or "timeout", and what the program printed."""
    environment = {**os.environ, **ENVIRONMENT, "TSAN_OPTIONS": TSAN_OPTIONS + TSAN_REPEATS * repeats}
    command = [str(program), *map(str, args)]
    if shutil.which("setarch"):  # ThreadSanitizer needs its addresses free
        command = ["setarch", "-R", *command]
    try:
        result = subprocess.run(command, capture_output=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired as timeout:
        return "timeout", (timeout.stderr or b"").decode(errors="replace")
    return result.returncode, result.stderr.decode(errors="replace")


def _write_arrays(path, tasks):
    """All arrays in one file: id of an array -> where."""
    places, at = {}, 0
    with open(path, "wb") as file:
        for task in tasks:
            for array in task.launch.memory:
                if id(array) not in places:
                    places[id(array)] = at
                    at += file.write(array.tobytes())
    return places


def _text(text):
    return struct.pack("<I", len(text.encode())) + text.encode()


def _encode(task, paths, places):
    launch = task.launch
    group = 2**32 - 1 if task.group is None else task.group
    flags = task.contents + 2 * (task.group is not None)
    parts = [struct.pack("<II", group, flags), _text(paths[id(launch.library)]), _text(launch.name)]
    parts += [struct.pack("<6IQQ", *launch.grid, *launch.block, launch.shared_bytes, task.seed)]
    parts += [_text(task.off.file if task.off else ""), struct.pack("<i", task.off.line if task.off else 0)]
    parts += [struct.pack("<I", len(launch.memory))]
    parts += [struct.pack("<QQQ", places[id(a)], a.nbytes, s) for a, s in zip(launch.memory, launch.shifts)]
    parts += [struct.pack("<I", len(launch.args))]
    parts += [struct.pack("<iQ", argument.memory, argument.value) for argument in launch.args]
    return b"".join((*parts, struct.pack("<Q", task.expected)))


def _read_results(data, tasks):
    """The outcomes in RESULTS of main.cpp; the last one may be cut off."""
    outcomes, at = [], 0

    def take(n):
        nonlocal at
        at += n
        if at > len(data):
            raise EOFError
        return data[at - n : at]

    def text():
        return take(*struct.unpack("<I", take(4))).decode(errors="replace")

    for task in tasks:
        try:
            _, state, digest, seconds = struct.unpack("<IIQd", take(24))
            message, sites, memory = text(), read_sites(text()), None
            if task.contents and STATES[state] != "left out":
                memory = [np.frombuffer(take(array.nbytes), np.uint8) for array in task.launch.memory]
            outcomes.append(Outcome(STATES[state], digest, seconds, message, sites, memory))
        except EOFError:
            break
    return outcomes


# ---- reports

KINDS = (
    re.compile(r"(?:WARNING|ERROR): (?:Thread|Address)Sanitizer: ([\w -]+?)(?: \(| on | in )"),
    re.compile(r"runtime error: "),
)
FRAME = re.compile(r"^\s+#\d+ .*?([^\s/]+):(\d+)(?::\d+)?(?: \(|$)", re.MULTILINE)
HERE_FILES = {path.name for path in HERE.iterdir()}


def _findings(errors, tasks):
    """The reports in what a process printed, each with the launch that ran."""
    findings = []
    for part in re.split(r"^emulator: task (?=\d+$)", errors, flags=re.MULTILINE)[1:]:
        number, _, text = part.partition("\n")
        starts = sorted(match.start() for kind in KINDS for match in kind.finditer(text))
        for start, end in zip(starts, [*starts[1:], len(text)]):
            line_start = text.rfind("\n", 0, start) + 1
            findings.append(_finding(text[line_start:end], tasks[int(number)].number))
    return findings


def _finding(text, launch):
    kind = next(match for pattern in KINDS if (match := pattern.search(text)))
    name = kind[1].strip() if kind.groups() else "runtime error"
    own = next((frame for frame in FRAME.finditer(text) if frame[1] not in HERE_FILES), None)
    return Finding(name, own[1] if own else "", int(own[2]) if own else 0, text.rstrip(), launch)


def _place(message):
    """File and line that a message of the emulator names."""
    match = re.search(r" at ([^\s:]+):(\d+)", message)
    return (match[1], int(match[2])) if match else ("", 0)


def _death(status):
    if status == "timeout":
        return "timeout"
    return f"crash: {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


# ---- switching off


def switch_off_each(launches: Sequence[Launch], seeds: Sequence[int] = SEEDS) -> dict[Site, str | None]:
    """For each barrier and wait that the launches reach: what noticed that it was switched off, None if nothing did.

    The plain build first, with several orders of threads: other numbers, divergent threads, a crash. Then, for what is
    left, ThreadSanitizer and AddressSanitizer.

    Raises KernelError if a launch fails, or depends on the order of threads, with nothing switched off.
    """
    plain, _ = execute([Task(launch, i, seed=seed) for i, launch in enumerate(launches) for seed in seeds], "plain")
    by_launch = [plain[i : i + len(seeds)] for i in range(0, len(plain), len(seeds))]
    for launch, outcomes in zip(launches, by_launch):
        for seed, outcome in zip(seeds, outcomes):
            if outcome.state != "expected":
                raise KernelError(
                    f"{launch.name}, seed {seed}, nothing switched off: {outcome.state} {outcome.message}"
                )
            if outcome.digest != outcomes[0].digest:
                raise KernelError(f"the results of {launch.name} depend on the order of threads (seed {seed}): a race")
    cheap_first = sorted(range(len(launches)), key=lambda i: by_launch[i][0].seconds)
    reached = {}  # site, and the source where its file is not a header -> numbers of launches
    for i in cheap_first:
        source = launches[i].library.source
        for site in by_launch[i][0].sites:
            reached.setdefault((site, source.code if site.file == source.name else ""), []).append(i)
    noticed = dict.fromkeys(reached)
    for build in ("plain", "thread", "address"):
        left = [key for key in noticed if noticed[key] is None]
        orders = seeds if build == "plain" else seeds[:1]
        tasks = [
            Task(launches[i], i, key[0], seed, group, by_launch[i][0].digest)
            for group, key in enumerate(left)
            for i in reached[key]
            for seed in orders
        ]
        if not tasks:
            break
        outcomes, _ = execute(tasks, build)
        for task, outcome in zip(tasks, outcomes):
            if noticed[left[task.group]] is None and outcome.state not in ("expected", "left out"):
                what = {"another": "other numbers", "reported": "data race"}.get(outcome.state, outcome.message)
                noticed[left[task.group]] = f"{build}: {what} in {task.launch.name}, seed {task.seed}"
    by_site = {}  # one None of two sources with the same name is enough
    for (site, _), what in sorted(noticed.items(), key=lambda item: (item[0][0], item[1] is None)):
        by_site[site] = what
    return by_site
