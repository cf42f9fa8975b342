"""Run the numeric tests as other processors would compute them: python -m tests.machines [--short] [MACHINE ...]

A machine of the table is an OpenBLAS kernel, the instructions that numba may use, and a number of threads. What runs is
read back from NumPy's and SciPy's OpenBLAS and from numba, in the process that runs the tests: a mismatch is a failure.
Machines that this processor cannot be, or whose kernel this OpenBLAS lacks, are listed as skipped, with the reason and
the kernel that would run. Each numba target has a cache of its own, so compiled kernels never mix.

The table for ARM64 was written from OpenBLAS's list of kernels and has never run.

Exit status: 0 all machines that can run passed, 1 a test or a read-back failed, 2 bad usage.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ASKED = "DELTANET_TEST_MACHINE"  # to the process that runs the tests: the machine that it must be


class Machine(NamedTuple):
    kernel: str | None  # OPENBLAS_CORETYPE; None leaves the choice to OpenBLAS
    needs: str  # processor flags, as in /proc/cpuinfo
    numba: tuple[str, str] | None  # NUMBA_CPU_NAME and NUMBA_CPU_FEATURES; None is this processor
    threads: int  # of OpenBLAS and of numba's kernels
    aliases: tuple[str, ...] = ()  # other names under which OpenBLAS reports this kernel


SSE3, V2, V3 = ("x86-64", "+sse3"), ("x86-64-v2", "+ssse3"), ("x86-64-v3", "+ssse3,+f16c")
TABLES = {
    "x86_64": {
        # builds without kernels for the oldest names run Prescott's for all of them, and report the first of the names
        "prescott": Machine("Prescott", "pni", SSE3, 1, ("Katmai",)),
        "nehalem": Machine("Nehalem", "ssse3 sse4_2", V2, 2),
        "sandybridge": Machine("Sandybridge", "avx", V2, 3),
        "haswell": Machine("Haswell", "avx2 fma f16c", V3, 2),
        "zen": Machine("Zen", "avx2 fma f16c", V3, 1),
        "skylake": Machine("SkylakeX", "avx512f avx512dq avx512bw avx512vl", None, 3),
        "cooperlake": Machine("Cooperlake", "avx512_bf16", None, 2),
        "sapphirerapids": Machine("SapphireRapids", "avx512_bf16 amx_bf16", None, 2),
        "here-1": Machine(None, "", None, 1),
        "here-2": Machine(None, "", None, 2),
        "here-3": Machine(None, "", None, 3),
    },
    "aarch64": {
        "armv8": Machine("ARMV8", "asimd", ("generic", ""), 1),
        "neoverse-n1": Machine("NEOVERSEN1", "asimd", None, 3),
        "neoverse-v1": Machine("NEOVERSEV1", "sve", None, 2),
        "here-1": Machine(None, "", None, 1),
        "here-2": Machine(None, "", None, 2),
        "here-3": Machine(None, "", None, 3),
    },
}
SHORT = ("prescott", "haswell", "skylake", "armv8", "here-3")

NUMERIC_SHORT = [
    "test_ops_backward.py",
    "test_ops_causal_conv1d.py",
    "test_ops_cross_entropy.py",
    "test_ops_elementwise.py",
    "test_ops_linear.py",
    "test_ops_norms.py",
    "test_ops_rope.py",
    "test_ops_softmax_attention.py",
    "test_delta_rule.py",
    "test_decode.py",
    "test_backend_numba.py",
    "test_merge.py",
    "test_oracle_programs.py::test_exported_cases_hold_the_inputs_and_the_expected_values",
]
NUMERIC = [
    *NUMERIC_SHORT,
    "test_model.py",
    "test_numba_quants.py",
    "test_oracle_vectors.py",
    "test_trace.py",
    "test_train_adamw.py",
    "test_train_batches.py",
    "test_train_lora.py",
    "test_train_loop.py",
    "test_pretrain.py",
    "test_verify.py",
    "test_adapter.py",
    "test_convert.py",
    "test_load.py",
    "test_quants.py",
]
# it compiles twice in caches of its own, which no machine changes
DESELECTED = ["test_backend_numba.py::test_a_kernel_just_compiled_computes_the_bits_of_a_stored_one"]


# ---- in the process that runs the tests


def read_back():
    """What this process computes with: {"numpy", "scipy": OpenBLAS kernel or None, "numba": CPU, "threads": number}."""
    import numpy  # noqa: F401 (loads its BLAS)
    import scipy.linalg  # noqa: F401 (loads its BLAS)
    from numba import config
    from numba.core.registry import cpu_target
    from threadpoolctl import threadpool_info

    kernels = {
        Path(library["filepath"]).parent.name.split(".")[0]: library["architecture"]
        for library in threadpool_info()
        if library.get("internal_api") == "openblas"
    }
    _, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    return {
        "numpy": kernels.get("numpy"),
        "scipy": kernels.get("scipy"),
        "numba": [cpu, features],
        "threads": config.NUMBA_NUM_THREADS,
    }


def differences(machine, found):
    """How what was read back differs from the machine that was asked for."""
    wrong = []
    for library in ("numpy", "scipy"):
        if machine.kernel and str(found[library]).lower() not in _names(machine):
            wrong.append(f"{library}'s OpenBLAS runs {found[library]}, not {machine.kernel}")
    if machine.kernel and found["numpy"] != found["scipy"]:
        wrong.append(f"numpy's OpenBLAS runs {found['numpy']}, scipy's {found['scipy']}")
    if machine.numba and tuple(found["numba"]) != machine.numba:
        wrong.append(f"numba compiles for {found['numba']}, not {list(machine.numba)}")
    if found["threads"] != machine.threads:
        wrong.append(f"numba has {found['threads']} threads, not {machine.threads}")
    return wrong


def pytest_sessionstart(session):
    """This file is a plugin of the pytest that it starts: no test runs on another machine than the one asked for."""
    import pytest

    if wrong := differences(table()[os.environ[ASKED]], read_back()):
        pytest.exit("; ".join(wrong), returncode=1)


# ---- in the process that starts them


def table():
    return TABLES[{"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())]


def _names(machine):
    return {name.lower() for name in (machine.kernel, *machine.aliases)}


def cpu_flags():
    """The processor's flags, or None where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()}


