"""Runs as jobs of a Ray cluster: submitted, watched and stopped over HTTP, from any machine.

A job is `lowbit train` on the cluster's head, with this package's own source and the run's configuration.
What the cluster has, and whether each machine can carry the run, is found out by the job itself before a
worker starts; `submit` waits for the answer.
"""

import asyncio
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lowbit_dist import configfile, folders, tracking
from lowbit_dist.cluster.probe import CHECKED
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.network import why_no_answer
from lowbit_dist.section import Section

LOCAL = "http://127.0.0.1:8265"
GRACE = 120  # seconds that a job which is stopped has to save a checkpoint
FILE = "job.yaml"
ANSWER = 10  # seconds that the cluster has to answer a first request
POLL = 1.0  # seconds
# Of Ray: what they say of a submission is said here in other words.
NOISY = (
    "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)  # fmt: skip
_PROGRESS = re.compile(r"^lowbit: (step \d+/\d+.*)", re.MULTILINE)


class NoSuchJob(ConfigError):
    """A job's name that the cluster does not know."""


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str | None = None):
        """`address`: of Ray's dashboard; RAY_API_SERVER_ADDRESS, or this machine's, if None."""
        _show_token()
        from ray.job_submission import JobSubmissionClient

        self.address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or LOCAL
        if not re.match("https?://", self.address, re.IGNORECASE):
            raise ConfigError(
                f"--address ({self.address}) must be http://HOST:PORT of the cluster's dashboard; write "
                f"{LOCAL}, for example"
            )
        for noisy in NOISY:
            logging.getLogger(noisy).setLevel(logging.WARNING)
        # Ray prefers what it finds there, or in RAY_ADDRESS, to what it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        _check_answers(self.address)
        self._client = _answered(self.address, lambda: JobSubmissionClient(self.address))

    def submit(self, config: RunConfig, say: Callable[[str], None]) -> str:
        """Submit a run and wait until the cluster has found that nothing is missing; the job's name.

        ConfigError with the cluster's answer if something is.
        """
        config = absolute(config)
        job = self._next_name(config.run.name)
        with tempfile.TemporaryDirectory(prefix="lowbit-job-") as folder:
            package = Path(__file__).parent.parent
            shutil.copytree(package, Path(folder, package.name), ignore=shutil.ignore_patterns("__pycache__"))
            Path(folder, FILE).write_text(config.to_yaml())
            _answered(
                self.address,
                lambda: self._client.submit_job(
                    entrypoint=f"python -m {package.name} train {FILE}",
                    submission_id=job,
                    runtime_env={
                        "working_dir": folder,
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE), "PYTHONUNBUFFERED": "1"},
                    },
                    metadata={
                        "run": config.run.name,
                        "folder": str(config.run_dir),
                        "mlflow": tracking.without_password(config.tracking.mlflow or "none"),
                        "experiment": config.tracking.experiment,
                    },
                ),
            )
        say(f"submitted {job} to {self.address}")
        try:
            self._await_checks(job, say)
        except ConfigError as mistake:
            needed = configfile.providers(config.to_dict())
            if not (needed and str(mistake).startswith(("method.name ", "optimizer.name "))):
                raise
            packages = " and ".join(f"{name} {version}" for name, version in needed.items())
            raise ConfigError(  # a name that is known here, and not there
                f"the head of {self.address} cannot read this run's configuration ({mistake}); install "
                f"{packages} on all machines"
            ) from None
        return job

    def list(self) -> list[dict[str, Any]]:
        """What is known of each job of a run, the newest first."""
        infos = [info for info in _answered(self.address, self._client.list_jobs) if info.submission_id]
        return [self._described(info) for info in sorted(infos, key=lambda info: -(info.start_time or 0))]

    def newest(self, name: str) -> str:
        """The job that a name means: its own, or the newest one of the run that is called so."""
        listed = self.list()
        of_run = [job["job"] for job in listed if job["run"] == name]
        is_job = any(job["job"] == name for job in listed)
        return name if is_job or not of_run else of_run[0]

    def status(self, job: str) -> dict[str, Any]:
        """What is known of one job, with its last line of progress."""
        described = self._described(self._info(job))
        lines = _PROGRESS.findall(self._logs(job))
        return described | {"progress": lines[-1] if lines else None}

    def logs(self, job: str, *, follow: bool = False) -> Iterator[str]:
        """What a job has printed, piece by piece; with `follow`, until its end."""
        self._info(job)
        if not follow:
            yield self._logs(job)
            return
        seen, answered = 0, time.monotonic()
        while True:
            try:
                is_over = self._is_over(job)
                text = self._logs(job)
            except _Refused:  # the dashboard may be back in a moment, and the job does not need it
                if time.monotonic() - answered > GRACE:
                    raise
                time.sleep(POLL)
                continue
            answered = time.monotonic()
            if len(text) > seen:
                yield text[seen:]
                seen = len(text)
            if is_over:
                return
            for piece in self._tail(job, seen):
                yield piece
                seen += len(piece)
            time.sleep(POLL)

    def stop(self, job: str) -> dict[str, Any]:
        """Have a job save a checkpoint and end; returns when it has ended, after `GRACE` at the latest."""
        self._info(job)
        _answered(self.address, lambda: self._client.stop_job(job))
        deadline = time.monotonic() + GRACE + 30
        while not self._is_over(job) and time.monotonic() < deadline:
            time.sleep(POLL)
        return self.status(job)

    def exit_code(self, job: str) -> int:
        """Of a job that is over: that of `lowbit train`; 1 if it died without one."""
        info = self._info(job)
        if info.status == "SUCCEEDED":
            return 0
        return info.driver_exit_code or 1

    def _described(self, info: Any) -> dict[str, Any]:
        metadata = info.metadata or {}
        return {
            "job": info.submission_id,
            "run": metadata.get("run"),
            "status": str(info.status),
            "started": info.start_time and info.start_time / 1000,
            "ended": info.end_time and info.end_time / 1000,
            "folder": metadata.get("folder"),
            "mlflow": metadata.get("mlflow"),
            "message": info.message,
        }

    def _info(self, job: str) -> Any:
        try:
            return _answered(self.address, lambda: self._client.get_job_info(job))
        except _Refused as error:
            if "404" not in str(error) and "does not exist" not in str(error):
                raise
            known = ", ".join(listed["job"] for listed in self.list()[:5]) or "none yet"
            raise NoSuchJob(f"{self.address} has no job {job!r}; its newest are: {known}") from None

    def _logs(self, job: str) -> str:
        text: str = _answered(self.address, lambda: self._client.get_job_logs(job))
        return text

    def _is_over(self, job: str) -> bool:
        over: bool = self._info(job).status.is_terminal()
        return over

    def _tail(self, job: str, seen: int) -> Iterator[str]:
        """What comes after the first `seen` characters, until the connection or the job ends."""
        pieces = self._client.tail_job_logs(job)
        loop = asyncio.new_event_loop()
        try:
            while True:
                piece = loop.run_until_complete(anext(pieces, None))
                if piece is None:
                    return
                fresh, seen = piece[seen:], max(0, seen - len(piece))
                if fresh:
                    yield fresh
        except Exception:  # a connection that was cut: the next one resumes where this ended
            return
        finally:
            loop.run_until_complete(pieces.aclose())
            loop.close()

    def _next_name(self, run: str) -> str:
        """RUN-ATTEMPT: the cluster refuses a name that it has had; ConfigError while a job trains the run."""
        known = self.list()
        active = [
            listed["job"] for listed in known if listed["run"] == run and not _has_ended(listed["status"])
        ]
        if active:
            raise ConfigError(
                f"run.name ({run}) is being trained by job {active[0]}; follow it by `lowbit logs "
                f"{active[0]} --follow`, stop it by `lowbit stop {active[0]}`, or write another name"
            )
        attempts = [
            int(number)
            for name, _, number in (listed["job"].rpartition("-") for listed in known)
            if name == run and number.isdigit()
        ]
        return f"{run}-{max(attempts, default=0) + 1}"

    def _await_checks(self, job: str, say: Callable[[str], None]) -> None:
        """Hand on what the job says; its last line, if it ends with exit code 2, is the user's mistake."""
        told = 0
        while True:
            is_over = self._is_over(job)
            lines = [line for line in self._logs(job).splitlines() if line.startswith("lowbit: ")]
            lines = [line.removeprefix("lowbit: ") for line in lines]
            is_checked = any(line.startswith(CHECKED) for line in lines)
            last = len(lines) if is_over or is_checked else len(lines) - 1
            code = self.exit_code(job) if is_over else 0
            if code == 2 and lines:
                raise ConfigError(lines[-1])
            for line in lines[told:last]:
                say(line)
            told = max(told, last)
            if code:
                why = (
                    lines[-1]
                    if lines
                    else next(iter(self._info(job).message.splitlines()), "no reason given")
                )
                raise RuntimeError(f"job {job} ended before its workers started: {why}")
            if is_over or is_checked:
                return
            time.sleep(POLL)


