"""The files of a folder: links are followed, nothing is given twice, and what is left out is counted."""

import os
import stat
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path

TWICE = "links to what is read already"
SPECIAL = "pipes, sockets and devices"
EMPTY = "empty files"


def walk(folder: Path, why_left_out: Callable[[str], str | None], left_out: Counter[str]) -> list[Path]:
    """The files below `folder` in the order of their names.

    A linked file or folder is read unless it is read already: what is really there comes before what links
    lead to, so a link changes nothing of what is read without it, and one to a folder above ends no walk.
    `why_left_out` gives the reason for which a file or folder of a name is not read, or None.
    """
    paths: list[Path] = []
    seen: set[str] = set()  # real paths
    links: deque[Path] = deque()
    waiting = [(os.path.realpath(folder), folder)]
    while waiting or links:
        if not waiting:
            path = links.popleft()
            waiting.append((os.path.realpath(path), path))
        real, path = waiting.pop()
        if real in seen:
            left_out[TWICE] += 1
            continue
        seen.add(real)
        if not path.is_dir():
            paths.append(path)
            continue
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if reason := why_left_out(entry.name):
                    left_out[reason] += 1
                elif entry.is_symlink():
                    links.append(Path(entry.path))
                else:
                    waiting.append((os.path.join(real, entry.name), Path(entry.path)))
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def has_content(path: str, left_out: Counter[str]) -> bool:
    """Whether it is a file with a byte in it; OSError if that cannot be seen."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        left_out[SPECIAL] += 1
    elif not status.st_size:
        left_out[EMPTY] += 1
    else:
        return True
    return False


def without_links(paths: list[str], left_out: Counter[str]) -> list[str]:
    """`paths` without those that are another name of one before."""
    first: dict[str, str] = {}
    for path in paths:
        if first.setdefault(os.path.realpath(path), path) != path:
            left_out[TWICE] += 1
    return list(first.values())
