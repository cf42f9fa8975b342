"""python -m tests.fuzz: coverage-guided fuzzing of the readers with atheris (libFuzzer).

libFuzzer keeps every input that reaches new code. A third of the files that it tries are kept inputs with its own
mutations, a third kept inputs with those of mutate.py, and a third good files with those of mutate.py, so that damage
is not hidden by other damage. An input that takes more than SECONDS or MEGABYTES is a bug too. Findings are written to
files named crash-*, timeout-* or oom-*, which become tests.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.fuzz.mutate import mutate

SECONDS, MEGABYTES = 10, 2048
CORPUS = Path(__file__).parent / "corpus"


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=int, default=10_000, metavar="N", help="files to try of each kind (default 10000)"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="random seed of the mutations (default 1)")
    parser.add_argument("--target", action="append", metavar="NAME", help="fuzz only this kind of file (default: all)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the inputs that reached new code in DIR/NAME")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in the process of one target: where it may write
    args = parser.parse_args()
    names = args.target or sorted(path.name for path in CORPUS.iterdir())
    if args.one:
        return fuzz(names[0], args.runs, args.seed, args.keep, Path(args.one))

    failed, total, start = [], np.zeros(2, int), time.perf_counter()
    print(f"{'target':18} {'files':>7} {'accepted':>9} {'rejected':>9} {'seconds':>8} {'code reached':>13}")
    for name in names:
        options = ["--target", name, "--runs", str(args.runs), "--seed", str(args.seed)]
        options += ["--keep", str(args.keep)] if args.keep else []
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
            done = subprocess.run(
                [sys.executable, "-m", "tests.fuzz", "--one", directory, *options], capture_output=True, text=True
            )
            counts = Path(directory) / "counts"
            rejected, accepted = np.fromfile(counts, int) if counts.exists() else (0, 0)
        reached = re.findall(r"cov: (\d+)", done.stderr)[-1:] or ["none"]
        print(
            f"{name:18} {accepted + rejected:7} {accepted:9} {rejected:9} {time.perf_counter() - begin:8.1f} "
            f"{reached[0]:>13}",
            flush=True,
        )
        total += rejected, accepted
        if done.returncode:
            failed.append(name)
            print(done.stdout[-4000:], done.stderr[-1000:], file=sys.stderr)
    print(
        f"{'all':18} {total.sum():7} {total[1]:9} {total[0]:9} {time.perf_counter() - start:8.1f}\n"
        + (f"BUGS in {', '.join(failed)}" if failed else "no bug found")
    )
    return 1 if failed else 0


def fuzz(target, runs, seed, keep, directory):
    """Does not return: libFuzzer ends the process, with status 0 after the last run."""
    import atheris

    with atheris.instrument_imports(include=["deltanet_ref"]):
        from tests.fuzz import readers

    readers.tokenizers.TEMPLATE_SECONDS = 2
    readers.make_good_files(good := directory / "good")
    shutil.copytree(good, work := directory / "work")
    (seeds := directory / "seeds").mkdir()
    for i, raw in enumerate(originals := readers.TARGETS[target].seeds(good)):
        (seeds / str(i)).write_bytes(raw)
    kept = keep / target if keep else directory / "kept"
    kept.mkdir(parents=True, exist_ok=True)
    counts = np.memmap(directory / "counts", int, "w+", shape=2)

    def one(raw):
        counts[int(readers.read(target, work, raw))] += 1

    def changed(raw, most, seed):
        rng = np.random.default_rng(seed)
        source = rng.integers(3)
        if source == 0:
            return atheris.Mutate(raw, most)
        return mutate(raw if source == 1 else originals[rng.integers(len(originals))], rng, most)

    atheris.Setup(
        [
            sys.argv[0],
            f"-runs={runs}",
            f"-seed={seed}",
            f"-timeout={SECONDS}",
            f"-rss_limit_mb={MEGABYTES}",
            f"-artifact_prefix={Path.cwd()}/",
            "-max_len=20000",
            str(kept),
            str(seeds),
            str(CORPUS / target),
        ],
        one,
        custom_mutator=changed,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
