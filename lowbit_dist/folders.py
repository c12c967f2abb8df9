"""Folders that this user can write: for caches, and for each session of Ray.

A container's user may have no HOME, no entry in the password database or a home that cannot be written, and
/tmp may be full or read-only.  Libraries look at the environment when they are imported, so it is completed
(`provide_home`) before that.
"""

import contextlib
import os
import pwd
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lowbit_dist.errors import ConfigError, in_bytes, why_not_writable
from lowbit_dist.files import locked

# What libraries write in the home folder, and the variable that sends it elsewhere.
ELSEWHERE = {
    "XDG_CACHE_HOME": ".cache",
    "HF_HOME": ".cache/huggingface",
    "MPLCONFIGDIR": ".config/matplotlib",
    "TRITON_CACHE_DIR": ".triton/cache",
}
NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # where a user's name is looked for, before the database

SESSIONS = "lowbit-ray-"  # the beginning of the names of Ray's folders
ENDING = 5.0  # seconds that the last of Ray's processes take
IN_USE = "in-use"  # in such a folder: its lock is held while the session lives
SOCKET_BYTES = 107  # of the path of a Unix socket
LONGEST = "/session_2000-01-01_00-00-00_000000_4194304/sockets/dash_TaskEventsHead"  # that Ray makes in it
SESSION_BYTES = 64 << 20  # that must be free: logs, and copies of a job's source

_provided: dict[str, str] = {}


def provide_home() -> dict[str, str]:
    """Set what the environment lacks for this package, and all that it calls, to know a user and to find a
    folder for caches; what this process was provided with so far, by the variable's name.
    """
    lacking = _lacking()
    os.environ.update(lacking)
    _provided.update(lacking)
    return dict(_provided)


def cache() -> Path:
    """This user's folder for what can be made again; `provide_home` is called."""
    provide_home()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lowbit-dist")


def _lacking() -> dict[str, str]:
    lacking: dict[str, str] = {}
    home = os.environ.get("HOME", "")
    try:
        home = home or pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        if not any(os.environ.get(name) for name in NAMES):
            lacking["USER"] = str(os.getuid())
    try:
        home = home or str(_private())
        if not os.environ.get("HOME"):
            lacking["HOME"] = home
        unset = {name: place for name, place in ELSEWHERE.items() if not os.environ.get(name)}
        if "XDG_CACHE_HOME" not in unset:
            unset.pop("HF_HOME", None)  # its default is there, too
        away = {name for name, place in unset.items() if why_not_writable(Path(home, place)) is not None}
        private = _private() if away else None
        lacking |= {name: str(Path(private or home, unset[name])) for name in sorted(away)}
    except OSError:  # there is no temporary folder either: who writes there says so
        return lacking
    if "XDG_CACHE_HOME" in lacking and "HF_HOME" in unset:
        lacking.setdefault("HF_HOME", str(Path(home, ELSEWHERE["HF_HOME"])))
    return lacking


def _private() -> Path:
    """A folder in the temporary one, for this user alone; where another user has its name, a new one."""
    folder = Path(tempfile.gettempdir(), f"lowbit-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
        return folder
    return Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))


def for_sessions(owner: int) -> tuple[Path, str]:
    """Where Ray's sessions go: RAY_TMPDIR, or else the first of TMPDIR, /tmp and /var/tmp that can take one;
    and why others were passed over, "" if none was.

    ConfigError if there is none.  owner: number of the process in a session's name
    """
    passed_over: list[str] = []
    for variable, place in _places().items():
        if (why := _why_no_session(place, owner)) is None:
            return Path(place), ", ".join(passed_over)
        passed_over.append(f"{variable} ({place}) {why}" if variable != place else f"{place} {why}")
    raise ConfigError(
        f"{', '.join(passed_over)}; set RAY_TMPDIR to a folder that can be written, with "
        f"{in_bytes(SESSION_BYTES)} free and a path of at most {_longest(owner)} bytes"
    )


def _places() -> dict[str, str]:
    """Folders for sessions, the first choice first, by the variable that names them, or by themselves."""
    if asked := os.environ.get("RAY_TMPDIR"):
        return {"RAY_TMPDIR": asked}
    own = os.environ.get("TMPDIR")
    return {**({"TMPDIR": own} if own else {}), "/tmp": "/tmp", "/var/tmp": "/var/tmp"}


def _why_no_session(place: str, owner: int) -> str | None:
    if not os.path.isabs(place):
        return "is no absolute path"
    if (size := len(os.fsencode(place))) > (most := _longest(owner)):
        return f"is too long for the sockets of Ray ({size} bytes, at most {most})"
    if not os.path.isdir(place):
        return "is no folder"
    if why := why_not_writable(Path(place)):
        return f"cannot be written ({why})"
    if (free := shutil.disk_usage(place).free) < SESSION_BYTES:
        return f"is full ({in_bytes(free)} free, {in_bytes(SESSION_BYTES)} are needed)"
    return None


def _longest(owner: int) -> int:
    """Bytes that the path of a folder for sessions may have; a number behind a session's name is counted."""
    return SOCKET_BYTES - len(f"/{SESSIONS}{owner}-1{LONGEST}")


@contextlib.contextmanager
def session_folder(owner: int) -> Iterator[Path]:
    """A folder for a Ray session that is started on this machine, gone afterwards; Ray's other files go
    beside it, and its token into a home that cannot be written goes elsewhere.

    owner: number of the process that is to be found by the folder's name
    """
    parent, _ = for_sessions(owner)
    provide_home()
    _provide_token()
    remove_left_sessions()
    # It gets its name once it is locked, so that nobody takes it for one that was left.
    folder = Path(tempfile.mkdtemp(prefix=f".{SESSIONS}", dir=parent))
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = str(parent)
    try:
        with locked(folder / IN_USE, if_possible=True):
            folder = _renamed(folder, f"{SESSIONS}{owner}")
            yield folder
    finally:
        _remove(folder)
        os.environ.pop("RAY_TMPDIR")
        if before is not None:
            os.environ["RAY_TMPDIR"] = before


def _remove(folder: Path) -> None:
    """A process of Ray's that is still ending may write a file meanwhile, which keeps its folder."""
    deadline = time.monotonic() + ENDING
    shutil.rmtree(folder, ignore_errors=True)
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
        shutil.rmtree(folder, ignore_errors=True)


def _renamed(folder: Path, name: str) -> Path:
    """Under that name, or with a number behind it, as in containers that share /tmp but no numbering."""
    k = 0
    while os.path.lexists(target := folder.with_name(f"{name}-{k}" if k else name)):
        k += 1
    return folder.rename(target)


def remove_left_sessions() -> None:
    """Remove the folders of sessions whose process was killed: the lock has ended with it."""
    for place in _places().values():
        for folder in Path(place).glob(f"{SESSIONS}*"):
            with contextlib.suppress(OSError), locked(folder / IN_USE, shared=True, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)


def token_file() -> Path:
    """Where Ray's token is looked for."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def _provide_token() -> None:
    """Ray makes its token itself, but only in the home folder."""
    file = token_file()
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or file.exists():
        return
    if why_not_writable(file.parent) is None:
        return
    file = _private() / ".ray" / "auth_token"
    file.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError), open(file, "x", opener=_for_the_user_alone) as opened:
        opened.write(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(file)


def _for_the_user_alone(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
