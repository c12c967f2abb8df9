"""The process that talks to Ray Train: `python -m lowbit_dist.cluster.fit`, started by `driver.Driver`."""

import os
import queue
import shutil
import sys
import threading
import uuid
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from lowbit_dist.cluster.checks import check_workers, gpus_per_worker
from lowbit_dist.cluster.driver import Failure, Outcome, Work
from lowbit_dist.cluster.following import LOG
from lowbit_dist.cluster.session import ray_session
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.guard import Diverged

COLLECTIVE_TIMEOUT = 1800  # seconds, for hang_timeout: auto
HANDED_ON = ("LOWBIT_", "NCCL_", "GLOO_", "TORCH_")  # variables that workers on other machines get too


def main() -> None:
    """One Ray session, in it an attempt for each number of restarts that comes through the socket."""
    pipe = Connection(int(sys.argv[1]))
    wishes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_listen, args=(pipe, wishes, busy), daemon=True).start()
    import cloudpickle

    job = cloudpickle.loads(wishes.get())
    config, work = job["config"], job["work"]
    # Ray Train's own, on a disk that all machines share, as the run's folder is.
    storage = config.run_dir / ".ray"
    shutil.rmtree(storage, ignore_errors=True)

    def say(text: str) -> None:
        pipe.send(("say", text))

    n = config.cluster.workers
    busy.set()
    try:
        with ray_session(job["launcher"], say):
            busy.clear()
            while (restarts := wishes.get()) is not None:
                busy.set()
                say(f"starting {n} worker{'' if n == 1 else 's'}")
                outcome = _attempt(config, work, storage, restarts)
                busy.clear()
                pipe.send(("ended", outcome))
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _listen(pipe: Connection, wishes: "queue.SimpleQueue[Any]", busy: threading.Event) -> None:
    """Hand on what the launcher wants; when it has gone, so does this process."""
    try:
        while True:
            wishes.put(pipe.recv())
    except (EOFError, OSError):
        if busy.is_set():
            os._exit(1)  # Ray and the workers end with it
        wishes.put(None)


def _attempt(config: RunConfig, work: Work, storage: Path, restarts: int) -> Outcome:
    try:
        return _fit(config, {**_settings(config), "restarts": restarts}, work, storage)
    except ConfigError as mistake:
        return mistake
    except Exception as error:
        return Failure(f"Ray failed ({type(error).__name__}: {_last_line(error)})", is_rays=True)


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
) -> dict[str, Any] | Failure | None:
    """One worker group from its start to its end."""
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
    try:
        result: Any = trainer.fit()
    except Exception as error:
        return _failure(error)
    return cast("dict[str, Any] | None", result.return_value)


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


def _failure(error: BaseException) -> Failure:
    """What went wrong first, in one line; a user's mistake is raised again as what it is."""
    from ray.train import WorkerGroupError

    if not isinstance(error, WorkerGroupError):
        cause = getattr(error, "controller_failure", error)
        return Failure(
            f"the workers could not be started, or Ray was lost ({_last_line(cause)})", is_rays=True
        )
    failures = sorted(error.worker_failures.items())
    for _, each in failures:
        if isinstance(each, ConfigError):
            raise ConfigError(str(each))
    for _, each in failures:
        if isinstance(each, Diverged):
            return Failure(str(each), str(each), is_final=True)
    for rank, each in failures:
        if (how := _death(each)) is not None:
            return Failure(f"worker {rank} died ({how})")
    # When one worker fails, the others' collectives fail after it: those say nothing of the reason.
    rank, each = min(failures, key=lambda item: (_is_collective(item[1]), item[0]))
    what = f"{type(each).__name__}: {_last_line(each)}"
    return Failure(f"worker {rank}: {what}", None if _is_collective(each) else what)


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


if __name__ == "__main__":
    main()
