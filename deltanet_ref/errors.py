"""The one exception that means: what was passed in is wrong, and here is how to put it right."""


class InputError(ValueError):
    """Bad input from outside: a file, a shape, an option. Its text is one line that names the remedy.

    The command line prints it and exits with status 2; any other exception is a bug of ours.
    """
