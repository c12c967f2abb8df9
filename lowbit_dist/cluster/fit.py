"""The process that talks to Ray Train: `python -m lowbit_dist.cluster.fit`, started by `driver.Driver`."""

import contextlib
import os
import queue
import shutil
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from lowbit_dist import data, machine, memory, tracking
from lowbit_dist.cluster.checks import check_workers, gpus_per_worker
from lowbit_dist.cluster.driver import Change, Failure, Outcome, Work
from lowbit_dist.cluster.failures import failure, last_line
from lowbit_dist.cluster.following import LOG
from lowbit_dist.cluster.nodes import await_worker_slots, nodes, oom_kills
from lowbit_dist.cluster.probe import CHECKED, probe
from lowbit_dist.cluster.session import STOPPING, ray_session
from lowbit_dist.cluster.watchdog import Watchdog
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.heartbeat import Start
from lowbit_dist.network import ray_address

COLLECTIVE_TIMEOUT = 1800  # seconds
# Variables that workers on other machines get, too: ours, those of the communication libraries and of the
# fabrics below them (libfabric with AWS's EFA, UCX, InfiniBand), and where libraries are.
HANDED_ON = (
    "LOWBIT_", "NCCL_", "GLOO_", "TORCH_", "FI_", "UCX_", "OFI_", "RDMAV_", "IBV_", "LD_LIBRARY_PATH"
)  # fmt: skip


def main() -> None:
    """One Ray session, in it an attempt for each start that comes through the socket."""
    pipe = Connection(int(sys.argv[1]))
    _ignore_signals()
    wishes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_listen, args=(pipe, wishes, busy), daemon=True).start()
    import cloudpickle

    job = cloudpickle.loads(wishes.get())
    config = job["config"]

    def say(text: str) -> None:
        pipe.send(("say", text))

    def end(failure: Failure) -> None:
        """For attempts that Ray Train does not see the end of: Ray and the workers end with this process."""
        pipe.send(("ended", failure))
        os._exit(1)

    busy.set()
    # Ray Train's own, on a disk that all machines share, as the run's folder is.
    storage = config.run_dir / ".ray"
    shutil.rmtree(storage, ignore_errors=True)
    try:
        with ray_session(job["launcher"], say), tracking.exported(config):
            _ignore_signals()  # Ray has handlers of its own
            fit = _Fit(config, job["work"], storage, job["probed"], pipe.send, end)
            busy.clear()
            while (start := wishes.get()) is not None:
                busy.set()
                outcome = fit.attempt(start)
                busy.clear()
                pipe.send(("ended", outcome))
    except ConfigError as mistake:
        pipe.send(("ended", mistake))
    except Exception as error:  # of Ray itself, which did not start or cannot be joined
        traceback.print_exc()
        what = "joined" if ray_address() else "started"
        text = f"Ray cannot be {what} ({type(error).__name__}: {last_line(error)})"
        # The head of a cluster that was joined before may come back.
        known = None if job["probed"] else what
        with contextlib.suppress(OSError):  # the launcher may have gone
            pipe.send(("ended", Failure(text, known, ray_failed=True)))
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _ignore_signals() -> None:
    """Whoever stops a job signals all of its processes; what becomes of this one is the launcher's to say."""
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)


def _listen(pipe: Connection, wishes: "queue.SimpleQueue[Any]", busy: threading.Event) -> None:
    """Hand on what the launcher wants; when it has gone, so does this process."""
    try:
        while True:
            wishes.put(pipe.recv())
    except (EOFError, OSError):
        if busy.is_set():
            os._exit(1)  # Ray and the workers end with it
        wishes.put(None)


