"""The stacks of workers that hang, read from outside, for a stopped process cannot tell."""

import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 25  # for all machines together


def stacks_of(heartbeats: list[dict[str, Any]], *, and_kill: bool) -> Iterator[str]:
    """Lines that name each worker, its state and its threads' stacks, read by a Ray task on each machine."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    by_node: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for worker in heartbeats:
        by_node[worker["node"]].append(worker)
    look = ray.remote(num_cpus=0, max_retries=0)(look_at)
    tasks = {
        node: look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        ).remote([worker["pid"] for worker in workers], and_kill)
        for node, workers in by_node.items()
    }
    ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=SECONDS)
    for node, workers in by_node.items():
        try:
            stacks = ray.get(tasks[node], timeout=0)
        except Exception as error:  # the machine may be what hangs
            stacks = dict.fromkeys(
                (worker["pid"] for worker in workers), f"cannot be read ({type(error).__name__})"
            )
        for worker in workers:
            process = f"process {worker['pid']} on {worker['host']}, phase {worker['phase']}"
            yield f"  worker {worker['rank']} ({process}):"
            yield from (f"    {line}" for line in stacks[worker["pid"]].splitlines())


def look_at(pids: list[int], and_kill: bool) -> dict[int, str]:
    """The state and the stacks of processes of this machine; afterwards they are ended if so wished."""
    stacks = {pid: f"{_state(pid)}\n{_stacks(pid)}" for pid in pids}
    for pid in pids if and_kill else ():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return stacks


def _state(pid: int) -> str:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return "no such process"
    return next((" ".join(line.split()) for line in lines if line.startswith("State:")), "state unknown")


def _stacks(pid: int) -> str:
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if program is None:
        return "py-spy, which comes with ray[default], is not installed"
    try:
        # Without `--nonblocking` it cannot read a process that is stopped.
        done = subprocess.run(
            [program, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True, timeout=15
        )
    except subprocess.TimeoutExpired:
        return "py-spy did not answer"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return f"py-spy: {lines[0] if lines else 'failed'} (containers need the capability SYS_PTRACE)"
    return done.stdout.partition("\n\n")[2] or done.stdout
