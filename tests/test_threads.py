"""Which cores and threads are used, how products are divided among them, and what is said of compilation."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from deltanet_ref.backends import cores
from deltanet_ref.backends.numba_cpu import blas, linear, threads
from tests.tolerances import assert_identical, assert_within, rounding

ROOT = Path(__file__).parents[1]


def python(script, **environment):
    """A Python process that runs the script with these environment variables; its output and errors as text."""
    environment = {n: x for n, x in os.environ.items() if not n.endswith("_NUM_THREADS")} | environment
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)


# ---- cores


@pytest.mark.parametrize(
    "groups, files, quota",
    [
        ("0::/", {}, None),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "250000 100000"}, 3),
        ("0::/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1),
        ("0::/a", {"cpu.max": "10000 100000", "a/cpu.max": "200000 100000"}, 1),
        (
            "4:cpu,cpuacct:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "150000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("7:memory:/a\n4:cpu:/", {"memory/a/cpu.max": "100000 100000"}, None),
    ],
)
def test_a_cpu_quota_of_any_containing_group_limits_the_cores(groups, files, quota, monkeypatch, tmp_path):
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "self").write_text(groups + "\n")
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "OF_PROCESS", tmp_path / "self")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert cores.available_cores() == (quota or 8)


def test_an_affinity_mask_limits_the_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "OF_PROCESS", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5}, raising=False)
    assert cores.available_cores() == 1


# ---- threads

STATE = """if True:
    from threadpoolctl import threadpool_info
    from deltanet_ref.backends.cores import available_cores
    from deltanet_ref.backends.numba_cpu import threads
    found = {library["filepath"].split("/")[-2]: library["num_threads"] for library in threadpool_info()}
    print(available_cores(), threads.number_of_threads, found["numpy.libs"], found["scipy.libs"])"""
NUMPY_ALONE = "import numpy, threadpoolctl; print(threadpoolctl.threadpool_info()[0]['num_threads'])"
LIMIT = "from deltanet_ref.cli.model import limit_threads\nlimit_threads({})\n"


def test_the_kernels_take_all_cores_or_what_the_environment_says():
    """SciPy's BLAS, which kernels call, runs on one thread; NumPy's keeps its own for the rest of the process."""
    available, kernels, numpys, scipys = map(int, python(STATE).stdout.split())
    alone = python(NUMPY_ALONE)
    assert kernels == available and numpys == int(alone.stdout) and scipys == 1
    assert python(STATE, NUMBA_NUM_THREADS="3").stdout.split()[1] == "3"


@pytest.mark.parametrize("backend", ["numpy", "auto"])
def test_threads_beyond_the_cores_are_cut_with_a_note(backend):
    result = python(LIMIT.format(f"4096, '{backend}'") + STATE)
    available, kernels, numpys, _ = map(int, result.stdout.split())
    assert kernels == available and numpys == (available if backend == "numpy" else 1)
    assert result.stderr.startswith("note: --threads 4096: ") and result.stderr.count("\n") == 1
    quiet = python(LIMIT.format(f"1, '{backend}'") + STATE)
    assert quiet.stdout.split()[1:3] == ["1", "1"] and not quiet.stderr


def test_numpys_blas_is_on_one_thread_while_anybody_multiplies(monkeypatch):
    """With a stand-in for the library, which a machine of one core could not show."""
    numbers = [6]
    library = SimpleNamespace(get_num_threads=lambda: numbers[-1])
    monkeypatch.setattr(blas, "_limit", lambda _, n: numbers.append(n))
    on_one_thread = blas._OnOneThread([library])
    with on_one_thread:
        with ThreadPoolExecutor(1) as executor:
            executor.submit(on_one_thread.__enter__).result()
            executor.submit(on_one_thread.__exit__).result()
        assert numbers == [6, 1]
    assert numbers == [6, 1, 6]
    with pytest.raises(ZeroDivisionError), on_one_thread:
        raise ZeroDivisionError
    assert numbers == [6, 1, 6, 1, 6]


PRODUCTS = """if True:
    from concurrent.futures import ThreadPoolExecutor
    from types import SimpleNamespace
    import numpy as np
    from deltanet_ref.backends.numba_cpu import blas, linear
    library, = blas.numpy_on_one_thread.libraries
    during, x, w = set(), np.ones((300, 500), np.float32), np.ones((700, 500), np.float32)

    def matmul(*args, **options):
        result = np.matmul(*args, **options)
        during.add(library.get_num_threads())
        return result

    linear.np = SimpleNamespace(matmul=matmul, empty=np.empty)
    before = library.get_num_threads()
    linear.linear_forward(x, w)
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda _: linear.linear_forward(x, w), range(50)))
    print(before, *during, library.get_num_threads())"""


def test_products_of_any_python_thread_run_with_numpys_blas_on_one_thread():
    alone = python(NUMPY_ALONE).stdout.strip()
    assert python(PRODUCTS).stdout.split() == [alone, "1", alone]


def test_errors_of_a_helper_reach_the_caller_and_helpers_go_on():
    def fail(first, last):
        if first == 3:
            raise ValueError("task 3")

    before = threads.set_threads(3)
    try:
        for _ in range(20):
            with pytest.raises(ValueError, match="task 3"):
                threads.run_together([threads.Work(4, fail, [])])
        done = []
        threads.run_together([threads.Work(50, lambda first, last: done.extend(range(first, last)), [])])
    finally:
        threads.set_threads(before)
    assert sorted(done) == list(range(50))


# ---- products in blocks


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([1, 2, 3, 8, 64]))
def test_blocks_cover_the_result_and_are_worth_a_thread(m, k, n, available):
    linear.block_shape.cache_clear()
    before, linear.CORES = linear.CORES, available
    try:
        rows, columns = linear.block_shape(m, k, n)
    finally:
        linear.CORES = before
        linear.block_shape.cache_clear()
    down, across = -(-m // rows), -(-n // columns)
    assert down >= 1 and across >= 1
    whole = linear._cost(m, k, n, 1, 1)
    assert down * across <= max(1, whole / linear.BLOCK_COST)
    if down * across > 2 * available:  # beyond the next power of two only where that is nearly free
        assert linear._cost(m, k, n, down, across) <= linear.EXTRA * whole


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "m, k, n", [(1, 3000, 4000), (300, 513, 1027), (1100, 260, 70), (2050, 90, 300), (0, 4, 5), (4, 0, 5)]
)
def test_products_in_blocks_are_exact_to_rounding(m, k, n, dtype):
    """Each element within k + 1 roundings of the sum of absolute terms, for contiguous and transposed factors."""
    rng = np.random.default_rng(m + n)
    for order_A in "CF":
        for order_B in "CF":
            A = np.asarray(rng.standard_normal((m, k)).astype(dtype), order=order_A)
            B = np.asarray(rng.standard_normal((k, n)).astype(dtype), order=order_B)
            A_wide, B_wide = A.astype(np.float64), B.astype(np.float64)
            bound = rounding(k + 1, dtype) * (np.abs(A_wide) @ np.abs(B_wide))
            C = np.full((m, n + 3), 7, dtype)
            linear.product(A, B, C[:, 1 : n + 1])
            assert_within("C", C[:, 1 : n + 1], A_wide @ B_wide, bound)
            assert (C[:, [0, n + 1, n + 2]] == 7).all()
            assert_identical("new array", linear.product(A, B), C[:, 1 : n + 1])


# ---- compilation

COMPILES = """if True:
    import sys, numpy as np
    from deltanet_ref.backends import numba_cpu as nb
    for dtype in ("float32", "float64"):
        for _ in range(2):
            x = np.ones((3, 4), dtype)
            nb.swiglu_forward(x, x)
            nb.sigmoid_gate_forward(x, x)"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_compilation_is_announced_once_for_each_dtype_on_a_terminal(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}

    def terminal_output():
        ours, theirs = os.openpty()
        process = subprocess.Popen([sys.executable, "-c", COMPILES], cwd=ROOT, env=environment, stderr=theirs)
        os.close(theirs)
        with open(ours, "rb", buffering=0) as terminal:
            output = b""
            try:
                while part := terminal.read(1000):
                    output += part
            except OSError:  # Linux: the other side has been closed
                pass
        assert process.wait() == 0
        return output.decode().splitlines()

    first = terminal_output()
    assert [line.split()[:3] for line in first] == [["Compiling", "the", "float32"], ["Compiling", "the", "float64"]]
    assert terminal_output() == []  # stored by now
