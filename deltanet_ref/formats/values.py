"""What a value of a file's metadata is; it may be anything, an array too."""

import numpy as np


def is_text(value, text: str) -> bool:
    """Whether it is this text."""
    return isinstance(value, str) and value == text


def is_whole(value) -> bool:
    """Whether it is one integer, bool excluded."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_real(value) -> bool:
    """Whether it is one integer or floating-point number, bool excluded."""
    return is_whole(value) or isinstance(value, (float, np.floating))
