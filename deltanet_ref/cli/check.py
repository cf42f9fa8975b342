"""deltanet-ref check: judge another implementation of the gated delta rule, and report what is wrong with it."""

import json
import sys

from deltanet_ref.errors import InputError, InternalError

EPILOG = """\
examples:
  deltanet-ref check mykernel:forward --backward mykernel:backward
  deltanet-ref check mykernel:chunk_rule --array torch --backward autograd --layout fla
  deltanet-ref check --exec "./delta {in} {out}" --format gguf
  deltanet-ref vectors --out cases && ./run-on-the-phone && deltanet-ref check --results answers

A callable is forward(q, k, v, *, g, beta, S0, scale) -> (o, S_end) unless --layout or --call says otherwise; a third
value, a dict with any of gc A T U W V_new S, is judged too. See deltanet_ref/oracle/README.md.

exit status:
  0  every case passes            2  bad usage or input: nothing was judged
  1  a case fails                 3  an internal error of the kit, which is not a verdict on the implementation
"""


def add_arguments(parser):
    from deltanet_ref.oracle.layouts import NAMES, SWITCHES

    parser.epilog = EPILOG
    parser.add_argument(
        "forward", metavar="MODULE:FUNCTION", nargs="?", help="a Python callable; path/to/file.py:function works too"
    )
    parser.add_argument(
        "--backward",
        metavar="MODULE:FUNCTION",
        help="its backward: a callable that also takes do and dS_end, or `autograd` (torch, jax)",
    )
    parser.add_argument(
        "--exec",
        dest="program",
        metavar="COMMAND",
        help="judge a program, run once per case; {in} and {out} are the files it reads and writes",
    )
    parser.add_argument(
        "--results", metavar="DIR", help="judge answers computed elsewhere: DIR/CASE-ID.safetensors (.npz, .gguf)"
    )
    parser.add_argument(
        "--format",
        choices=("safetensors", "npz", "gguf"),
        default="safetensors",
        help="file format of --exec (default safetensors)",
    )
    parser.add_argument(
        "--array",
        choices=("numpy", "torch", "jax", "cupy"),
        default=None,
        help="what the callable takes (default numpy; with --layout: torch if its module imports it)",
    )
    parser.add_argument("--device", metavar="NAME", help="where torch or jax arrays live, such as cuda (default cpu)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float64"),
        default="float32",
        help="precision of the inputs, and the one the answers must have (default float32)",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="PATTERN",
        default=None,
        help="case ids, shell patterns or groups (default delta); `vectors --list` lists them",
    )
    parser.add_argument(
        "--packed", action="store_true", help="without --cases: also packed cases; the callable takes cu_seqlens"
    )
    parser.add_argument(
        "--timeout", type=float, default=20.0, metavar="S", help="seconds per case (default 20); the import has 180"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    layout = parser.add_argument_group("conventions of the implementation")
    layout.add_argument("--layout", choices=tuple(NAMES), help="a predefined set of the conventions below")
    for switch, values in SWITCHES.items():
        layout.add_argument(
            f"--{switch}",
            choices=tuple(values),
            help="; ".join(f"{value}: {text}" for value, text in values.items()).replace("%", "%%"),
        )
    layout.add_argument("--call", metavar="TEXT", help="arguments of the forward, such as 'q, k, v, beta, g, state=S0'")
    layout.add_argument("--returns", metavar="NAMES", help="what the forward returns, in order, such as 'S_end, o'")
    layout.add_argument("--backward-call", metavar="TEXT", help="arguments of the backward; do and dS_end too")
    layout.add_argument("--gradients", metavar="NAMES", help="what the backward returns, in order")


def run(args):
    try:
        return check(args)
    except (InputError, InternalError, OSError):
        raise
    except Exception as error:
        raise InternalError.of(error, "checking") from error


def check(args):
    """Exit status 0 or 1 by the verdict; raises InternalError after printing it if the suspects cannot be ranked."""
    from deltanet_ref.oracle.cases import select
    from deltanet_ref.oracle.check import examine
    from deltanet_ref.oracle.layouts import SWITCHES, make_layout

    switches = {name: getattr(args, name) for name in (*SWITCHES, "call", "returns", "backward_call", "gradients")}
    layout = make_layout(args.layout or "own", **switches)
    cases = select(args.cases or ["delta", *(["packed"] if args.packed else [])], args.dtype)
    runner = make_runner(args)
    try:
        report = examine(
            runner,
            cases,
            dtype=args.dtype,
            layout=layout,
            progress=Progress(len(cases)),
            gradients=args.backward is not None if args.forward else None,
        )
    finally:
        runner.close()
    if args.results and all(result.status == "MISSING" and not result.stages for result in report.cases):
        raise InputError(report.cases[0].message)
    failure = None
    try:
        _ = report.suspects  # computed on the first access
    except Exception as error:  # the verdict stands without them
        failure = InternalError.of(error, "ranking suspects")
        report = report.without_suspects()
    if args.json:
        out = report.as_json()
        if failure:
            out["summary"]["internal_error"] = str(failure)
        print(json.dumps(out, indent=1))
    else:
        print_report(report, failure)
    if failure:
        sys.stdout.flush()
        raise failure
    return 0 if report.ok else 1


def make_runner(args):
    from deltanet_ref.oracle.runners import Program, Results, Worker

    given = [x for x in (args.forward, args.program, args.results) if x is not None]
    if len(given) != 1:
        raise InputError("give one of MODULE:FUNCTION, --exec COMMAND and --results DIR")
    if not args.timeout > 0:
        raise InputError(f"--timeout is {args.timeout:g}; it must be more than 0 seconds")
    if args.forward is None:
        for option in ("backward", "array", "device"):
            if getattr(args, option) is not None:
                raise InputError(f"--{option} needs MODULE:FUNCTION; a program writes gradients next to its outputs")
    if args.program is not None:
        return Program(args.program, format=args.format, timeout=args.timeout, dtype=args.dtype)
    if args.results is not None:
        return Results(args.results)
    array = args.array or (None if args.layout else "numpy")  # None: the worker looks at the module
    return Worker(args.forward, args.backward, array=array, device=args.device, dtype=args.dtype, timeout=args.timeout)


class Progress:
    """ "12/51 delta/plain" on the last line of a terminal."""

    def __init__(self, total):
        self.total, self.done = total, 0

    def __call__(self, case):
        self.done += 1
        if sys.stderr.isatty():
            end = "\r" if self.done < self.total else "\r\x1b[K"
            print(f"\x1b[K{self.done}/{self.total} {case.id}", end=end, file=sys.stderr, flush=True)


def print_report(report, failure=None):
    """The report as text; failure: why it has no suspects."""
    from deltanet_ref.oracle.catalogue import CATALOGUE
    from deltanet_ref.oracle.check import explanation
    from deltanet_ref.oracle.flags import FLAGS
    from deltanet_ref.oracle.noise import FACTOR

    print(f"{'case':28} {'status':10} {'error':>9}  first bad")
    for result in report.cases:
        errors = [stage.error for stage in result.stages.values() if stage.error == stage.error]
        error = f"{max(errors):.3g}x" if errors else ""
        print(f"{result.case.id:28} {result.status:10} {error:>9}  {place(result)}{explanation(result)}".rstrip())
    print(f"\nerror: multiple of the noise floor; above {FACTOR[report.dtype]} the case fails")
    if report.failed:
        stage = report.first_stage()
        if stage:
            name, result = stage
            wrong = [n for n, s in result.stages.items() if s.status != "ok"]
            right = [n for n, s in result.stages.items() if s.status == "ok"]
            print(
                f"\nfirst wrong stage: {name}, in {result.case.id} "
                f"(wrong there: {' '.join(wrong)}; right: {' '.join(right) or 'none'})"
            )
        for verdict in report.flags():
            print(
                f"flag {verdict.flag}: {verdict.failed} of {verdict.cases} fail, {verdict.failed_without} of "
                f"{verdict.cases_without} without it. It catches: {FLAGS[verdict.flag].catches}"
            )
        if failure:
            print("\nsuspects could not be ranked: an internal error of the kit, see below. The results above stand")
        elif report.suspects:
            print("\nsuspects, the likeliest first:")
            for bug, title, score in report.suspects:
                print(f"  {score:4.2f}  #{bug} {title}. {CATALOGUE[bug].sentence} ({CATALOGUE[bug].where})")
        elif stage:
            print(f"\nno known mistake matches; start at {stage[0]}")
    print(f"\n{report.summary()}")


def place(result):
    """The first bad place: "dk chunk 1 token 70 head 0 ", or an empty text."""
    bad = result.first_bad
    if bad is None:
        return ""
    return (
        " ".join(
            [
                bad["output"],
                *(f"{name} {bad[name]}" for name in ("sequence", "chunk", "token", "head") if bad[name] is not None),
            ]
        )
        + " "
    )
