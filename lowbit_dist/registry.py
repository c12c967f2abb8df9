"""What has a name in a configuration: this package's own classes, and those of installed packages.

A registry is a dict literal (name -> "module:class") and the entry points of one group that installed
packages declare in their metadata.  So every process of a run sees the same names, and a configuration, which
may be a stranger's, can name what is installed but never a module to import.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowbit_dist.errors import ConfigError, nearest, show

SOURCES = ("*.py", "*.c")  # what the fingerprint of a package is of


class Registry:
    """The names of one kind, for instance of training methods: what they stand for, and where it is from."""

    def __init__(self, kind: str, group: str, own: Mapping[str, str], base: type[Any]):
        """base: the class that everything of this kind derives from"""
        self.kind, self.group, self.own, self.base = kind, group, own, base

    def names(self) -> list[str]:
        """This package's own names, then those of installed packages; nothing is imported."""
        return [*self.own, *sorted({point.name for point in self._installed()} - set(self.own))]

    def load(self, name: Any) -> type[Any]:
        """The class that `name` stands for.

        ConfigError if there is none or more than one, if it cannot be imported, or is none of this kind.
        """
        field = f"{self.kind}.name ({show(name)})"
        installed = self._installed()
        known = self.names()
        if not isinstance(name, str) or name not in known:
            meant = nearest(name, known)
            advice = (
                f"did you mean {meant!r}?"
                if meant
                else "write one of them, or install the package that brings it"
            )
            raise ConfigError(f"{field} must be one of {', '.join(known)}; {advice}")
        points = [point for point in installed if point.name == name]
        claims = " and ".join(f"{_package(point)} ({point.value})" for point in points)
        if name in self.own:
            if points:
                raise ConfigError(f"{field} is lowbit-dist's own and is claimed by {claims}; uninstall that")
            return self.load_own(name)
        if len(points) > 1:
            raise ConfigError(f"{field} is claimed by {claims}; uninstall all but one of them")
        try:
            loaded = points[0].load()
        except (Exception, SystemExit) as error:  # whatever somebody else's module does
            raise ConfigError(
                f"{field} cannot be imported from {claims}: {type(error).__name__}: {error}; mend that "
                "package, or write another name"
            ) from None
        if not (isinstance(loaded, type) and issubclass(loaded, self.base)):
            raise ConfigError(
                f"{field} of {claims} is no {self.base.__name__}; mend that package, or write another name"
            )
        return loaded

    def load_own(self, name: str) -> type[Any]:
        """This package's own class of that name, whoever else claims the name."""
        return _imported(self.own[name])

    def provider(self, name: Any) -> dict[str, str]:
        """The installed package that `name` comes from, and its version with a hash of its source; empty if
        the name is this package's own, or unknown.
        """
        return {
            _package(point): f"{point.dist.version} ({fingerprint(_folders(point.module))})"
            for point in self._installed()
            if point.name == name and name not in self.own and point.dist is not None
        }

    def _installed(self) -> list[EntryPoint]:
        """A package that is found twice, for example under two paths, counts once."""
        points = {
            (point.name, point.value, _package(point)): point
            for point in _entry_points(self.group, tuple(sys.path))
        }
        return [points[key] for key in sorted(points)]


@cache
def _entry_points(group: str, path: tuple[str, ...]) -> Iterable[EntryPoint]:
    """Of a group, in what is installed on `path`: read once, as that takes as long as all else of a
    configuration.
    """
    return entry_points(group=group)


def lazily(module: str, own: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module that gives the classes of `own` by name, imported when asked for."""
    place_of = {place.partition(":")[2]: place for place in own.values()}

    def attribute(name: str) -> Any:
        if name not in place_of:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return _imported(place_of[name])

    return attribute


def _imported(place: str) -> type[Any]:
    """The class at "module:class"."""
    module, _, owner = place.partition(":")
    loaded: type[Any] = getattr(import_module(module), owner)
    return loaded


def fingerprint(paths: Iterable[Path]) -> str:
    """A hash of all source in these files and folders, wherever they are installed."""
    sha = hashlib.sha256()
    for path in paths:
        files = sorted(file for kind in SOURCES for file in path.rglob(kind)) if path.is_dir() else [path]
        for file in files:
            sha.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return sha.hexdigest()[:12]


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "a package without metadata"


def _folders(module: str) -> list[Path]:
    """Where the source of the top-level package that `module` is in lies; nothing is imported."""
    spec = find_spec(module.partition(".")[0])
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [Path(folder) for folder in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.origin else []
