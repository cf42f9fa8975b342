"""The emulator: what CUDA promises holds, and each mistake is noticed in the build that is there for it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deltanet_ref.backends.cuda.emulator import build, jobs
from deltanet_ref.backends.cuda.emulator.build import KernelError, Site, compile
from deltanet_ref.errors import InputError

HERE = Path(__file__).parent
CODE = (HERE / "emulator_kernels.cu").read_text()
NAME, HEADER = "emulator_kernels.cu", "emulator_kernels.cuh"
MANUAL = HERE.parents[1] / "docs" / "cuda-on-cpu.md"


@pytest.fixture(scope="module")
def library():
    return compile(CODE, [HERE], name=NAME)


def line_of(text, code=CODE):
    """The number of the line that contains the text."""
    lines = [number for number, line in enumerate(code.splitlines(), 1) if text in line]
    assert len(lines) == 1, (text, lines)
    return lines[0]


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def empty(*shape, dtype=np.float32):
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else -1, dtype)


# ---- launches


def test_indices_count_x_fastest(library):
    out = empty(6 * 24, dtype=np.int32)
    library.launch("indices", (3, 1, 2), (2, 3, 4), [out])
    assert (out == (1000 * np.arange(6)[:, None] + np.arange(24)).ravel()).all()


def test_arguments_of_each_type_arrive(library):
    out = empty(4, dtype=np.float64)
    library.launch("scalars", 1, 1, [None, -7, 2**40 + 1, 0.1, out])
    assert out.tolist() == [1.0, -7.0, 2.0**40 + 1, float(np.float32(0.1))]
    library.launch("scalars", 1, 1, [None, np.int32(5), np.int64(6), np.float32(2.5), out])
    assert out.tolist() == [1.0, 5.0, 6.0, 2.5]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([None, 1, 2, 0.5], "takes 5 arguments, not 4"),
        ([None, 2**31, 2, 0.5, np.zeros(4)], "argument 1 of scalars is an int"),
        ([None, 1.5, 2, 0.5, np.zeros(4)], "argument 1 of scalars is an int"),
        ([None, 1, 2, np.int32(3), np.zeros(4)], "argument 3 of scalars is a float"),
        ([3, 1, 2, 0.5, np.zeros(4)], "argument 0 of scalars is a pointer"),
        ([None, 1, 2, 0.5, np.zeros((4, 4)).T], "argument 4 of scalars is not in C order"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(library, args, message):
    with pytest.raises(TypeError, match=message):
        library.launch("scalars", 1, 1, args)


@pytest.mark.parametrize(
    ("name", "grid", "block", "shared", "message"),
    [
        ("correct", 1, 65, 512, "a block of .65, 1, 1. threads: at most 64"),
        ("indices", 1, 1025, 0, "at most 1024"),
        ("indices", 1, (1, 1, 65), 0, "at most 1024"),
        ("indices", 0, 1, 0, "a grid of .0, 1, 1. blocks"),
        ("indices", (1, 65536), 1, 0, "a grid of .1, 65536, 1. blocks"),
        ("indices", 1, 1, 227 * 1024 + 1, "bytes of shared memory: no device has more"),
    ],
)
def test_launches_that_no_device_takes_are_refused(library, name, grid, block, shared, message):
    args = [np.zeros(4, np.float32)] * len(library.types(name))
    with pytest.raises(KernelError, match=message):
        library.launch(name, grid, block, args, shared)


def test_an_unknown_kernel_is_refused(library):
    for name in ("nothing", "never", "commented_out"):
        with pytest.raises(InputError, match=f"no kernel {name}"):
            library.launch(name, 1, 1, [])


# ---- memory


@pytest.mark.parametrize("seed", [0, 1])
def test_shared_memory_is_poison_at_the_start_of_each_block(library, seed):
    out = np.zeros((3, 9), np.float32)
    library.launch("initial_shared", 3, 1, [out], 16, seed=seed)
    assert np.isnan(out[:, :8]).all() and (out[:, 8] == -1).all()


def test_arrays_in_shared_memory_have_their_alignment(library):
    out = empty(3, dtype=np.int32)
    library.launch("aligned_shared", 1, 3, [out])
    assert (out == 0).all()


def test_dynamic_shared_memory_has_no_larger_alignment():
    with pytest.raises(InputError, match="aligned to 16 bytes"):
        compile("__device__ void f() { extern __shared__ __align__(128) float shared[]; }")


def test_atomics_add_up(library):
    n, total = np.zeros(1, np.int32), np.zeros(1, np.float32)
    library.launch("count", 5, 70, [n, total])
    assert n[0] == 350 and total[0] == 175


def test_subnormal_numbers_are_zeros_in_kernels_and_only_there(library):
    x, out = np.array([1e-40, 1e-30], np.float32), empty(2)
    library.launch("twice", 1, 2, [x, out])
    assert out[0] == 0 and out[1] == np.float32(2e-30)
    assert x[:1] * np.float32(2) > 0


# ---- conversions


def awkward_numbers(bits_dropped):
    """Random numbers, ties, neighbours of ties, infinities, NaN and the largest numbers."""
    bits = np.random.default_rng(1).integers(0x08000000, 0x7F800000, 2000, dtype=np.uint32)
    ties = bits >> bits_dropped << bits_dropped | 1 << (bits_dropped - 1)
    special = np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 0xFF7FFFFF], np.uint32)
    return np.concatenate([bits, ties, ties - 1, ties + 1, ties | 0x80000000, special]).view(np.float32)


def test_bfloat16_rounds_to_nearest_even(library):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = awkward_numbers(16)
    out = empty(len(x))
    library.launch("round_to_bf16", -(-len(x) // 64), 64, [x, out, len(x)])
    np.testing.assert_array_equal(out, x.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_tf32_rounds_ties_away_from_zero(library):
    x = awkward_numbers(13)
    out = empty(len(x))
    library.launch("round_to_tf32", -(-len(x) // 64), 64, [x, out, len(x)])
    finite = np.isfinite(x)
    np.testing.assert_array_equal(out[~finite], x[~finite])
    mantissa, exponent = np.frexp(x[finite].astype(np.float64))
    rounded = np.copysign(np.floor(np.abs(mantissa) * 2**11 + 0.5), mantissa) * 2.0 ** (exponent - 11)
    np.testing.assert_array_equal(
        out[finite], np.where(np.abs(rounded) < 2.0**128, rounded, np.copysign(np.inf, rounded))
    )


# ---- operations of a warp


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(("n", "width"), [(1, 32), (5, 32), (31, 32), (3, 8), (2, 4), (5, 16)])
def test_shuffles_take_the_lane_that_cuda_names(library, n, width, seed):
    x, out = numbers(96), empty(96, 6)
    library.launch("shuffles", 1, 96, [x, out, n, width], seed=seed)
    lane = np.arange(32)
    first, end = lane // width * width, (lane // width + 1) * width
    sources = [
        first + n % width,
        np.where((lane ^ n) < end, lane ^ n, lane),
        np.where(lane + n < end, lane + n, lane),
        np.where(lane - n >= first, lane - n, lane),
    ]
    for warp in range(3):
        values, got = x[32 * warp : 32 * warp + 32], out[32 * warp : 32 * warp + 32]
        for column, source in enumerate(sources):
            np.testing.assert_array_equal(got[:, column], values[source], f"shuffle {column}")
        ballot = sum(1 << i for i in range(16) if (32 * warp + i) % 3 == 0)
        assert (got[:, 4] == ballot).all()
        np.testing.assert_array_equal(got[:, 5], values[lane ^ 1])


def test_lanes_that_are_not_there_give_poison(library):
    x, out = numbers(40), empty(40, 6)
    library.launch("shuffles", 1, 40, [x, out, 1, 32])
    np.testing.assert_array_equal(out[32:39, 2], x[33:40])
    assert np.isnan(out[39, 2])  # lane 7 of 8 asked for lane 8


# A product of small integers is exact: only the layouts are tested. Registers that hold another row than they should
# make another product, as `swapped` shows.
@pytest.mark.parametrize(("name", "k"), [("product_bf16", 16), ("product_tf32", 8)])
@pytest.mark.parametrize("seed", [0, 5])
def test_fragments_have_the_layout_of_the_ptx_isa(library, name, k, seed):
    rng = np.random.default_rng(2)
    a, b = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, k), (k, 8)))
    d = rng.integers(-8, 9, (16, 8)).astype(np.float32)
    got, swapped = d.copy(), d.copy()
    library.launch(name, 1, 32, [a, b, got, 0], seed=seed)
    np.testing.assert_array_equal(got, d + a @ b)
    library.launch(name, 1, 32, [a, b, swapped, 1], seed=seed)
    assert (swapped != d + a @ b).mean() > 0.9


def test_tf32_products_ignore_the_low_13_bits(library):
    a, b, got = numbers(16, 8), numbers(8, 8, seed=1), np.zeros((16, 8), np.float32)
    library.launch("product_tf32", 1, 32, [a, b, got, 0])
    cut = [(x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for x in (a, b)]
    np.testing.assert_allclose(got, cut[0] @ cut[1], rtol=0, atol=8 * 2.0**-24 * (abs(cut[0]) @ abs(cut[1])).max())
    assert abs(got - a.astype(np.float64) @ b).max() > 1e-4  # the bits matter


def test_products_need_a_whole_warp(library):
    with pytest.raises(KernelError, match="mma_bf16 needs all 32 lanes"):
        library.launch("product_bf16", 1, 31, [numbers(16, 16), numbers(16, 8), numbers(16, 8), 0])


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("n", [2, 4])
def test_ldmatrix_gives_each_lane_its_pair(library, n, transposed):
    x = np.random.default_rng(3).integers(0, 2**16, (4, 8, 8), dtype=np.uint16)  # matrix, row, column
    out = np.zeros((32, 4), np.uint32)
    library.launch("load_matrices", 1, 32, [x, out, transposed, n, 0], 512)
    g, t = np.arange(32) // 4, np.arange(32) % 4
    for matrix in range(n):
        m = x[matrix].T if transposed else x[matrix]
        expected = m[g, 2 * t] | m[g, 2 * t + 1].astype(np.uint32) << 16
        np.testing.assert_array_equal(out[:, matrix], expected, f"matrix {matrix}")


@pytest.mark.parametrize(
    ("offset", "message"), [(8, "is not a multiple of 16"), (16, "not in shared memory, or not all 16 bytes")]
)
def test_ldmatrix_checks_its_rows(library, offset, message):
    x, out = np.zeros((4, 8, 8), np.uint16), np.zeros((32, 4), np.uint32)
    line = line_of("!transposed) ldmatrix_x4")
    with pytest.raises(KernelError, match=f"ldmatrix_x4 at {NAME}:{line}: .* {message}"):
        library.launch("load_matrices", 1, 32, [x, out, 0, 4, offset], 512)


def test_ldmatrix_reads_shared_memory_only(library):
    with pytest.raises(KernelError, match="ldmatrix_x4 .* thread .0, 0, 0. of block .0, 0, 0. is not in shared memory"):
        library.launch("load_global_matrix", 1, 32, [np.zeros((4, 8, 8), np.uint16)])


# ---- cp.async


def test_copies_arrive_at_the_wait_that_requires_them(library):
    x, out = numbers(8), empty(3, 12)
    library.launch("copies", 1, 1, [x, out], 48)
    assert np.isnan(out[0]).all()  # nobody may read before a wait
    assert (out[1, :4] == x[:4]).all() and np.isnan(out[1, 4:]).all()
    assert (out[2, :8] == x).all() and (out[2, 8:] == 0).all()


@pytest.mark.parametrize("group", [0, 1])
def test_a_missing_wait_shows_in_the_numbers(library, group):
    x, out = numbers(8), empty(3, 12)
    library.launch("copies", 1, 1, [x, out], 48, off=sites_of("copies")[group])
    assert np.isnan(out[1 + group, 4 * group :]).all()


def test_copies_check_their_addresses(library):
    x = np.zeros(8, np.float32)
    for args, message in (
        ([x, 4], "not a multiple of 16"),
        ([x, 32], "not in shared memory"),
        ([x[1:], 0], "multiple"),
    ):
        with pytest.raises(KernelError, match=f"cp_async_16 at {NAME}:.*{message}"):
            library.launch("copy_to", 1, 1, args, 32)


# ---- divergence


@pytest.mark.parametrize(
    ("name", "args", "parts"),
    [
        ("different_barriers", [3], ["3 wait in __syncthreads at {first}", "1 wait in __syncthreads at {second}"]),
        ("ended_before_barrier", [5], ["5 have ended", "1 wait in __syncthreads at {the others wait here}"]),
        (
            "barrier_or_shuffle",
            [np.zeros(32, np.float32)],
            ["16 wait in __syncthreads at {half a warp}", "16 wait in __shfl_sync at {the other half}"],
        ),
        ("different_shuffles", [np.zeros(32, np.float32)], ["16 wait in __shfl_sync at", "1 wait in __shfl_sync at"]),
        ("half_mask", [np.zeros(32, np.float32)], ["only the full mask is supported"]),
    ],
)
def test_divergent_threads_are_reported_with_their_lines(library, name, args, parts):
    for _ in range(2):  # a failed launch leaves nothing behind
        with pytest.raises(KernelError) as error:
            library.launch(name, 1, 32, args)
        for part in parts:
            part = re.sub(r"{(.*)}", lambda m: f"{NAME}:{line_of('// ' + m[1])}", part)
            assert part in str(error.value)


# ---- sites


def correct_launch(library, seed=0, off=None):
    x, out = numbers(3, 64), empty(3, 64)
    library.launch("correct", 3, 64, [x, out], 512, seed=seed, off=off)
    return x, out


def sites_of(kernel):
    """The sites written in a kernel, in order."""
    lines = list(enumerate(CODE.splitlines(), 1))[line_of(f" {kernel}(") - 1 :]
    end = next(i for i, (_, line) in enumerate(lines) if line == "}")
    return [Site(NAME, n, match[1]) for n, line in lines[:end] if (match := build.SITE.search(line))]


def sites_of_correct():
    own = sites_of("correct")
    assert [site.kind for site in own] == [
        "cp_async_wait",
        "__syncthreads",
        "__syncwarp",
        "__syncthreads",
        "__syncthreads",
    ]
    return [*own, Site(HEADER, 5, "__syncthreads"), Site(HEADER, 13, "__syncthreads")]


def test_results_do_not_depend_on_the_order_of_threads(library):
    x, out = correct_launch(library)
    reversed_, again = x[:, ::-1], x[:, ::-1].reshape(3, 2, 32)[:, :, ::-1].reshape(3, 64)
    expected = again + again.reshape(3, 32, 2)[:, :, ::-1].reshape(3, 64) + reversed_.sum(1, keepdims=True)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    for seed in range(1, 9):
        np.testing.assert_array_equal(correct_launch(library, seed)[1], out)


def test_orders_differ_from_seed_to_seed(library):
    results = {correct_launch(library, seed, off=sites_of_correct()[3])[1].tobytes() for seed in range(6)}
    assert len(results) > 3


def test_sites_are_those_reached(library):
    fresh = compile(CODE + "// another library\n", [HERE], name=NAME)
    assert fresh.sites == []
    correct_launch(fresh)
    assert fresh.sites == sorted(sites_of_correct())
    assert Site(NAME, line_of("// first"), "__syncthreads") in fresh.unreached
    assert all(site.line < line_of("#ifdef NEVER") + 2 for site in fresh.unreached)  # not what is commented out


@pytest.fixture(scope="module")
def noticed(library):
    with jobs.recording() as launches:
        correct_launch(library)
    return jobs.switch_off_each(launches)


def test_each_site_that_is_needed_is_noticed_and_no_other(noticed):
    assert sorted(noticed) == sorted(sites_of_correct())
    redundant = [site for site, what in noticed.items() if what is None]
    assert redundant == [Site(NAME, line_of("// not needed"), "__syncthreads")], noticed


def test_blocks_that_depend_on_each_other_are_noticed(library):
    with jobs.recording() as launches:
        library.launch("from_block_to_block", 50, 32, [np.zeros(51, np.int32)])
    with pytest.raises(KernelError, match="depend on the order of threads"):
        jobs.switch_off_each(launches)
    assert [f.kind for f in jobs.run(launches, "thread").findings][:1] == ["data race"]


@pytest.mark.parametrize("grid", [(7, 1, 1), (2, 3, 4), (1, 1, 1), (16, 1, 2)])
def test_each_block_runs_once_in_any_order(library, grid):
    n = int(np.prod(grid))
    for seed in range(5):
        out, count = empty(n * 3, dtype=np.int32), np.zeros(1, np.int32)
        library.launch("indices", grid, 3, [out], seed=seed)
        assert (out == (1000 * np.arange(n)[:, None] + np.arange(3)).ravel()).all()
        library.launch("count", grid, 1, [count, np.zeros(1, np.float32)], seed=seed)
        assert count[0] == n


def test_two_sources_of_one_name_are_not_confused():
    i = "threadIdx.x"
    needed = f"__shared__ int s[64]; s[{i}] = {i};\n__syncthreads();\nout[{i}] = s[{i} ^ 63];\n"
    not_needed = "out[threadIdx.x] = 1;\n__syncthreads();\n"
    with jobs.recording() as launches:
        for body in (needed, not_needed, needed + "\n"):
            library = compile(f'extern "C" __global__ void f(int* out) {{\n{body}}}\n')
            library.launch("f", 1, 64, [np.zeros(64, np.int32)])
    assert jobs.switch_off_each(launches[:1])[Site("kernel.cu", 3, "__syncthreads")].startswith("plain: other numbers")
    assert jobs.switch_off_each(launches) == {Site("kernel.cu", 3, "__syncthreads"): None}
    # a process that has run one library finds nothing wrong with another
    assert jobs.run(launches, "thread").findings == []


def test_a_source_can_name_itself():
    library = compile('#line 1 "named.cu"\nextern "C" __global__ void f() {\n    __syncthreads();\n}\n')
    assert library.unreached == [Site("named.cu", 2, "__syncthreads")]
    library.launch("f", 1, 64, [])
    assert library.sites == [Site("named.cu", 2, "__syncthreads")] and library.unreached == []


def test_a_race_is_refused_before_anything_is_switched_off(library):
    with jobs.recording() as launches:
        library.launch("missing_barrier", 1, 64, [numbers(64), empty(64)])
    with pytest.raises(KernelError, match="missing_barrier depend on the order of threads"):
        jobs.switch_off_each(launches)


# ---- sanitizers


def recorded(library, name, grid, block, args, shared=0):
    return jobs.recorded(library, name, grid, block, args, shared)


def launches_of_correct_code(library):
    with jobs.recording() as launches:
        correct_launch(library)
        library.launch("copies", 1, 1, [numbers(8), empty(3, 12)], 48)
        library.launch("initial_shared", 3, 1, [empty(3, 9)], 16)
        library.launch("shuffles", 1, 96, [numbers(96), empty(96, 6), 3, 8])
        library.launch("product_bf16", 1, 32, [numbers(16, 16), numbers(16, 8), numbers(16, 8), 0])
        library.launch("product_tf32", 1, 32, [numbers(16, 8), numbers(8, 8), numbers(16, 8), 0])
        for n, transposed in ((4, 0), (4, 1), (2, 0), (2, 1)):
            args = [np.arange(512, dtype=np.uint32)[:128], np.zeros((32, 4), np.uint32), transposed, n, 0]
            library.launch("load_matrices", 1, 32, args, 512)
        library.launch("count", 5, 70, [np.zeros(1, np.int32), np.zeros(1, np.float32)])
    return launches


@pytest.mark.parametrize("build", ["plain", "thread", "address"])
@pytest.mark.parametrize("seed", [0, 2])
def test_correct_code_is_silent_and_has_the_same_numbers_in_every_build(library, build, seed):
    launches = launches_of_correct_code(library)
    expected = jobs.run(launches, "plain").arrays
    findings, arrays = jobs.run(launches, build, seed=seed)
    assert findings == []
    for launch, got, wanted in zip(launches, arrays, expected):
        for x, y in zip(got, wanted):
            np.testing.assert_array_equal(x, y, launch.name)


def test_a_launch_in_a_process_gives_what_it_gives_here(library):
    with jobs.recording() as launches:
        _, out = correct_launch(library)
    np.testing.assert_array_equal(jobs.run(launches).arrays[0][1], out)


def test_arrays_that_overlap_are_recorded_as_one(library):
    x = numbers(100)
    launch = recorded(library, "correct", 1, 64, [x[:64], x[36:]], 512)
    assert [memory.nbytes for memory in launch.memory] == [400]
    apart = recorded(library, "correct", 1, 64, [x[:64], x[64:]], 512)
    assert [memory.nbytes for memory in apart.memory] == [256, 144]
    assert [a.memory for a in recorded(library, "correct", 1, 64, [x, x], 512).args] == [0, 0]


def test_pointers_cannot_be_recorded(library):
    import ctypes

    with pytest.raises(TypeError, match="was given a pointer, not an array"):
        recorded(library, "twice", 1, 1, [ctypes.c_void_p(16), numbers(1)])


RACES = [  # kernel, grid, block, arguments, line of the kernel that one of the two accesses is in
    ("missing_barrier", 1, 64, lambda: [numbers(64), empty(64)], ["reads what another thread writes"]),
    ("missing_syncwarp", 1, 32, lambda: [numbers(32), empty(32)], ["s[31 - threadIdx.x] + same"]),
    ("same_output_of_all_blocks", 2, 32, lambda: [empty(32)], ["void same_output_of_all_blocks"]),
    (
        "copy_too_early",
        1,
        128,
        lambda: [numbers(128), empty(128)],
        ["a barrier is missing before", "out[i] = s[127 - i]"],
    ),
]


@pytest.mark.parametrize(("name", "grid", "block", "args", "lines"), RACES, ids=[race[0] for race in RACES])
def test_the_thread_build_reports_races(library, name, grid, block, args, lines):
    findings, _ = jobs.run([recorded(library, name, grid, block, args())], "thread")
    assert findings and {finding.kind for finding in findings} == {"data race"}
    assert all(finding.file == NAME for finding in findings)
    for line in lines:
        assert any(f"{NAME}:{line_of(line)}" in finding.text for finding in findings), findings[0].text


@pytest.mark.parametrize("index", [1, 2, 3, 5, 6])  # 5, 6: in the header
def test_the_thread_build_reports_a_barrier_that_is_switched_off(library, index):
    with jobs.recording() as launches:
        correct_launch(library)
    site = sites_of_correct()[index]
    findings, _ = jobs.run(launches, "thread", off=site)
    assert {finding.kind for finding in findings} == {"data race"}


OUTSIDE = [  # kernel, arguments, bytes of shared memory, kind
    ("read_outside", lambda: [numbers(7), empty(1), 7], 0, "heap-buffer-overflow"),
    ("read_outside", lambda: [numbers(7), empty(1), -1], 0, "heap-buffer-overflow"),
    ("read_outside_dynamic", lambda: [empty(1), 5], 20, "heap-buffer-overflow"),
    ("read_outside_static", lambda: [empty(1), 6], 0, "runtime error"),
    ("misaligned", lambda: [numbers(8), empty(1), 1], 0, "runtime error"),
    ("overflow", lambda: [2**31 - 1, np.zeros(1, np.int32)], 0, "runtime error"),
]


@pytest.mark.parametrize(("name", "args", "shared", "kind"), OUTSIDE)
def test_the_address_build_reports_accesses_outside_and_misaligned(library, name, args, shared, kind):
    launches = [recorded(library, name, 1, 1, args(), shared)] + launches_of_correct_code(library)[:2]
    findings, arrays = jobs.run(launches, "address")
    assert len(findings) == 1 and findings[0].launch == 0
    lines = list(enumerate(CODE.splitlines(), 1))[line_of(f" {name}(") - 1 :]
    line = next(n for n, text in lines if "out[0] =" in text)
    assert findings[0][:3] == (kind, NAME, line)
    assert arrays[0] is None and arrays[1] is not None and arrays[2] is not None  # the others ran


@pytest.mark.parametrize("build", ["plain", "thread", "address"])
def test_divergent_threads_are_findings_of_a_process(library, build):
    findings, _ = jobs.run([recorded(library, "different_barriers", 1, 32, [3])], build)
    assert [(f.kind, f.file, f.line) for f in findings] == [("failed", NAME, line_of("// first"))]


@pytest.mark.parametrize("build", ["plain", "thread", "address"])
def test_a_crash_is_a_finding(library, build):
    launches = [recorded(library, "write_null", 1, 1, [None]), *launches_of_correct_code(library)[:1]]
    findings, arrays = jobs.run(launches, build)
    assert len(findings) == 1 and arrays[0] is None and arrays[1] is not None
    assert findings[0].kind in ("crash: SIGSEGV", "SEGV", "runtime error")


# ---- compiling


def test_a_source_that_does_not_compile_is_refused_with_its_lines():
    with pytest.raises(InputError, match=r"cannot compile .*broken.cu:2:\d+: error"):
        compile('\nextern "C" __global__ void f() { return 1; }', name="broken.cu")


def test_a_compiled_source_is_kept(library, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    build._compiled.cache_clear()
    assert compile(CODE, [HERE], name=NAME).path == library.path


def test_a_changed_header_is_noticed(tmp_path):
    code = '#include "number.cuh"\nextern "C" __global__ void f(int* out) { out[0] = NUMBER; }'
    for number in (3, 4):
        (tmp_path / "number.cuh").write_text(f"#define NUMBER {number}\n")
        build._compiled.cache_clear()
        out = np.zeros(1, np.int32)
        compile(code, [tmp_path]).launch("f", 1, 1, [out])
        assert out[0] == number


def test_without_a_compiler_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    build._compiler.cache_clear()
    with pytest.raises(InputError, match="the emulator needs g.*apt install g"):
        compile('extern "C" __global__ void without_compiler() {}')
    build._compiler.cache_clear()


def test_other_processors_switch_stacks_through_the_system():
    slow = compile(CODE, [HERE], {"EMULATOR_UCONTEXT": 1}, name=NAME)
    fast = compile(CODE, [HERE], name=NAME)
    np.testing.assert_array_equal(correct_launch(slow, 1)[1], correct_launch(fast, 1)[1])
    with pytest.raises(KernelError, match="divergent"):
        slow.launch("different_barriers", 1, 32, [3])


# ---- the manual


def test_the_example_of_the_manual_works_without_this_package(tmp_path):
    blocks = re.findall(r"```(\w+)\n(.*?)```", MANUAL.read_text(), re.DOTALL)
    kernel, program = (next(text for language, text in blocks if language == wanted) for wanted in ("cuda", "python"))
    shutil.copytree(build.HERE, tmp_path / "emulator")
    (tmp_path / "reverse.cu").write_text(kernel)
    (tmp_path / "example.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    # -I: neither the working directory nor the user's packages; deltanet_ref must not be importable
    code = (
        "import sys, runpy; sys.modules['deltanet_ref'] = None; sys.path.insert(0, '.'); runpy.run_path('example.py')"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    printed = next(text for language, text in blocks if language == "text")
    assert result.stdout.strip() == printed.strip()
