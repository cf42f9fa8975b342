"""What the commands that run a model share: its options, loading it, attaching adapters."""
import math
import os
import sys

from deltanet_ref.backends import BACKENDS
from deltanet_ref.errors import InputError, printable
from deltanet_ref.model.weights import MODES


def add_model_arguments(parser):
    parser.add_argument("model", metavar="MODEL", help="a .gguf file, or a directory with config.json and safetensors")
    parser.add_argument("--backend", default="auto", metavar="NAME",
                        help=f"{', '.join(BACKENDS)}, or auto for the fastest there is (default)")
    parser.add_argument("--dtype", default="float32", metavar="NAME",
                        help="float32 (default) or float64, of the computation")
    parser.add_argument("--weights", default="auto", metavar="MODE",
                        help=f"of a GGUF: {', '.join(MODES)}; mapped decodes a tensor at each use, expanded once; auto (default) "
                             "keeps what is slow to decode, if half of the free memory holds it")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")


def add_adapter_argument(parser):
    parser.add_argument("--adapter", action="append", default=[], metavar="FILE[=SCALE]",
                        help="attach an adapter, with SCALE (default 1); may be given several times")


def load(args):
    """The model of these arguments, with its adapters; what loading left out is told on stderr."""
    limit_threads(args.threads)
    import deltanet_ref as dr

    model = dr.load_model(args.model, backend=args.backend, dtype=args.dtype, weights=args.weights)
    tell_notes(model.notes)
    for spec in getattr(args, "adapter", []):
        path, scale = split_scale(spec)
        adapter = dr.load_adapter(path, model)
        tell_notes(f"{path}: {note}" for note in adapter.notes)
        model.attach(adapter, scale=scale)
    if model.tokenizer is None:
        raise InputError(f"{args.model}: has no tokenizer; convert the model with its tokenizer files beside it")
    return model


def tell_notes(notes):
    """A line on stderr for each; they may hold names from files."""
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def split_scale(spec):
    """FILE or FILE=SCALE. A name with = in it is a file name if there is such a file."""
    path, equals, scale = spec.rpartition("=")
    if not equals or os.path.exists(spec):
        return spec, 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"--adapter {spec}: {scale!r} is no number; write FILE or FILE=SCALE")
    return path, number


def limit_threads(threads):
    """Let BLAS and numba use so many threads; None leaves them as they are."""
    if threads is None:
        return
    if threads < 1:
        raise InputError(f"--threads is {threads}, it must be at least 1")
    os.environ["NUMBA_NUM_THREADS"] = str(threads)  # numba reads it when it is imported
    import numpy  # noqa: F401 (its BLAS must be loaded before it can be limited)
    from threadpoolctl import threadpool_limits

    threadpool_limits(threads)


def refuse_input_as_output(output, *inputs):
    """Raises InputError when the output is one of the input files (None: not given)."""
    for path in inputs:
        if path and os.path.exists(output) and os.path.exists(path) and os.path.samefile(output, path):
            raise InputError(f"{output}: is an input too; give the output another name")


def losses_by_type(losses):
    """Lines that sum up what tensors lost by being encoded anew; "" for none. losses: model.convert.Written."""
    types, lines = dict.fromkeys(w.type for w in losses), []
    for kind in types:
        errors = {w.name: w.error for w in losses if w.type == kind}
        worst = max(errors, key=errors.get)
        mean = sum(errors.values()) / len(errors)
        lines.append(f"{len(errors)} tensors as {kind.name}: relative error {mean:.2e} on average, at most "
                     f"{errors[worst]:.2e} ({worst})\n")
    return "".join(lines)
