"""What the commands share: the spelling of options, the rule for existing outputs, progress on a terminal."""

import os
import re
import sys
from argparse import ArgumentParser, BooleanOptionalAction
from contextlib import contextmanager
from pathlib import Path

from deltanet_ref.errors import InputError

MODEL_HELP = "a .gguf file, or a directory with config.json and safetensors"


def flag(name: str) -> str:
    """The command line's spelling of a Python option: --seq-len for seq_len."""
    return "--" + name.replace("_", "-")


def with_flags(text: str, options: dict) -> str:
    """The text with the command line's spelling of the Python options in backticks: `seq_len` becomes --seq-len.

    `truncate=True` becomes --truncate, `mask_prompt=False` --no-mask-prompt. options: the parsed arguments of the
    command; other names stay as they are.
    """

    def spelled(match):
        name, value = match.groups()
        return flag(f"no_{name}" if value == "False" else name) if name in options else match[0]

    return re.sub(r"`(\w+)(?:=(True|False))?`", spelled, text)


def add_switch(parser: ArgumentParser, name: str, default: bool, help: str) -> None:
    """--NAME and --no-NAME."""
    parser.add_argument(flag(name), action=BooleanOptionalAction, help=f"{help} (default {'on' if default else 'off'})")
    parser.set_defaults(**{name: default})  # given above, some Python versions would print it a second time


def add_type_argument(container: ArgumentParser, choices, help: str, **options) -> None:
    """--type NAME, in capitals too, as info prints types."""
    container.add_argument("--type", type=str.lower, choices=tuple(choices), metavar="NAME", help=help, **options)


def add_output_arguments(parser: ArgumentParser, metavar: str, help: str, replaces: str = "", **options) -> None:
    """-o and --force; check_output reads them. replaces: what may be overwritten without --force, "an adapter"."""
    parser.add_argument("-o", "--output", metavar=metavar, help=help, **({"required": True} | options))
    without = f"; without --force only {replaces} is replaced" if replaces else ""
    parser.add_argument(
        "--force",
        action="store_true",
        help=f"overwrite an existing file{without} (inputs and directories are never overwritten)",
    )


def check_output(args, inputs=(), replaces=lambda path: False) -> None:
    """Raise InputError if args.output is one of the inputs, or an existing file that only --force overwrites.

    inputs    paths, None for those that were not given
    replaces  path -> whether that file may be overwritten without --force; may raise InputError for other kinds of file
    """
    output = Path(args.output)
    if not output.exists():
        return
    for path in inputs:
        if path and os.path.exists(path) and os.path.samefile(output, path):
            raise InputError(f"{output}: is an input too; give the output another name")
    if args.force or not output.is_file() or not output.stat().st_size:
        return
    try:
        same_kind = replaces(output)
    except InputError:
        same_kind = False
    if not same_kind:
        raise InputError(f"{output}: exists already; give the output another name, or overwrite it with --force")


@contextmanager
def progress(what: str):
    """Yields update(done, total), which shows a progress bar on stderr if that is a terminal.

    The bar appears with the first call whose done < total, and is removed when the block ends.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(what, total=None)

    def update(done, total):
        bar.update(task, completed=done, total=total)
        if done < total:
            bar.start()

    try:
        yield update
    finally:
        bar.stop()
