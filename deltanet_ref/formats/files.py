"""Writing files so that a killed run never leaves half of one."""
import os
from contextlib import contextmanager
from pathlib import Path

from deltanet_ref.errors import InputError


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


def _temporary(target):
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
