"""What the commands that run a model share: its options, loading it, attaching adapters."""
import os
import sys

from deltanet_ref.backends import BACKENDS
from deltanet_ref.errors import InputError


def add_model_arguments(parser):
    parser.add_argument("model", metavar="MODEL", help="a .gguf file, or a directory with config.json and safetensors")
    parser.add_argument("--backend", default="auto", metavar="NAME",
                        help=f"{', '.join(BACKENDS)}, or auto for the fastest there is (default)")
    parser.add_argument("--dtype", default="float32", metavar="NAME",
                        help="float32 (default) or float64, of the computation")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")


def add_adapter_argument(parser):
    parser.add_argument("--adapter", action="append", default=[], metavar="FILE[=SCALE]",
                        help="attach an adapter, with SCALE (default 1); may be given several times")


def load(args):
    """The model of these arguments, with its adapters; what loading left out is told on stderr."""
    limit_threads(args.threads)
    import deltanet_ref as dr

    model = dr.load_model(args.model, backend=args.backend, dtype=args.dtype)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    for spec in getattr(args, "adapter", []):
        path, scale = split_scale(spec)
        model.attach(dr.load_adapter(path, model), scale=scale)
    if model.tokenizer is None:
        raise InputError(f"{args.model}: has no tokenizer; convert the model with its tokenizer files beside it")
    return model


def split_scale(spec):
    """FILE or FILE=SCALE. A name with = in it is a file name if there is such a file."""
    path, equals, scale = spec.rpartition("=")
    if not equals or os.path.exists(spec):
        return spec, 1.0
    try:
        return path, float(scale)
    except ValueError:
        raise InputError(f"--adapter {spec}: {scale!r} is no number; write FILE or FILE=SCALE") from None


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
