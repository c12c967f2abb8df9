"""Files and folders that appear complete or not at all, also on full disks, and locks between processes."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lowbit_dist.errors import ConfigError

POLL = 0.05  # seconds


@contextlib.contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """A draft that is renamed to `file` in the end; after an error `file` is as it was."""
    draft = file.with_name(f".draft.{file.name}")  # its suffix stays: pictures are written by it
    try:
        yield draft
        draft.rename(file)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def keep(file: Path, text: str) -> None:
    """`file` with this content; written only if it has another."""
    if not file.exists() or file.read_text() != text:
        with atomic_write(file) as draft:
            draft.write_text(text)


@contextlib.contextmanager
def atomic_folder(
    out: Path,
    *,
    needs: Callable[[], int | None] = lambda: None,
    replaces: bool = False,
    resumes: bool = False,
) -> Iterator[Path]:
    """An empty folder beside `out` that is synced and renamed to `out` in the end; after an error it is gone,
    and the folders that were made for it.

    Its name does not change, so what a killed process left is cleared by the next one; a lock keeps two
    living ones apart.  `needs` says how many bytes it will take, once that can be guessed, for the report of
    a full disk.  `replaces`: a folder that is not empty may stand at `out`, and is removed in the end.
    `resumes`: what an error or a killed process left is there again for the next one.  A link stays one: what
    it leads to is written.
    """
    named, out = out, Path(os.path.realpath(out))
    if out.is_symlink() or os.path.ismount(out):  # a link to itself; no folder can take a mount's place
        how = "is a link to itself" if out.is_symlink() else "is where a disk is mounted"
        raise ConfigError(f"--out ({named}) {how}; write a folder inside another one")
    draft = out.parent / f".{out.name}.partial"
    taken = ConfigError(f"--out ({named}) is being written by another process; wait for it, or name another")
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, [p for p in out.parents if not p.exists()])
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            draft.mkdir(exist_ok=True)
            if draft.is_symlink():  # what it leads to is not ours to clear
                raise OSError(errno.ENOTDIR, f"{draft} is a link")
            descriptor = stack.enter_context(locked(draft, timeout=0, complaint=taken))
        except OSError as error:
            if is_full(error):
                raise RuntimeError(_full(out, needs(), resumes)) from error
            raise ConfigError(
                f"--out ({named}) cannot be written: {error.strerror or error}; write a folder that can"
            ) from None
        # Another process may have renamed or removed the folder before it gave up the lock.
        if not (draft.exists() and os.path.samestat(os.fstat(descriptor), draft.stat())):
            raise taken
        if not resumes:
            clear(draft)
        full: OSError | None = None
        try:
            yield draft
            for where, _, files in os.walk(draft):
                for name in (*files, "."):
                    sync(Path(where, name))
            with _moved_away(out) if replaces else contextlib.nullcontext():
                draft.rename(out)  # an empty folder may stand there
            sync(out.parent)
        except OSError as error:
            if not is_full(error):
                raise
            full = error
        finally:
            if not resumes:
                shutil.rmtree(draft, ignore_errors=True)
        if full is not None:
            raise RuntimeError(_full(out, needs(), resumes)) from full


def _remove_empty(folders: Sequence[Path]) -> None:
    """The innermost first, as far as nothing is in them."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def check_apart(out: Path, source: Path) -> None:
    """ConfigError if what is to be written and a model, both folders, are one, or one is in the other; or if
    nothing can have the name `out`.
    """
    try:
        out.exists()
    except OSError as error:
        raise ConfigError(f"--out ({out}) cannot be written: {error.strerror}; write another") from None
    own, place = (Path(os.path.realpath(path)) for path in (source, out))
    if own == place or place in own.parents or own in place.parents:
        raise ConfigError(f"--out ({out}) must be another folder than the model's, {source}; write one")


@contextlib.contextmanager
def _moved_away(out: Path) -> Iterator[None]:
    """Inside, another folder may take the name of `out`, which is removed then; after an error it is back."""
    old = out.parent / f".{out.name}.replaced"
    shutil.rmtree(old, ignore_errors=True)
    if not out.exists():
        yield
        return
    out.rename(old)
    try:
        yield
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove all that is in a folder."""
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _full(out: Path, needs: int | None, resumes: bool) -> str:
    """What to do about a full disk, once what was written is removed, or kept."""
    size = "more space than there is"
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(out.parent).free
        if needs is not None:
            size = f"about {needs / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
    return (
        f"the disk of {out.parent} is full, and what was written of {out} is "
        f"{'kept' if resumes else 'removed'}: it needs {size}; free space there, or write another --out, "
        "and start again"
    )


@contextlib.contextmanager
def locked(
    path: Path,
    *,
    shared: bool = False,
    timeout: float | None = None,
    complaint: Exception | None = None,
    if_possible: bool = False,
) -> Iterator[int]:
    """Hold the lock of a file, which is made if need be, or of a folder; gives its descriptor.

    The lock ends with its process, whatever ends it.  `shared`: with others that share it, of a file that
    exists.  While another process holds it, wait for `timeout` seconds (None: without end), then raise
    `complaint`, or BlockingIOError.  `if_possible`: go without on a file system that has no locks, where
    another OSError is raised otherwise.
    """
    mode = os.O_RDONLY if shared or path.is_dir() else os.O_WRONLY | os.O_CREAT
    descriptor = os.open(path, mode, 0o666)
    try:
        operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(descriptor, operation if deadline is None else operation | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if deadline is not None and time.monotonic() >= deadline:
                    raise complaint or error from None
                time.sleep(POLL)
            except OSError:
                if not if_possible:
                    raise
                break
        yield descriptor
    finally:
        os.close(descriptor)


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
