"""deltanet-ref vectors: list the conformance cases, export them as files, rebuild and verify them."""

from pathlib import Path

from deltanet_ref.errors import counted

EPILOG = """\
examples:
  deltanet-ref vectors --list
  deltanet-ref vectors --out cases --cases delta            cases/delta/plain.in.safetensors and .expected.safetensors
  deltanet-ref vectors --out cases --format gguf --cases 'delta/ragged-*' packed
"""


def add_arguments(parser):
    parser.epilog = EPILOG
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--list",
        action="store_true",
        help="print every case with its sizes and flags, and the mistakes that each flag reveals",
    )
    what.add_argument("--out", metavar="DIR", help="write the inputs and expected outputs of each case as files")
    what.add_argument("--make", metavar="DIR", help="rebuild the package's vectors from the definition, in DIR")
    what.add_argument(
        "--verify", action="store_true", help="rebuild the vectors in memory and compare them with those of the package"
    )
    parser.add_argument(
        "--cases", nargs="+", metavar="PATTERN", default=["*"], help="case ids, shell patterns or groups (default: all)"
    )
    parser.add_argument(
        "--format",
        choices=("safetensors", "npz", "gguf"),
        default="safetensors",
        help="file format of --out: safetensors, npz or gguf (default safetensors)",
    )


def run(args):
    from deltanet_ref.oracle.cases import CASES, select
    from deltanet_ref.oracle.expected import VECTORS
    from deltanet_ref.oracle.make_vectors import verify_vectors, write_vectors
    from deltanet_ref.oracle.noise import FACTOR

    if args.make:
        write_vectors(args.make)
        print(f"Wrote {counted(len(CASES), 'case')} to {args.make}")
    elif args.verify:
        wrong = verify_vectors(VECTORS)
        print(
            "\n".join(wrong)
            or f"{counted(len(CASES), 'case')}: checksums, metadata and inputs are equal, "
            f"outputs agree within {FACTOR['float64']} noise floors of float64"
        )
        return 1 if wrong else 0
    elif args.list:
        print_list(select(args.cases))
    else:
        export(select(args.cases), Path(args.out), args.format)
    return 0


def print_list(cases):
    from deltanet_ref.oracle.flags import FLAGS

    for case in cases:
        sizes = " ".join(f"{letter}={number}" for letter, number in case.sizes.items())
        print(f"{case.id:28} {sizes:44} {' '.join(case.flags)}")
    print()
    for name in dict.fromkeys(flag for case in cases for flag in case.flags):
        print(f"{name:18} {FLAGS[name].catches}" + (f" ({FLAGS[name].where})" if FLAGS[name].where else ""))


def export(cases, directory, format):
    """Write the inputs to DIR/CASE-ID.in.FORMAT, the outputs with their scales and noise floors to
    DIR/CASE-ID.expected.FORMAT."""
    from deltanet_ref.oracle.cases import make_inputs
    from deltanet_ref.oracle.exchange import write_case
    from deltanet_ref.oracle.expected import expected

    for case in cases:
        inputs = make_inputs(case)
        target = directory / case.id
        target.parent.mkdir(parents=True, exist_ok=True)
        write_case(f"{target}.in.{format}", inputs)
        write_case(f"{target}.expected.{format}", expected(case).tensors())
    print(f"Wrote {counted(len(cases), 'case')} to {directory}: CASE-ID.in.{format} and CASE-ID.expected.{format}")