class _Fit:
    """Worker groups, one after another, in one Ray session."""

    def __init__(
        self,
        config: RunConfig,
        work: Work,
        storage: Path,
        probed: set[str],
        tell: Callable[[tuple[str, Any]], None],
        end: Callable[[Failure], None],
    ):
        self.config, self.work, self.storage, self.probed = config, work, storage, probed
        self.tell, self.end = tell, end
        self.is_cluster = ray_address() is not None

    def say(self, text: str) -> None:
        self.tell(("say", text))

    def attempt(self, start: Start) -> Outcome:
        try:
            return self._attempt(start)
        except ConfigError as mistake:
            return mistake
        except Exception as error:
            return Failure(f"Ray failed ({type(error).__name__}: {last_line(error)})", ray_failed=True)

    def _attempt(self, start: Start) -> Outcome:
        import ray

        resources = ray.cluster_resources()
        cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
        gpus_each = gpus_per_worker(self.config, gpus)
        machines: list[str] | None = None
        if not self.is_cluster:
            n = check_workers(self.config, cpus=cpus, gpus=gpus, place="this machine")
        else:
            if not self.probed and self.config.cluster.start_timeout == "auto":
                check_workers(self.config, cpus=cpus, gpus=gpus, place="the Ray cluster")
            machines = await_worker_slots(self.config, self.say)
            if not machines:
                least = self.config.worker_counts()[-1]
                return Failure(f"the cluster has no room for {least} worker{'' if least == 1 else 's'}")
            self._probe(machines, gpus_each)
            n = len(machines)
        settings = {
            "config": self.config.to_dict(),
            "folder": os.getcwd(),
            "gpus": gpus_each,
            "threads": max(1, int(self.config.cluster.cpus_per_worker)),
            "log": str(self.config.run_dir / LOG),
            "start": start,
        }
        self.say(f"starting {n} worker{'' if n == 1 else 's'}")
        watch = Watchdog(self.config, start.number, machines, gpus, self.end)
        try:
            outcome = self._fit(n, machines, settings)
        finally:
            watch.close()
        if outcome is None and watch.restart_reason is not None:
            return Change(watch.restart_reason)
        return outcome

    def _probe(self, machines: list[str], gpus: int) -> None:
        """ConfigError unless each machine that is new to the run can carry it."""
        new = [node for node in nodes(machines) if node.id not in self.probed]
        if not new:
            return
        self.say(f"asking {len(new)} machine{'' if len(new) == 1 else 's'} for packages, data and folders")
        budget = probe(self.config, new, gpus=gpus)
        self.probed |= {node.id for node in new}
        self.tell(("probed", self.probed))
        if budget is not None:
            budget = budget._replace(machines=len(set(machines)))
            vocab_size = data.read_manifest(self.config.data.path).vocab_size
            memory.check_memory(self.config.with_workers(len(machines)), vocab_size, budget)
        self.say(f"{CHECKED}{', '.join(sorted(node.name for node in new))} can carry the run")

    def _fit(
        self, n: int, machines: list[str] | None, settings: dict[str, Any]
    ) -> dict[str, Any] | Failure | None:
        """One worker group from its start to its end."""
        from ray import train as ray_train
        from ray.train.torch import TorchTrainer

        train_config: Any = ray_train.RunConfig  # its stub is of Ray Train v1
        gpus = settings["gpus"]
        timeout = self.config.cluster.hang_timeout
        trainer = TorchTrainer(
            cast(Any, self.work),  # the stub has no result
            train_loop_config=settings,
            torch_config=_process_group(
                backend="nccl" if gpus else "gloo",
                # `Watchdog` is to notice first.
                timeout=COLLECTIVE_TIMEOUT if timeout == "auto" else round(2 * timeout + COLLECTIVE_TIMEOUT),
            ),
            scaling_config=cast(Any, ray_train.ScalingConfig)(  # its stub, too
                num_workers=n,
                use_gpu=gpus > 0,
                resources_per_worker={
                    "CPU": self.config.cluster.cpus_per_worker,
                    **({"GPU": gpus} if gpus else {}),
                },
                # Ray takes a machine that is lost for alive for a while, and would wait for it.
                label_selector=None if machines is None else [{"ray.io/node-id": id} for id in machines],
            ),
            run_config=train_config(
                # A fresh name: Ray Train would resume whatever it finds under an old one.
                name=f"{self.config.run.name}-{uuid.uuid4().hex[:8]}",
                storage_path=str(self.storage.resolve()),
                failure_config=ray_train.FailureConfig(max_failures=0),
                worker_runtime_env={"env_vars": _environment(settings)},
            ),
        )
        before = oom_kills(machines)

        def out_of_memory() -> str | None:
            places = [name for name, n in oom_kills(machines).items() if n > before.get(name, n)]
            return f"by the kernel of {', '.join(places)}" if places else None

        try:
            result: Any = trainer.fit()
        except Exception as error:
            return failure(error, out_of_memory)
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
        **(machine.REPEATING if settings["gpus"] else {"CUDA_VISIBLE_DEVICES": ""}),
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
        if any(address.address == ip for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


if __name__ == "__main__":
    main()
