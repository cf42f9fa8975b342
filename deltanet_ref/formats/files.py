"""Writing files so that a killed run never leaves half of one."""
import json
import os
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from deltanet_ref.errors import InputError, json_kind, shown

MAX_NESTING = 100


@contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`; it becomes `path` when the block ends well, and is removed when it fails.

    The bytes are on the disk (fsync) before the rename, so `path` is always either the old file or the whole new one.
    Raises InputError when `path` cannot be written.
    """
    target = Path(os.path.realpath(path))
    ensure_writable(target)
    temporary = _temporary(target)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        if os.name == "posix":
            _sync(target.parent)
    except OSError as e:
        raise InputError(f"{path}: cannot be written: {e.strerror or e}") from e
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path):
    """Yields a temporary directory beside `path`; it becomes `path` when the block ends well, else it is removed.

    Raises InputError when `path` cannot be made, or is there and not empty: nothing is overwritten.
    """
    target = Path(os.path.realpath(path))
    ensure_new_directory(target)
    temporary = _temporary(target)
    try:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, target)
    except OSError as e:
        raise InputError(f"{path}: cannot be written: {e.strerror or e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def ensure_new_directory(path):
    """Raises InputError unless a directory can be made at `path`: for use before long work. Leaves nothing behind."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise InputError(f"{path}: the directory {target.parent} does not exist: create it first")
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise InputError(f"{path}: exists already: give the name of a directory to make")
        _temporary(target).mkdir()
        _temporary(target).rmdir()
    except OSError as e:
        raise InputError(f"{path}: cannot be written: {e.strerror}") from e


def ensure_writable(path):
    """Raises InputError unless a file can be written at `path`: for use before long work. Leaves nothing behind."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise InputError(f"{path}: the directory {target.parent} does not exist: create it first")
    try:
        if target.exists() and not target.is_file():
            raise InputError(f"{path}: is not a regular file: give the name of a file to write")
        _temporary(target).touch()
        _temporary(target).unlink()
    except OSError as e:
        raise InputError(f"{path}: cannot be written: {e.strerror}") from e


def read_text(path):
    """The UTF-8 text in a file, its line ends brought to "\\n". Raises InputError."""
    try:
        return Path(path).read_text("utf-8")
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from e


def utf8(text):
    """The UTF-8 bytes of a text. Raises InputError for a lone surrogate, which JSON or a command line may bring."""
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        part = text[max(e.start - 20, 0):e.start + 20]
        raise InputError(f"the text has a lone surrogate at character {e.start}, in {shown(part)}: remove it") from e


def read_json(path):
    """The JSON object in a file, a dict. Raises InputError."""
    return parse_json(path, read_text(path))


def parse_json(where, text):
    """The JSON object in a text, a dict.

    Raises InputError, which begins with `where`: no JSON, no object, a name that appears twice in an object, values
    nested so deep that to print them would be an error.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
        if not isinstance(value, dict):
            raise InputError(f"an object is needed, this is {json_kind(value)}")
        level = [value]
        for _ in range(MAX_NESTING):
            level = [x for v in level if isinstance(v, (dict, list)) for x in (v.values() if isinstance(v, dict) else v)]
        if level:
            raise InputError(f"it is nested deeper than {MAX_NESTING} levels")
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: cannot be read as JSON: {e}") from e
    return value


def _without_duplicates(pairs):
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise InputError(f"the name {shown(twice)} appears twice")
    return value


def _temporary(target):
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
