"""Attempts to train a run: worker groups of Ray Train, one after another until one reaches the end.

Attempts are counted here and not by Ray Train (`max_failures=0` below), for three reasons: Ray Train never
retries an error while the process group is set up, it would retry a user's mistake, and it goes on by name
with what another launch left.
"""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lowbit_dist.cluster import worker
from lowbit_dist.cluster.checks import check_workers, gpus_per_worker, newest_checkpoint
from lowbit_dist.cluster.following import LOG, Follower, Progress
from lowbit_dist.cluster.session import Signals, Stopped, ray_lives, ray_session
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.guard import Diverged

COLLECTIVE_TIMEOUT = 1800  # seconds, for hang_timeout: auto; rank 0 may write a large checkpoint meanwhile
POLL = 0.2  # seconds
HANDED_ON = ("LOWBIT_", "NCCL_", "GLOO_", "TORCH_")  # variables that workers on other machines get too

STARTS = "starts.jsonl"  # in a run's folder: a line for each attempt

Work = Callable[[dict[str, Any]], dict[str, Any] | None]


class RunFailed(RuntimeError):
    """The run ended without a result, for another reason than the user's mistake or wish."""


@dataclass(frozen=True)
class _Failure:
    text: str  # one line
    error: str | None  # the program's own; None for what came from outside, such as a process's death
    is_final: bool = False  # it would come again for ever


def train_until_done(
    config: RunConfig, progress: Progress, work: Work = worker.train, signals: Signals | None = None
) -> dict[str, Any]:
    """`work` on every worker, again after each failure, up to `cluster.max_failures`; the run's summary.

    `Stopped` after a signal, once the workers have saved a checkpoint.
    """
    signals = signals or Signals()
    # Ray Train's own, on a disk that all machines share, as the run's folder is.
    storage = config.run_dir / ".ray"
    shutil.rmtree(storage, ignore_errors=True)
    config.stop_file.unlink(missing_ok=True)
    follower = Follower(config.run_dir, progress)
    restarts = 0  # of this launch
    before: tuple[str | None, Path | None] | None = None
    try:
        # Ray prints its own words about a worker's death to stdout.
        log = (config.run_dir / LOG).open("a")
        with log, contextlib.redirect_stdout(log), contextlib.ExitStack() as session:
            session.enter_context(ray_session(progress))
            settings = _settings(config)
            while True:
                n = config.cluster.workers
                progress.say(f"starting {n} worker{'' if n == 1 else 's'}")
                settings["restarts"] = _count_start(config)
                outcome = _fit(config, settings, work, storage, follower, signals)
                if isinstance(outcome, dict):
                    return outcome
                if signals.received is not None:
                    raise Stopped(signals.received)
                now = (outcome.error, newest_checkpoint(config.run_dir))
                # The same error at the same place would come again for ever.
                is_final = outcome.is_final or (outcome.error is not None and now == before)
                if is_final or restarts == config.cluster.max_failures:
                    times = f" after {restarts} restart{'' if restarts == 1 else 's'}" if restarts else ""
                    raise RunFailed(f"{outcome.text}{times}; see {config.run_dir / LOG}")
                before = now
                restarts += 1
                progress.say(f"{outcome.text}: restart {restarts} of at most {config.cluster.max_failures}")
                if not ray_lives():
                    session.close()
                    session.enter_context(ray_session(progress))
    finally:
        follower.read()
        shutil.rmtree(storage, ignore_errors=True)
        config.stop_file.unlink(missing_ok=True)


def _count_start(config: RunConfig) -> int:
    """How often the run was started before, by this launch and by all others."""
    file = config.run_dir / STARTS
    earlier = len(file.read_text().splitlines()) if file.exists() else 0
    with contextlib.suppress(OSError), file.open("a") as opened:  # of a full disk, others speak
        opened.write(json.dumps({"time": time.time(), "workers": config.cluster.workers}) + "\n")
    return earlier


def _settings(config: RunConfig) -> dict[str, Any]:
    """What every worker is told, once it is known that Ray has room for all of them."""
    import ray

    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    place = "the Ray cluster" if os.environ.get("RAY_ADDRESS") else "this machine"
    check_workers(config, cpus=cpus, gpus=gpus, place=place)
    return {
        "config": config.to_dict(),
        "folder": os.getcwd(),
        "gpus": gpus_per_worker(config, gpus),
        "threads": max(1, int(config.cluster.cpus_per_worker)),
        "log": str(config.run_dir / LOG),
    }


