"""The command line: find the command, let its module parse and run, turn errors into one line and an exit status.

0 done, 1 a check failed or training diverged, 2 bad usage or bad input, 3 an internal error of the conformance kit,
130 interrupted.
"""
import argparse
import importlib
import os
import sys

from deltanet_ref.errors import InputError, InternalError
from deltanet_ref.train.loop import Diverged

PROG = "deltanet-ref"

# name: (module with add_arguments(parser) and run(args) -> exit status or None, summary)
COMMANDS = {
    "info": ("deltanet_ref.cli.info", "what is in a model file"),
    "generate": ("deltanet_ref.cli.generate", "continue a text"),
    "train": ("deltanet_ref.cli.train", "make a LoRA adapter from a model and a JSONL file"),
    "eval": ("deltanet_ref.cli.evaluate", "loss, perplexity and bits per byte over a data set"),
    "pretrain": ("deltanet_ref.train.pretrain", "train a small model from scratch, all parameters"),
    "convert": ("deltanet_ref.cli.convert", "an adapter or a base model between GGUF, PEFT and HF"),
    "merge": ("deltanet_ref.cli.merge", "a base model with adapters worked in, as GGUF or HF"),
    "verify": ("deltanet_ref.cli.verify", "does this adapter fit this base, and does it do anything"),
    "routes": ("deltanet_ref.cli.routes", "an adapter and a quantised base: which way there loses least"),
    "trace": ("deltanet_ref.cli.trace", "every named tensor of a forward and its backward, in a file"),
    "diff": ("deltanet_ref.cli.diff", "where two traces part first, and why; drift of a model from itself"),
    "check": ("deltanet_ref.cli.check", "judge another implementation of the delta rule: what is wrong, and why"),
    "vectors": ("deltanet_ref.cli.vectors", "the cases that check uses, as files"),
    "demo": ("deltanet_ref.demo.demo", "adapt the embedded model, show before and after"),
}


class Parser(argparse.ArgumentParser):
    """argparse, but a usage error is an InputError: one line instead of a page."""

    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help")


def main(argv=None):
    """Run the command line and return its exit status."""
    try:
        return run(sys.argv[1:] if argv is None else argv) or 0
    except InputError as error:
        return fail(2, error)
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
        return fail(1, f"out of memory ({error}): a smaller --batch-size or --seq-len needs less")
    except KeyboardInterrupt:
        return fail(130, "interrupted")


def run(argv):
    commands = "\n".join(f"  {name:10} {summary}" for name, (_, summary) in COMMANDS.items())
    parser = Parser(prog=PROG, formatter_class=argparse.RawDescriptionHelpFormatter,
                    description="Qwen3.5 without autodiff: train LoRA adapters on GGUF models, and run them.",
                    epilog=f"commands:\n{commands}\n\nexample:\n"
                           f"  {PROG} train model.gguf data.jsonl -o adapter.gguf --steps 200\n"
                           f"  {PROG} train --help")
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument("command", nargs="?", metavar="COMMAND", choices=COMMANDS, help="one of those below")
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
    parser = Parser(prog=f"{PROG} {args.command}", description=summary[0].upper() + summary[1:] + ".",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    return module.run(parser.parse_args(argv[split + 1 :]))


def fail(status, error):
    print(f"{PROG}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status
