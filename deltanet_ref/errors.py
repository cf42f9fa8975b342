"""The one exception that means: what was passed in is wrong, and here is how to put it right."""

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


def printable(text):
    """The text with escapes for what cannot be printed: a name from a file must not control the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value, most=200):
    """A value from outside as it appears in a message: its repr, with the middle left out when it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most // 2]} ... {text[-most // 2:]}"
