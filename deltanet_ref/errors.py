"""InputError: what was passed in is wrong, and here is the remedy. InternalError: a bug of the conformance kit."""
import traceback
from pathlib import Path

LONGEST = 4000


class InputError(ValueError):
    """Bad input from outside: a file, a shape, an option. Its text is one line that names the remedy.

    The command line prints it and exits with status 2; any other exception is a bug of ours. Names and values from
    files are part of the text: what cannot be printed becomes an escape, and the middle of an endless text is left out.
    """

    def __init__(self, text):
        text = " ".join(str(text).split())
        if len(text) > LONGEST:
            text = f"{text[:LONGEST // 2]} ... {text[-LONGEST // 2:]}"
        super().__init__(printable(text))


class InternalError(RuntimeError):
    """A bug of the conformance kit, kept apart from its verdict: the command line prints it and exits with status 3.

    details  the traceback of the exception behind it
    """

    def __init__(self, text, details=""):
        super().__init__(text, details)        # both, so that it can be pickled
        self.details = details

    def __str__(self):
        return self.args[0]

    @classmethod
    def of(cls, error: Exception, while_doing: str) -> "InternalError":
        """The InternalError that reports an unexpected exception."""
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = (f"internal error of the conformance kit while {while_doing}: {type(error).__name__}: {error} "
                f"({Path(frame.filename).name}:{frame.lineno}). This is not a verdict on the implementation. Please "
                "report it, with the traceback that follows, to the issue tracker of deltanet_ref")
        return cls(printable(" ".join(text.split())), "".join(traceback.format_exception(error)))


def printable(text):
    """The text with escapes for what cannot be printed: a name from a file must not control the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
