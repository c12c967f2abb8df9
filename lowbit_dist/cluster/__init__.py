"""Launching a run: the only package that knows Ray Train.

`launch` checks everything that can be checked before a worker starts (`checks`), writes the run's folder, by
which `lowbit watch` and `lowbit runs` know it from then on (`runs.begin`), and makes attempts until
one reaches the end (`attempts`), while MLflow is fed from the run's folder (`tracking`).  A process of its
own (`driver`) starts Ray on this machine or joins the cluster at `RAY_ADDRESS` (`session`) and has Ray Train
start the workers in one process group (`fit`), which call `lowbit_dist.loop` (`worker`); what they write into
the run's folder is followed (`following`).  Nothing that matters lives in Ray: the configuration travels as a
mapping, checkpoints are found in the run's folder, so an attempt that fails is simply followed by another.
"""

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from lowbit_dist import folders, runs, tracking
from lowbit_dist.cluster.attempts import RunFailed, train_until_done
from lowbit_dist.cluster.checks import begun_otherwise, check, finished, run_lock
from lowbit_dist.cluster.following import Progress, Unbroken
from lowbit_dist.cluster.session import Stopped, signals_stop
from lowbit_dist.config import RunConfig
from lowbit_dist.record import LAYERS, METRICS, cut

__all__ = ["Progress", "RunFailed", "Stopped", "check", "launch", "train"]

log = logging.getLogger(__name__)


def launch(config: RunConfig, *, progress: Progress) -> dict[str, Any]:
    """Train `config` to its end; its summary.  A run of the same name resumes from its newest checkpoint."""
    folders.provide_home()
    check(config)
    progress = Unbroken(progress)
    for remark in config.remarks():
        progress.say(remark)
    with run_lock(config), signals_stop() as signals:
        if (summary := finished(config)) is not None:
            progress.say(f"run {config.run.name} has all of its {config.train.steps:,} steps already")
            tracking.catch_up(config, summary)
            return _numbered(config, summary)
        _begin(config, progress)
        runs.note_failure(config.run_dir, None)
        tracker = tracking.Tracker(config, progress.say)
        try:
            summary = train_until_done(config, progress, signals=signals)
        except Stopped:
            tracker.finish("KILLED")
            raise
        except Exception as error:
            runs.note_failure(config.run_dir, error)
            tracker.finish("FAILED")
            raise
        signals.are_noted = True  # the run is done; the next signal ends this at once
        try:
            tracker.finish("FINISHED", summary)
        finally:
            signals.are_noted = False
        return _numbered(config, summary)


def _begin(config: RunConfig, progress: Progress) -> None:
    """What an earlier launch has measured with another configuration is no part of this run."""
    if differences := begun_otherwise(config):
        progress.say(
            f"run {config.run.name} starts anew: it has no checkpoint, and was begun with another "
            f"configuration ({', '.join(differences[:3])})"
        )
        for name in (METRICS, LAYERS):  # who follows them sees a file that is cut
            cut(config.run_dir / name, 0)
        (config.run_dir / tracking.RUN_ID).unlink(missing_ok=True)
    runs.begin(config)


def _numbered(config: RunConfig, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary, in the run's folder too, with the number of the MLflow run that the launcher feeds."""
    numbered = {"run": summary["run"], "mlflow_run_id": None} | summary
    numbered["mlflow_run_id"] = tracking.noted_run_id(config.run_dir)
    if numbered != summary:
        with contextlib.suppress(OSError):  # a full disk is reported elsewhere
            runs.write_summary(config.run_dir, numbered)
    return numbered


class _Logged:
    """Progress for who calls from Python: events and rows are log records of this package."""

    def say(self, text: str) -> None:
        log.info("%s", text)

    def row(self, row: Mapping[str, Any]) -> None:
        log.info("step %s: %s", row.get("step"), row)


def train(config: RunConfig) -> dict[str, Any]:
    """What `lowbit train` does: train `config` to its end, or resume it; its summary.  Progress is logged."""
    return launch(config, progress=_Logged())
