"""The command line: find the command, let its module parse and run, turn errors into one line and an exit status.

0 done, 1 a check failed or training diverged, 2 bad usage or bad input, 3 an internal error of the conformance kit,
130 interrupted.
"""

import argparse
import importlib
import os
import sys

from deltanet_ref.cli.options import flag, with_flags
from deltanet_ref.errors import InputError, InternalError, shortened
from deltanet_ref.train.loop import Diverged

PROG = "deltanet-ref"
LONGEST_USAGE_ERROR = 400  # characters of argparse's own messages, which quote arguments whole

# name: (module with add_arguments(parser) and run(args) -> exit status or None, summary)
COMMANDS = {
    "info": ("deltanet_ref.cli.info", "print what a model or adapter holds"),
    "generate": ("deltanet_ref.cli.generate", "continue a text"),
    "train": ("deltanet_ref.cli.train", "train a LoRA adapter on a JSONL file"),
    "eval": ("deltanet_ref.cli.evaluate", "compute loss, perplexity and bits per byte on a data set"),
    "pretrain": ("deltanet_ref.cli.pretrain", "train a small model from scratch, all parameters"),
    "convert": ("deltanet_ref.cli.convert", "convert an adapter or a base model between GGUF, PEFT and HF"),
    "merge": ("deltanet_ref.cli.merge", "merge adapters into a base model, as GGUF or HF"),
    "verify": ("deltanet_ref.cli.verify", "check that an adapter fits a base model and has an effect"),
    "routes": ("deltanet_ref.cli.routes", "compare ways to combine an adapter with a quantised base model"),
    "trace": ("deltanet_ref.cli.trace", "write every named tensor of a forward and backward pass to a file"),
    "diff": ("deltanet_ref.cli.diff", "find where two traces first diverge, and why; measure a model's own drift"),
    "check": ("deltanet_ref.cli.check", "test another implementation of the delta rule and name its mistakes"),
    "vectors": ("deltanet_ref.cli.vectors", "list, export, rebuild or verify the test cases of check"),
    "demo": ("deltanet_ref.cli.demo", "adapt the embedded model and show text before and after"),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose usage errors are InputErrors: one line instead of a page."""

    def error(self, message):
        raise InputError(f"{shortened(message, LONGEST_USAGE_ERROR)}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = {}
    try:
        return run(sys.argv[1:] if argv is None else argv, options) or 0
    except InputError as error:
        return fail(2, with_flags(str(error), options))
    except InternalError as error:
        fail(3, error)
        print(error.details, file=sys.stderr)
        return 3
    except BrokenPipeError:  # the reader of our output has gone, as in `generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return fail(2, f"{error.filename}: {error.strerror}" if error.filename else error)
    except Diverged as error:
        return fail(1, error)
    except MemoryError as error:
        return fail(1, out_of_memory(error, options))
    except KeyboardInterrupt:
        return fail(130, "interrupted")


def run(argv: list[str], options: dict) -> int | None:
    """Parse and run one command; its parsed arguments are added to options, name -> value."""
    commands = "\n".join(f"  {name:10} {summary}" for name, (_, summary) in COMMANDS.items())
    parser = Parser(
        prog=PROG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Qwen3.5 without autodiff: train LoRA adapters on GGUF models, and run them.",
        epilog=f"commands:\n{commands}\n\nexample:\n"
        f"  {PROG} train model.gguf data.jsonl -o adapter.gguf --steps 200\n"
        f"  {PROG} train --help",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("command", nargs="?", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    split = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    args = parser.parse_args(argv[: split + 1])
    if args.version:
        from deltanet_ref import __version__

        print(f"{PROG} {__version__}")
        return 0
    if args.command is None:
        parser.error("no command given")
    module, summary = COMMANDS[args.command]
    module = importlib.import_module(module)
    parser = Parser(
        prog=f"{PROG} {args.command}",
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    args = parser.parse_args(argv[split + 1 :])
    options |= vars(args)
    return module.run(args)


def out_of_memory(error: MemoryError, options: dict) -> str:
    """The message for a MemoryError: what this command could do to need less."""
    first = ["--checkpoint"] if options.get("checkpoint") is False else []
    smaller = [flag(name) for name in ("batch_size", "seq_len") if name in options]
    remedies = first + ([f"a smaller {' or '.join(smaller)}"] if smaller else []) or ["a smaller model or file"]
    detail = f" ({error})" if str(error) else ""
    return f"out of memory{detail}: use {', or '.join(remedies)}"


def fail(status: int, error: object) -> int:
    """Print the error as one line on stderr and return the status."""
    print(f"{PROG}: error: {InputError(error)}", file=sys.stderr)
    return status
