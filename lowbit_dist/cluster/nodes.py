"""The machines of a Ray cluster, and which of them a run's workers go to."""

import contextlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lowbit_dist import machine
from lowbit_dist.cluster.checks import gpus_per_worker, how_many_fit
from lowbit_dist.config import RunConfig
from lowbit_dist.network import why_no_answer

ANSWER = 3.0  # seconds that a machine has to take a connection
SETTLE = 3.0  # seconds for which a smaller number of slots must stay the same before it is taken
RETURN = 60.0  # seconds that a start waits, for start_timeout: auto


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    id: str
    ip: str
    name: str
    port: int  # of its raylet
    cpus: float  # free ones
    gpus: float

    def answers(self) -> bool:
        """Whether it takes a connection; Ray learns only after a while that a machine is gone."""
        host = f"[{self.ip}]" if ":" in self.ip else self.ip
        return why_no_answer(host, port=self.port, timeout=ANSWER) is None


def nodes(among: Iterable[str] | None = None) -> list[Node]:
    """The living machines that Ray knows, or those of them `among` some, apart from those that will go."""
    import ray
    from ray._private import state  # the public state API needs the dashboard

    free = state.available_resources_per_node()
    leaving = leaving_nodes()
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["NodeManagerHostname"],
            node["NodeManagerPort"],
            free.get(node["NodeID"], {}).get("CPU", 0.0),
            free.get(node["NodeID"], {}).get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving and (among is None or node["NodeID"] in among)
    ]


def leaving_nodes() -> set[str]:
    """Machines that are about to be taken away: preempted, or drained by an autoscaler or a person."""
    from ray._private import state

    return set(state.state.get_draining_nodes() or ())


def reachable(candidates: list[Node]) -> list[Node]:
    with ThreadPoolExecutor(min(32, len(candidates) or 1)) as pool:
        return [
            node
            for node, answers in zip(candidates, pool.map(Node.answers, candidates), strict=True)
            if answers
        ]


def oom_kills(among: list[str] | None) -> dict[str, int]:
    """Processes that were killed so far for lack of memory, by the machine's name: of this machine alone, or,
    on a cluster, of those machines `among` whose ids are given that answer in time.
    """
    if among is None:
        return {"this machine": machine.oom_kills()}
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(machine.oom_kills)
    tasks = {
        node.name: ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)
        ).remote()
        for node in nodes(set(among))
    }
    done, _ = ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=ANSWER) if tasks else ([], [])
    counts = {}
    for name, task in tasks.items():
        if task in done:
            with contextlib.suppress(ray.exceptions.RayError):
                counts[name] = ray.get(task)
    return counts


def worker_slots(config: RunConfig, candidates: list[Node], gpus: float) -> list[str]:
    """The machine of each slot for a worker, fullest machines first; `gpus`: all of the cluster."""
    cpu, gpu = config.cluster.cpus_per_worker, gpus_per_worker(config, gpus)
    slots = {
        node: int(min(how_many_fit(node.cpus, cpu), how_many_fit(node.gpus, gpu))) for node in candidates
    }
    return [
        node.id
        for node in sorted(candidates, key=lambda node: (-slots[node], node.id))
        for _ in range(slots[node])
    ]


def largest_worker_count(config: RunConfig, n_slots: int) -> int:
    """The largest number of workers for which there are slots; 0 if there are too few."""
    return next((n for n in config.worker_counts() if n <= n_slots), 0)


def await_worker_slots(config: RunConfig, say: Callable[[str], None]) -> list[str]:
    """The machine of each worker, of as many workers as there are slots for; none after `start_timeout`.

    Fewer than the most are taken when their number has not changed for a while: machines of a run that has
    just ended become free one after another.
    """
    timeout = RETURN if config.cluster.start_timeout == "auto" else config.cluster.start_timeout
    began = settled = time.monotonic()
    last, told = -1, False
    try:
        while True:
            slots = worker_slots(config, reachable(nodes()), _gpus())
            n = largest_worker_count(config, len(slots))
            now = time.monotonic()
            if n != last:
                last, settled = n, now
            if n == config.workers or (n and now - settled >= SETTLE):
                return slots[:n]
            if now - began > timeout:
                return []
            if not told and now - began > SETTLE:
                told = True
                say(
                    f"waiting up to {timeout:.0f} s for machines: there are slots for {len(slots)} of "
                    f"{config.workers} workers"
                )
                _request(config)
            time.sleep(0.5)
    finally:
        if told:
            _request(None)


def _request(config: RunConfig | None) -> None:
    """Ask the autoscaler, where there is one, for all that a run needs, or for nothing any more."""
    from ray.autoscaler.sdk import request_resources

    if config is None:
        request_resources(bundles=[])
        return
    gpus = gpus_per_worker(config, _gpus())
    bundle = {"CPU": config.cluster.cpus_per_worker, **({"GPU": gpus} if gpus else {})}
    request_resources(bundles=[bundle] * config.workers)


def _gpus() -> float:
    import ray

    return float(ray.cluster_resources().get("GPU", 0.0))