def environment(name, machine, caches):
    """The environment of a process that is to be the machine."""
    target = "-".join(machine.numba).replace("+", "").replace(",", "-") if machine.numba else "this-processor"
    chosen = {
        ASKED: name,
        "OPENBLAS_NUM_THREADS": str(machine.threads),
        "NUMBA_NUM_THREADS": str(machine.threads),
        "NUMBA_CACHE_DIR": str(Path(caches) / target),
    }
    if machine.kernel:
        chosen["OPENBLAS_CORETYPE"] = machine.kernel
    if machine.numba:
        chosen["NUMBA_CPU_NAME"], chosen["NUMBA_CPU_FEATURES"] = machine.numba
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("OPENBLAS_", "NUMBA_", "OMP_", "GOTO_"))
    }
    return inherited | chosen


def why_not(machine, env, flags):
    """Why this machine cannot run here, or None."""
    missing = set(machine.needs.split()) - flags if flags is not None else set()
    if missing:
        return f"this processor lacks {' '.join(sorted(missing))}"
    if not machine.kernel:
        return None
    program = "import json; from tests.machines import read_back; print(json.dumps(read_back()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        return None  # the tests will say what is wrong
    found = json.loads(done.stdout)
    if not found["numpy"] or not found["scipy"]:
        return "NumPy or SciPy has another BLAS than OpenBLAS"
    if found["numpy"] == found["scipy"] and found["numpy"].lower() not in _names(machine):
        return f"this OpenBLAS runs {found['numpy']} under the name {machine.kernel}"
    return None


def run(name, machine, tests, caches):
    """Run the tests; returns (status: "passed", "FAILED" or "skipped", what to say, the output)."""
    env = environment(name, machine, caches)
    if reason := why_not(machine, env, cpu_flags()):
        return "skipped", reason, ""
    deselect = [f"--deselect=tests/{test}" for test in DESELECTED]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-p",
            "tests.machines",
            *deselect,
            *(f"tests/{test}" for test in tests),
        ],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    last = done.stdout.strip().rpartition("\n")[2]
    return ("FAILED" if done.returncode else "passed"), last, done.stdout


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.machines", description=__doc__.partition("\n")[0])
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help=f"of: {', '.join(table())} (default: all)")
    parser.add_argument("--short", action="store_true", help=f"the machines {', '.join(SHORT)}, and fewer tests")
    parser.add_argument("--list", action="store_true", help="only say which machines can run here")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="machines at a time (default: one per core)")
    args = parser.parse_args()
    chosen = args.machines or [name for name in table() if not args.short or name in SHORT]
    if unknown := set(chosen) - set(table()):
        parser.error(f"unknown machine {' '.join(sorted(unknown))}: known are {', '.join(table())}")
    failed = []
    with tempfile.TemporaryDirectory(prefix="deltanet-ref-machines-") as caches, ThreadPoolExecutor(args.jobs) as pool:
        if args.list:
            for name in chosen:
                reason = why_not(table()[name], environment(name, table()[name], caches), cpu_flags())
                print(f"{name:16} {'skipped: ' + reason if reason else 'runs'}")
            return 0
        tests = NUMERIC_SHORT if args.short else NUMERIC
        results = {name: pool.submit(run, name, table()[name], tests, caches) for name in chosen}
        for name, result in results.items():
            status, words, output = result.result()
            machine = table()[name]
            print(
                f"{name:16} {status:8} OpenBLAS {machine.kernel or 'as chosen':15} "
                f"numba {machine.numba[0] if machine.numba else 'native':10} threads {machine.threads}  {words}",
                flush=True,
            )
            if status == "FAILED":
                failed.append(name)
                print(output, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
