"""A process that renders chat templates: python -P template_process.py SECONDS BYTES, one JSON value per line.

    in    [template, variables]
    out   [text, null], or [null, reason]

A template is a program from an untrusted file. jinja's sandbox denies it access to Python's objects, but not nested
loops and strings that keep doubling. This process bounds both: an alarm ends it after SECONDS, and its memory is
limited to BYTES. It imports nothing of the package, so that it starts fast.
"""

import json
import resource
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 1 << 21  # characters of a rendered conversation: 8 per token of a context of 262,144


def raise_exception(message):
    """What chat templates call to refuse a conversation."""
    raise TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON as transformers' template filter prints it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment():
    """The jinja environment that HF uses (transformers.utils.chat_template_utils): sandboxed, blocks trimmed."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return made


def limit_memory(size):
    """Limits the address space to size bytes where the system supports that; macOS does not."""
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def rendered(template, variables):
    """The text, piece by piece, so that an endless one is stopped."""
    pieces, length = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > LONGEST:
            raise TemplateError(f"it returns more than {LONGEST:,} characters")
    return "".join(pieces)


def serve(seconds, size):
    """Renders one request per line of stdin, until it ends."""
    compiled = lru_cache(maxsize=8)(environment().from_string)
    limit_memory(size)
    for line in sys.stdin:
        signal.alarm(seconds)  # not caught, so it ends the process in any state
        try:
            template, variables = json.loads(line)
            answer = json.dumps([rendered(compiled(template), variables), None])
        except Exception as error:  # a template may fail in any way
            answer = json.dumps([None, str(error) or type(error).__name__])
        signal.alarm(0)
        print(answer, flush=True)


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