def _fit(
    config: RunConfig,
    settings: dict[str, Any],
    work: Work,
    storage: Path,
    follower: Follower,
    signals: Signals,
) -> dict[str, Any] | _Failure:
    """One attempt: a worker group from its start to its end."""
    from ray import train as ray_train
    from ray.train.torch import TorchTrainer

    train_config: Any = ray_train.RunConfig  # its stub is of Ray Train v1
    gpus = settings["gpus"]
    timeout = config.cluster.hang_timeout
    trainer = TorchTrainer(
        cast(Any, work),  # the stub has no result
        train_loop_config=settings,
        torch_config=_process_group(
            # Two processes cannot share a GPU under NCCL.
            backend="nccl" if gpus >= 1 else "gloo",
            timeout=COLLECTIVE_TIMEOUT if timeout == "auto" else max(1, round(timeout)),
        ),
        scaling_config=ray_train.ScalingConfig(
            num_workers=config.cluster.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": config.cluster.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=train_config(
            # A fresh name: Ray Train would go on with whatever it finds under an old one.
            name=f"{config.run.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(storage.resolve()),
            failure_config=ray_train.FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": _environment(settings)},
        ),
    )
    ended: list[Any] = []

    def fit() -> None:
        try:
            result: Any = trainer.fit()
            ended.append(result.return_value)
        except BaseException as error:
            ended.append(error)

    # In a thread of its own: in the main one `fit` takes SIGINT, and nothing could be followed meanwhile.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    signals.install()
    signals.are_noted = True
    asked = False
    while thread.is_alive():
        thread.join(POLL)
        follower.read()
        if signals.received is not None and not asked:
            asked = True
            name = signal.Signals(signals.received).name
            follower.progress.say(f"{name}: stopping after this step, with a checkpoint; again stops at once")
            config.stop_file.touch()
    signals.are_noted = False
    if isinstance(ended[0], BaseException):
        return _failure(ended[0])
    return _Failure("the workers stopped", None) if ended[0] is None else cast(dict[str, Any], ended[0])


def _environment(settings: dict[str, Any]) -> dict[str, str]:
    handed_on = {name: value for name, value in os.environ.items() if name.startswith(HANDED_ON)}
    threads = str(settings["threads"])
    return {
        **handed_on,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "DS_ACCELERATOR": "cuda" if settings["gpus"] else "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        **({} if settings["gpus"] else {"CUDA_VISIBLE_DEVICES": ""}),
    }


def _process_group(backend: str, timeout: int) -> Any:  # a TorchConfig
    """Ray's process group, on the network interface that carries the address by which Ray knows the machine.

    Left to themselves, gloo and NCCL choose by host name, which need not resolve, or by the interface's name.
    """
    from ray.train.torch import TorchConfig

    class Backend(TorchConfig().backend_cls):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(_choose_interface)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> type:
            return Backend

    return Config(backend=backend, timeout_s=timeout)


def _choose_interface() -> None:
    import psutil
    import ray.util

    ip = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == ip for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _failure(error: BaseException) -> _Failure:
    """What went wrong first, in one line; a user's mistake is raised again as what it is."""
    from ray.train import WorkerGroupError

    if not isinstance(error, WorkerGroupError):
        cause = getattr(error, "controller_failure", error)
        return _Failure(f"the workers could not be started, or Ray was lost ({_last_line(cause)})", None)
    failures = sorted(error.worker_failures.items())
    for _, each in failures:
        if isinstance(each, ConfigError):
            raise ConfigError(str(each))
    for _, each in failures:
        if isinstance(each, Diverged):
            return _Failure(str(each), str(each), is_final=True)
    for rank, each in failures:
        if (how := _death(each)) is not None:
            return _Failure(f"worker {rank} died ({how})", None)
    # When one worker fails, the others' collectives fail after it: those say nothing of the reason.
    rank, each = min(failures, key=lambda item: (_is_collective(item[1]), item[0]))
    what = f"{type(each).__name__}: {_last_line(each)}"
    return _Failure(f"worker {rank}: {what}", None if _is_collective(each) else what)


def _death(error: BaseException) -> str | None:
    """How a worker's process ended, in Ray's words; None if it lives."""
    from ray.exceptions import RayError

    cause = getattr(error, "health_check_failure", error)
    if not isinstance(cause, RayError):
        return None
    text = " ".join(str(cause).split())
    for start in ("Worker exit detail: ", "The actor died because ", "The actor is dead because "):
        if start in text:
            return text.split(start, 1)[1].split(". ")[0][:200]
    return text[:200]


def _is_collective(error: BaseException) -> bool:
    text = str(error)
    return type(error).__name__.startswith("Dist") or any(
        word in text for word in ("gloo", "NCCL", "Connection closed by peer", "Connection reset")
    )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__
