"""The rows that a service may lack of a run, and services that take them in the order of their steps."""

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.errors import plain
from lowbit_dist.record import METRICS, Tail
from lowbit_dist.tracking.feeder import Feeder


class Rows:
    """The rows of a run's folder that a service may lack, their steps rising."""

    def __init__(self, folder: Path):
        self._file = folder / METRICS
        self.waiting: deque[dict[str, Any]] = deque()
        self.read_anew()
        self._old = {row["time"] for row in self.waiting}  # of those that were there before this start

    def read_anew(self) -> None:
        """All of the file, whatever was taken of it."""
        self._tail = Tail(self._file)
        self.waiting.clear()
        self.read()

    def read(self) -> None:
        """What was added."""
        for row in self._tail.rows():
            # A resumed run measures steps again, and the file that its rows were cut from is read anew.
            while self.waiting and self.waiting[-1]["step"] >= row["step"]:
                self.waiting.pop()
            self.waiting.append(row)

    @property
    def are_new(self) -> bool:
        """Whether this start has measured any.

        Services' packages take seconds to import: not before the first step, for which all workers wait.
        """
        return bool(self.waiting) and self.waiting[-1]["time"] not in self._old


class RowFeeder(Feeder):
    """Feeds a service that takes rows in the order of their steps: those behind the newest that it has.

    What it has is asked for whenever it is opened.  A run that goes back to a checkpoint measures some steps
    again: what the service has stays as it is.
    """

    service: ClassVar[str]  # what people call it
    package: ClassVar[str]  # its Python package; its field in `tracking` and its extra are called the same
    meanwhile = "training continues, and its rows wait"

    def __init__(self, config: RunConfig, say: Callable[[str], None]):
        super().__init__(self.service)
        self.config, self.say = config, say
        self.rows = Rows(config.run_dir)
        self.newest: int | None = None  # the newest step that the service has, while it is open
        self.thread.start()

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """ConfigError if the service cannot be fed; quick, and asks no server."""
        try:
            version(cls.package)
        except PackageNotFoundError:
            raise ConfigError(
                f"tracking.{cls.package} ({plain(getattr(config.tracking, cls.package))}) needs the package "
                f"{cls.package}, which is not installed; run: pip install 'lowbit-dist[{cls.package}]'"
            ) from None

    def finish(self, status: str, summary: Mapping[str, Any]) -> bool:
        """Send what is left and end it as FINISHED, FAILED or KILLED; whether the service has all."""
        is_complete = self.close()
        if is_complete and self.newest is None:  # nothing was measured: it is not begun
            return True
        return is_complete and self._attempt(partial(self._end, status, summary))

    @abstractmethod
    def _open(self) -> int:
        """Begin the run there or resume it; the newest step that it has, -1 for none."""

    @abstractmethod
    def _log(self, rows: Sequence[Mapping[str, Any]]) -> None: ...

    @abstractmethod
    def _end(self, status: str, summary: Mapping[str, Any]) -> None: ...

    def _is_behind(self) -> bool:
        self.rows.read()
        is_due = self.newest is not None or self.closing.is_set() or self.rows.are_new
        return bool(self.rows.waiting) and is_due

    def _catch_up(self) -> None:
        if self.newest is None:
            self.newest = self._open()
        if rows := [row for row in self.rows.waiting if row["step"] > self.newest]:
            self._log(rows)
            self.newest = rows[-1]["step"]
        self.rows.waiting.clear()

    def _lose(self) -> None:
        self.newest = None
        self.rows.read_anew()
