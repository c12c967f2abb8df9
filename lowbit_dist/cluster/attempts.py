"""Attempts to train a run: worker groups of Ray Train, one after another until one reaches the end.

Attempts are counted here and not by Ray Train (`max_failures=0` in `fit`), for three reasons: Ray Train never
retries an error while the process group is set up, it would retry a user's mistake, and it resumes by
name what another launch left.
"""

import signal
from pathlib import Path
from typing import Any

from lowbit_dist.cluster import worker
from lowbit_dist.cluster.checks import newest_checkpoint
from lowbit_dist.cluster.driver import Change, Driver, Failure, Outcome, Work
from lowbit_dist.cluster.following import LOG, Follower, Progress
from lowbit_dist.cluster.session import Signals, Stopped
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.heartbeat import Reason, has_stepped, note_start

POLL = 0.2  # seconds


class RunFailed(RuntimeError):
    """The run ended without a result, for another reason than the user's mistake or wish.

    recurs: it is what training does, and would do again
    """

    def __init__(self, text: str, *, recurs: bool = False):
        super().__init__(text)
        self.recurs = recurs


def train_until_done(
    config: RunConfig, progress: Progress, work: Work = worker.train, signals: Signals | None = None
) -> dict[str, Any]:
    """`work` on every worker, again after each failure, up to `cluster.max_failures`; the run's summary.

    `Stopped` after a signal: at once before they have made a step, else once they have saved a checkpoint.
    """
    signals = signals or Signals()
    config.stop_file.unlink(missing_ok=True)
    follower = Follower(config.run_dir, progress)
    reason: Reason = "begin" if newest_checkpoint(config.run_dir) is None else "resume"
    restarts = 0  # of this launch, after failures
    before: tuple[str | None, Path | None] | None = None
    driver: Driver | None = None
    probed: set[str] = set()
    try:
        while True:
            driver = driver or Driver(config, work, probed)
            start = note_start(config.run_dir, reason)
            reason = "restart"
            driver.fit(start)
            outcome = _followed(driver, follower, config, signals, probed, start.number)
            if isinstance(outcome, dict):
                return outcome
            if isinstance(outcome, ConfigError):
                raise outcome
            if signals.received is not None:
                raise Stopped(signals.received)
            if isinstance(outcome, Change):
                config.stop_file.unlink(missing_ok=True)
                progress.say(f"{outcome.text}: starting again from the checkpoint of this step")
                continue
            failure = outcome or Failure("the workers stopped")
            config.stop_file.unlink(missing_ok=True)
            now = (failure.error, newest_checkpoint(config.run_dir))
            # The same error at the same place would come again for ever.
            is_final = failure.is_final or (failure.error is not None and now == before)
            if is_final or restarts == config.cluster.max_failures:
                times = f" after {restarts} restart{'' if restarts == 1 else 's'}" if restarts else ""
                text = f"{failure.text}{times}; see {config.run_dir / LOG}"
                raise RunFailed(text, recurs=failure.is_final)
            before = now
            restarts += 1
            progress.say(f"{failure.text}: restart {restarts} of at most {config.cluster.max_failures}")
            if failure.ray_failed:
                driver.close()
                driver = None
    finally:
        if driver is not None:
            driver.close()
        follower.read()
        config.stop_file.unlink(missing_ok=True)


def _followed(
    driver: Driver, follower: Follower, config: RunConfig, signals: Signals, probed: set[str], start: int
) -> Outcome:
    """One attempt, start number `start` of the run, to its end."""
    signals.are_noted = True
    asked, n_rows = False, follower.n_rows
    try:
        while True:
            for kind, content in driver.messages(POLL):
                if kind == "ended":
                    follower.read()
                    return content  # type: ignore[no-any-return]
                if kind == "probed":
                    probed |= content
                else:
                    follower.progress.say(content)
            follower.read()
            if signals.received is not None and not asked:
                asked = True
                # Before its workers have made a step there is nothing to save.
                if follower.n_rows == n_rows and not has_stepped(config.run_dir, start):
                    raise Stopped(signals.received)
                name = signal.Signals(signals.received).name
                follower.progress.say(
                    f"{name}: stopping after this step, with a checkpoint; again stops at once"
                )
                config.stop_file.touch()
    finally:
        signals.are_noted = False
