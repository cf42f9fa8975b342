"""Atomic writing, and reading of text and JSON with errors in one line."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltanet_ref.errors import InputError, shown

MAX_NESTING = 100  # levels of JSON objects and arrays


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path in the directory of `path`; renames it to `path` on success, removes it on failure.

    The data is on disk (fsync) before the rename: even after a kill, `path` is either the old file or the complete new
    one. Raises InputError when `path` cannot be written.
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
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yields a temporary directory next to `path`; renames it to `path` on success, removes it on failure.

    Raises InputError when `path` cannot be created, or exists and is not an empty directory.
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


def ensure_new_directory(path: Path | str) -> None:
    """Raises InputError unless a directory can be created at `path`; to be called before long work."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise InputError(f"{path}: the directory {target.parent} does not exist: create it first")
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise InputError(f"{path}: exists already: give the name of a new directory")
        _temporary(target).mkdir()
        _temporary(target).rmdir()
    except OSError as e:
        raise InputError(f"{path}: cannot be written: {e.strerror}") from e


def ensure_writable(path: Path | str) -> None:
    """Raises InputError unless a file can be written at `path`; to be called before long work."""
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


def read_text(path: Path | str) -> str:
    """Reads a UTF-8 text file; line ends become "\\n". Raises InputError."""
    try:
        return Path(path).read_text("utf-8")
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: is not UTF-8 text ({e.reason} at byte {e.start})") from e


def utf8(text: str) -> bytes:
    """Encodes a text. Raises InputError for a lone surrogate, which JSON or a command line may contain."""
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        part = text[max(e.start - 20, 0) : e.start + 20]
        raise InputError(f"the text has a lone surrogate at character {e.start}, in {shown(part)}: remove it") from e


def read_json(path: Path | str) -> dict:
    """Reads a file that holds a JSON object. Raises InputError, as parse_json."""
    return parse_json(path, read_text(path))


def parse_json(where: Path | str, text: str) -> dict:
    """Parses a text that holds a JSON object.

    Raises InputError, which begins with `where`: invalid JSON, another value than an object, a name that appears twice
    in an object, or nesting beyond MAX_NESTING, which Python could not print.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
        if not isinstance(value, dict):
            raise InputError(f"expected a JSON object, found {type(value).__name__}")
        level = [value]
        for _ in range(MAX_NESTING):
            level = [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]
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