class _Refused(RuntimeError):
    """What the cluster answered instead of what was asked for."""


def absolute(config: RunConfig) -> RunConfig:
    """The same run with the paths of this machine's folder written out: a job starts in another folder."""
    sections = {name: section for name, section in config if isinstance(section, Section)}
    changes: dict[str, dict[str, Any]] = {
        name: {field: value.absolute() for field, value in section if isinstance(value, Path)}
        for name, section in sections.items()
    }
    if "://" not in config.data.path:
        changes["data"]["path"] = str(Path(config.data.path).absolute())
    if config.tracking.mlflow is not None:
        changes["tracking"]["mlflow"] = tracking.resolve(config.tracking.mlflow)
    return config.model_copy(
        update={name: sections[name].model_copy(update=fields) for name, fields in changes.items() if fields}
    )


def _show_token() -> None:
    """Ray's client keeps its token to itself unless it is told otherwise before it is imported."""
    if os.environ.get("RAY_AUTH_TOKEN") or folders.token_file().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _check_answers(address: str) -> None:
    """ConfigError unless something listens there; Ray's client tries for long, and says little."""
    port = 443 if address.lower().startswith("https:") else 80
    if why := why_no_answer(address, port=port, timeout=ANSWER):
        raise ConfigError(
            f"--address ({address}) does not answer ({why}); write http://HOST:PORT of the cluster's "
            "dashboard, whose port is 8265 unless told otherwise"
        )


def _answered(address: str, ask: Callable[[], Any]) -> Any:
    """What the cluster answers, its complaints in one line."""
    try:
        return ask()
    except ConfigError:
        raise
    except Exception as error:
        if type(error).__name__ == "AuthenticationError":
            raise ConfigError(
                f"--address ({address}) refuses the token (401); set RAY_AUTH_TOKEN to the cluster's, or put "
                "it into ~/.ray/auth_token"
            ) from None
        if isinstance(error, OSError):  # of the connection: requests' own are among them
            raise _Refused(f"{address} does not answer any more ({type(error).__name__})") from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise _Refused(f"{address}: {lines[-1] if lines else type(error).__name__}") from error


def _has_ended(status: str) -> bool:
    return status in ("SUCCEEDED", "FAILED", "STOPPED")
