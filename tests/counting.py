"""Work counted instead of timed: the number of calls does not depend on the processor or its load."""

import sys


def count_calls(function, *args):
    """Calls of Python and C functions (generators count each time they resume) until function(*args) returns."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function(*args)
    finally:
        sys.setprofile(before)
    return count
