"""Files that are whole at every moment, on disks that may be full."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A draft that takes the place of `file` in the end; after an error `file` is as it was."""
    draft = file.with_name(f".draft.{file.name}")  # its suffix stays: pictures are written by it
    try:
        yield draft
        draft.rename(file)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """What is written to a file, or which names are in a folder, is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """Libraries written in Rust tell of a full disk in errors of their own: here it is an OSError again.

    Their text ends as in "I/O error: No space left on device (os error 28)".
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise
