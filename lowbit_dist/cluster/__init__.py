"""Launching a run: the only package that knows Ray Train.

`launch` checks everything that can be checked before a worker starts (`checks`) and makes attempts until one
reaches the end (`attempts`).  A process of its own (`driver`) starts Ray on this machine or joins the cluster
at `RAY_ADDRESS` (`session`) and has Ray Train start the workers in one process group (`fit`), which call
`lowbit_dist.loop` (`worker`); what they write into the run's folder is followed (`following`).  Nothing that
matters lives in Ray: the configuration travels as a mapping, checkpoints are found in the run's folder, so an
attempt that fails is simply followed by another one.
"""

import logging
from collections.abc import Mapping
from typing import Any

from lowbit_dist import runs, tracking
from lowbit_dist.cluster.attempts import RunFailed, train_until_done
from lowbit_dist.cluster.checks import check, finished, run_lock
from lowbit_dist.cluster.following import Progress
from lowbit_dist.cluster.session import Stopped, signals_stop
from lowbit_dist.config import RunConfig

__all__ = ["Progress", "RunFailed", "Stopped", "check", "launch", "train"]

log = logging.getLogger(__name__)


def launch(config: RunConfig, *, progress: Progress) -> dict[str, Any]:
    """Train `config` to its end; its summary.  A run of the same name resumes from its newest checkpoint."""
    check(config)
    for remark in config.remarks():
        progress.say(remark)
    with run_lock(config), signals_stop() as signals:
        if (summary := finished(config)) is not None:
            progress.say(f"run {config.run.name} has all of its {config.train.steps:,} steps already")
            tracking.catch_up(config, summary)
            return summary
        runs.note_failure(config.run_dir, None)
        try:
            return train_until_done(config, progress, signals=signals)
        except Stopped:
            tracking.end(config, "KILLED")
            raise
        except Exception as error:
            runs.note_failure(config.run_dir, error)
            tracking.end(config, "FAILED")
            raise


class _Logged:
    """Progress for who calls from Python: events and rows are log records of this package."""

    def say(self, text: str) -> None:
        log.info("%s", text)

    def row(self, row: Mapping[str, Any]) -> None:
        log.info("step %s: %s", row.get("step"), row)


def train(config: RunConfig) -> dict[str, Any]:
    """What `lowbit train` does: train `config` to its end, or resume it; its summary.  Progress is logged."""
    return launch(config, progress=_Logged())
