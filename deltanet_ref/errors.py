"""InputError, the exception for bad input, InternalError for a bug of the conformance kit, and the words of messages.

Library messages name a Python option in backticks: "`seq_len` is 1, it must be at least 2". The command line prints the
name of its own option there, --seq-len (cli/options.py), so that everybody reads the name they can change.
"""

import os
import re
import reprlib
import traceback
from pathlib import Path

LONGEST = 2000  # characters of a message
LONGEST_VALUE = 200  # characters of a value that a message quotes


class InputError(ValueError):
    """Bad input from outside: a file, a shape, an option. Its text is one line that names the remedy.

    The command line prints it and exits with status 2; any other exception is a bug of ours. Unprintable characters are
    escaped, and a text of more than LONGEST characters loses its middle.
    """

    def __init__(self, text: object):
        super().__init__(printable(shortened(" ".join(str(text).split()), LONGEST)))


class InternalError(RuntimeError):
    """A bug of the conformance kit, kept apart from its verdict: the command line prints it and exits with status 3.

    details  the traceback of the exception behind it
    """

    def __init__(self, text: str, details: str = ""):
        super().__init__(text, details)  # both, so that it can be pickled
        self.details = details

    def __str__(self):
        return self.args[0]

    @classmethod
    def of(cls, error: Exception, while_doing: str) -> "InternalError":
        """The InternalError that reports an unexpected exception."""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = (
            f"internal error of the conformance kit while {while_doing}: {type(error).__name__}: {error} "
            f"({Path(frame.filename).name}:{frame.lineno}). This is not a verdict on the implementation. Please "
            "report it, with the traceback that follows, to the issue tracker of deltanet_ref"
        )
        return cls(printable(" ".join(text.split())), "".join(traceback.format_exception(error)))


def printable(text: str) -> str:
    """The text with unprintable characters escaped: a name from a file must not control the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(text: str, longest: int) -> str:
    """The text, or its beginning and end with " ... " between them: at most `longest` characters."""
    half = (longest - 5) // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


class _ShortRepr(reprlib.Repr):
    """repr in bounded time: long strings, deep and long containers are cut."""

    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = LONGEST_VALUE
        self.maxlevel, self.maxdict, self.maxlist = 4, 8, 8


def shown(value: object) -> str:
    """repr(value) for a message, at most LONGEST_VALUE characters. Use it for every value that comes from outside."""
    return shortened(_ShortRepr().repr(value), LONGEST_VALUE)


def counted(n: int, noun: str) -> str:
    """1 tensor, 2 tensors, 1,000 tensors."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def where_to_get(path: object) -> str:
    """For the message that a path does not exist: what to do if it is a name on the Hugging Face hub, else ""."""
    name = str(path)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or name.endswith(".gguf") or os.path.exists(name.split("/")[0]):
        return ""
    return (
        f". It looks like a name on the Hugging Face hub: download the model first (hf download {name} --local-dir "
        f"{name.split('/')[1]}), or a GGUF file of it, and give that path"
    )


JSON_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


def json_kind(value: object) -> str:
    """What a value read from JSON is: "an object", "a list", "text", "true or false", "null" or "a number"."""
    return JSON_KINDS.get(type(value), "a number")
