"""What the commands that run a model share: options, loading, adapters."""

import math
import os
import sys

from deltanet_ref.backends import BACKENDS
from deltanet_ref.backends.cores import available_cores
from deltanet_ref.cli.options import MODEL_HELP
from deltanet_ref.errors import InputError, counted, printable, shown
from deltanet_ref.model.weights import MODES


def add_model_arguments(parser, backend: str = "auto") -> None:
    """MODEL and how to run it; load reads them."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--backend",
        default=backend,
        metavar="NAME",
        help=f"{', '.join(BACKENDS)}, or auto for the fastest one (default {backend})",
    )
    parser.add_argument(
        "--dtype",
        metavar="NAME",
        help="dtype of all computation: float32, float64 (CPU) or bfloat16 (GPU) (default: bfloat16 on a GPU, float32 "
        "elsewhere)",
    )
    parser.add_argument(
        "--weights",
        default="auto",
        metavar="MODE",
        help=f"how a GGUF's weights are held: {', '.join(MODES)}. mapped decodes a tensor at each use, "
        "expanded decodes it once; auto expands types that are slow to decode, and on a GPU all, if half of the free "
        "memory is enough (default auto)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")


def add_adapter_argument(parser) -> None:
    """--adapter, several times; load attaches them."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE[=SCALE]",
        help="attach a GGUF adapter or PEFT directory, multiplied by SCALE (default 1); may be given several times",
    )


def load(args):
    """The model that the arguments name, with its adapters attached; notes on loading go to stderr."""
    limit_threads(args.threads, args.backend)
    import deltanet_ref as dr

    if args.dtype is None:
        args.dtype = "bfloat16" if dr.get_backend(args.backend).device else "float32"
    model = dr.load_model(args.model, backend=args.backend, dtype=args.dtype, weights=args.weights)
    print_notes(model.notes)
    for spec in getattr(args, "adapter", []):
        path, scale = split_scale(spec)
        adapter = dr.load_adapter(path, model)
        print_notes(f"{path}: {note}" for note in adapter.notes)
        model.attach(adapter, scale=scale)
    if model.tokenizer is None:
        raise InputError(f"{args.model}: has no tokenizer: convert the model again with its tokenizer files next to it")
    return model


def print_notes(notes) -> None:
    """One line on stderr for each note; they may contain names from files."""
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def split_scale(spec: str) -> tuple[str, float]:
    """FILE or FILE=SCALE -> path, scale. A name that contains = is a path if that file exists."""
    path, equals, scale = spec.rpartition("=")
    if not equals or os.path.exists(spec):
        return spec, 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{spec}: the scale {shown(scale)} is not a finite number; write FILE or FILE=SCALE")
    return path, number


def limit_threads(threads: int | None, backend: str) -> None:
    """Compute on this many threads, at most on the cores that the process may use (a note on stderr says so).

    None leaves the number to the environment: NUMBA_NUM_THREADS or all cores. Raises InputError for less than 1.
    The numpy backend's threads are those of NumPy's BLAS. The others have threads of their own, and NumPy's BLAS gets
    one: what is left to it is small, and its threads spin while they wait for one another.
    """
    if threads is not None and threads < 1:
        raise InputError(f"--threads is {threads}, it must be at least 1")
    cores = available_cores()
    if threads is not None and threads > cores:
        print(
            f"note: --threads {threads}: only {counted(cores, 'core')} can be used, so {counted(cores, 'thread')} will "
            "run",
            file=sys.stderr,
        )
        threads = cores
    if threads is not None:
        os.environ["NUMBA_NUM_THREADS"] = str(threads)  # read when the backend is imported
    import numpy  # noqa: F401 (its BLAS must be loaded before it can be limited)
    from threadpoolctl import threadpool_limits

    threadpool_limits(threads if backend == "numpy" else 1)  # None: as they are


def losses_by_type(losses) -> str:
    """A line for each type, with the error of quantising; "" for none. losses: list of model.convert.Written."""
    types, lines = dict.fromkeys(w.type for w in losses), []
    for kind in types:
        errors = {w.name: w.error for w in losses if w.type == kind}
        worst = max(errors, key=errors.get)
        mean = sum(errors.values()) / len(errors)
        lines.append(
            f"{counted(len(errors), 'tensor')} as {kind.name}: relative error {mean:.2e} on average, at most "
            f"{errors[worst]:.2e} ({worst})\n"
        )
    return "".join(lines)
