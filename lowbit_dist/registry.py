"""What has a name in a configuration: this package's own classes, and those of installed packages.

A registry is a dict literal (name -> "module:class") plus the entry points of a group that installed packages
declare in their metadata, so every process of a run sees the same names, and a configuration, which may be a
stranger's, can name what is installed but never a module to import.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import Distribution, EntryPoint, entry_points
from typing import Any

from lowbit_dist.answers import ConfigError, nearest, show


class Registry:
    """Names of one kind, for instance of training methods."""

    def __init__(self, kind: str, group: str, own: Mapping[str, str]):
        self.kind, self.group, self.own = kind, group, own

    def names(self) -> list[str]:
        """This package's own first."""
        return [*self.own, *sorted({point.name for point in self._installed()} - set(self.own))]

    def load(self, name: Any) -> Any:
        """What `name` stands for; ConfigError if that is nothing, more than one thing, or cannot be imported."""
        field, known = f"{self.kind}.name ({show(name)})", self.names()
        if not isinstance(name, str) or name not in known:
            meant = nearest(name, known)
            answer = (
                f"did you mean {meant!r}?"
                if meant
                else "write one of them, or install the package that has it"
            )
            raise ConfigError(f"{field} must be one of {', '.join(known)}; {answer}")
        points = [point for point in self._installed() if point.name == name]
        claims = [f"{_package(point)} ({point.value})" for point in points]
        if name in self.own:
            claims.insert(0, "lowbit-dist")
        if len(claims) > 1:
            raise ConfigError(f"{field} is claimed by {' and '.join(claims)}; uninstall all but one of them")
        if name in self.own:
            module, _, owner = self.own[name].partition(":")
            return getattr(import_module(module), owner)
        try:
            return points[0].load()
        except Exception as error:  # whatever a module of somebody else raises
            raise ConfigError(
                f"{field} cannot be imported from {claims[0]}: {type(error).__name__}: {error}; mend that "
                "package, or write another name"
            ) from None

    def provider(self, name: str) -> dict[str, str]:
        """The installed package that `name` comes from, with its version and a hash of its files; empty for
        this package's own.
        """
        for point in self._installed():
            if point.name == name and name not in self.own and point.dist is not None:
                return {point.dist.name: f"{point.dist.version} ({_fingerprint(point.dist, point.module)})"}
        return {}

    def _installed(self) -> list[EntryPoint]:
        found = {
            (point.name, point.value, _package(point)): point for point in entry_points(group=self.group)
        }
        return list(found.values())


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unnamed package"


def _fingerprint(dist: Distribution, module: str) -> str:
    """Of the Python files of the package's own top-level module, wherever it is installed."""
    from importlib.util import find_spec
    from pathlib import Path

    sha = hashlib.sha256()
    spec = find_spec(module.partition(".")[0])
    if spec is not None and spec.submodule_search_locations:
        root = Path(next(iter(spec.submodule_search_locations)))
        files = [(str(file.relative_to(root)), file) for file in sorted(root.rglob("*.py"))]
    elif spec is not None and spec.origin:
        files = [("", Path(spec.origin))]
    else:
        files = []
    for name, file in files:
        sha.update(name.encode() + file.read_bytes())
    return sha.hexdigest()[:12]
