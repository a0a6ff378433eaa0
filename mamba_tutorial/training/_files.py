"""Files that are whole at any time, and that one process has at a time."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

if os.name == "nt":
    import msvcrt
else:
    import fcntl


def file_place(name: str, path: str | Path) -> Path:
    """Return the whole path of a file, links followed, or raise ValueError if none can be there."""
    path = Path(path).resolve()
    if not path.parent.is_dir():
        raise ValueError(f"{name} is {path}, expected a file in a folder that exists")
    if path.exists() and not path.is_file():
        raise ValueError(f"{name} is {path}, expected a file, not a folder or a device")
    return path


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other runs from a file. The lock ends with its process, however that ends."""
    lock = path.with_name(path.name + ".lock")
    with lock.open("a") as file:
        if not _locked(file):
            raise ValueError(f"checkpoint {path} is in use by another run, expected one at a time")
        try:
            yield
        finally:
            with suppress(OSError):  # Windows does not remove an open file
                lock.unlink()


def _locked(file: TextIO) -> bool:
    """Lock a file until it is closed; return whether no other process has locked it."""
    try:
        if os.name == "nt":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True  # a file system without locks: network disks of clusters are used so
    try:  # a run that ends removes the file, perhaps after it was opened here
        return os.path.samestat(os.fstat(file.fileno()), Path(file.name).stat())
    except FileNotFoundError:
        return False


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a file in one piece: whoever reads it finds the old one or the new one, whole."""
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is reported without a name
        raise
    finally:
        draft.unlink(missing_ok=True)


def without_nan(value: object) -> object:
    """The same, with None for each number that JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
