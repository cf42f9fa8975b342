"""deltanet-ref diff: where two traces first diverge, and why; or how far a model drifts from itself."""

import json
import math
import re
from itertools import groupby

from deltanet_ref.cli.trace import add_token_arguments, read_tokens
from deltanet_ref.errors import InputError, counted

FAILED = ("DIFF", "SHAPE", "NONFINITE")
EPILOG = """\
THEIRS is a trace of the same tokens by another implementation (docs/trace.md). Exit status 0: equal, 1: different, 2:
bad input.

example:
  deltanet-ref diff ours.safetensors theirs.safetensors
  deltanet-ref diff ours.safetensors theirs.safetensors --partial --json
  deltanet-ref diff --drift model.gguf -p "A text to read."
"""


def add_arguments(parser):
    parser.epilog = EPILOG
    parser.add_argument("traces", nargs="*", metavar="OURS THEIRS", help="two files written by trace, ours first")
    parser.add_argument("--partial", action="store_true", help="THEIRS may lack tensors")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="maximum relative RMS error of a forward tensor; ten times as much for gradients, and ten "
        "times for single rows (default: by the coarser dtype of the two; 3e-5 for float32)",
    )
    parser.add_argument(
        "--drift",
        metavar="MODEL",
        help="compare a model with itself instead, layer by layer: one token per call with all tokens "
        "at once, and float32 with float64",
    )
    add_token_arguments(parser, required=False)
    parser.add_argument("--all", action="store_true", help="print a line for every tensor, also for those that agree")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args):
    if args.tolerance is not None and not args.tolerance > 0:
        raise InputError(f"--tolerance is {args.tolerance}; it must be greater than 0")
    return run_drift(args) if args.drift else run_diff(args)


# ---- two traces


def run_diff(args):
    from deltanet_ref.oracle.diff import diff_traces
    from deltanet_ref.oracle.trace import read_trace

    if len(args.traces) != 2 or args.tokens is not None or args.prompt is not None:
        raise InputError("give two traces, OURS and THEIRS, or --drift MODEL with --tokens or -p")
    ours, theirs = (read_trace(path) for path in args.traces)
    result = diff_traces(ours, theirs, tolerance=args.tolerance, partial=args.partial)
    if args.json:
        print(json.dumps(as_json(result), indent=1))
    else:
        print_diff(result, ours, theirs, args.all)
    return 0 if result.equal() else 1


def as_json(result):
    """The JSON object of --json, from a TraceDiff."""
    first = result.first()
    return {
        "summary": {
            "equal": result.equal(),
            "tolerance": result.tolerance,
            "reasons": result.reasons,
            "first": first and first.name,
            "unknown": result.unknown,
        }
        | {status: result.count(status) for status in ("ok", "DIFF", "SHAPE", "MISSING", "NONFINITE")},
        "tensors": [
            {
                "name": row.name,
                "status": row.status,
                "error": finite(row.error),
                "worst_row": finite(row.worst),
                "largest": finite(row.largest),
                "first_bad": {"token": row.token, "head": row.head},
                "where": row.where,
            }
            for row in result.rows
        ],
    }


def finite(x):
    """x, or None where it is not finite: JSON has no infinity."""
    return x if x is not None and math.isfinite(x) else None


def print_diff(result, ours, theirs, every):
    for side, trace in (("ours", ours), ("theirs", theirs)):
        print(f"{side + ':':7} {trace.model}, {trace.dtype}, by {trace.version}")
    print(
        f"{counted(len(ours.tokens), 'token')}; tolerance {result.tolerance:g}\n\n"
        f"{'tensor':32} {'status':9} {'error':>8} {'worst row':>9}  where"
    )
    first = result.first()
    for _, group in groupby(result.rows, lambda row: row.name if every else line_of(row, first)):
        rows = list(group)
        errors = [
            f"{max(values):8.1e}" if None not in values else ""
            for values in ([row.error for row in rows], [row.worst for row in rows])
        ]
        name = rows[0].name if len(rows) == 1 else f"{rows[0].name} ... {rows[-1].name.removeprefix('d.')}"
        where = rows[0].where if len(rows) == 1 else counted(len(rows), "tensor")
        print(f"{name:32} {rows[0].status:9} {errors[0]:>8} {errors[1]:>9}  {where}".rstrip())
    if result.unknown:
        print(f"\nunknown in theirs: {counted(len(result.unknown), 'name')}: {', '.join(result.unknown[:8])}")
    print("\n" + verdict(result))


def line_of(row, first):
    """The key by which rows are joined on a line: block and status, but single rows where the first divergence is."""
    if row.status in FAILED and block_of(row) == block_of(first):
        return row.name
    return row.status, block_of(row)


def block_of(row):
    """ "blk.0", "d.blk.0", or "" and "d." outside the blocks."""
    return row.name[: re.match(r"(d\.)?(blk\.\d+)?", row.name).end()]


def verdict(result):
    counts = {status: result.count(status) for status in ("ok", *FAILED, "MISSING")}
    counts = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    first = result.first()
    if first is None:
        return f"{counts}: no divergence" + ("" if result.equal() else ", but tensors are missing (see --partial)")
    lines = [f"{counts}", f"first divergence: {first.name} ({first.meaning})", f"  {first.status}: {first.where}"]
    if first.error is not None:
        place = [f"{what} {i}" for what, i in (("token", first.token), ("head", first.head)) if i is not None]
        lines[-1] += (
            f"; {'first at ' + ', '.join(place) + '; ' if place else ''}error {first.error:.2g}, worst row "
            f"{first.worst:.2g}, largest difference {first.largest:.2g}"
        )
        lines += [f"  likely: {reason}" for reason in result.reasons[:3]] or [
            "  no known mistake fits; the inputs of this tensor agree, so look at the step that computes it"
        ]
    return "\n".join(lines)


# ---- a model compared with itself


def run_drift(args):
    import deltanet_ref as dr
    from deltanet_ref.oracle.diff import TOLERANCE, drift

    if args.traces or (args.tokens is None and args.prompt is None):
        raise InputError("--drift MODEL needs --tokens or -p, and no traces")
    narrow, wide = (dr.load_model(args.drift, backend="numpy", dtype=dtype) for dtype in ("float32", "float64"))
    tolerance = TOLERANCE["float32"] if args.tolerance is None else args.tolerance
    rows = drift(narrow, wide, read_tokens(args, narrow))
    passed = all(error <= tolerance for row in rows for error in (row.decode, row.state or 0.0, row.dtype))
    if args.json:
        layers = [{key: finite(x) if isinstance(x, float) else x for key, x in row._asdict().items()} for row in rows]
        print(json.dumps({"passed": passed, "tolerance": tolerance, "layers": layers}, indent=1))
    else:
        print(
            f"{args.drift}; tolerance {tolerance:g}; relative errors, with the token of the largest\n\n"
            f"{'layer':12} {'kind':17} {'decode - prefill':>18} {'end states':>11} {'float32 - float64':>19}"
        )
        for row in rows:
            state = "" if row.state is None else f"{row.state:.1e}"
            print(
                f"{row.layer:12} {row.kind:17} {f'{row.decode:.1e} @{row.decode_token}':>18} {state:>11} "
                f"{f'{row.dtype:.1e} @{row.dtype_token}':>19}"
            )
        print("\n" + ("all within tolerance" if passed else "tolerance exceeded"))
    return 0 if passed else 1
