"""Real ranks for tests: processes that stay alive between tests.

Those of CPUs, in a gloo group, are forked from one that has imported what they need, so that imports are paid
for once; those of GPUs, in an NCCL group, are not.
"""

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

_context = multiprocessing.get_context("forkserver")


def search_path(*folders: Any) -> str:
    """PYTHONPATH with these folders first."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def start_server() -> None:
    """Start the process that ranks are forked from, with the environment of this moment."""
    # Nothing here starts a thread, which would not be there after the fork.
    _context.set_forkserver_preload(["preloaded"])
    # Python 3.11 forgets sys.path there.
    with patch.dict(os.environ, PYTHONPATH=search_path(Path(__file__).parent)):
        multiprocessing.forkserver.ensure_running()


class Ranks:
    """`world` processes in one group; `run(f, *args)` is f(*args) of each, by rank."""

    def __init__(self, world: int, store: str, device: str = "cpu"):
        self.world = world
        self._pipes, self._processes = [], []
        context = _context if device == "cpu" else multiprocessing.get_context("spawn")
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, store, there, device), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        answers = [pipe.recv() for pipe in self._pipes]
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        if failures:
            raise AssertionError("\n".join(failures))
        return [result for _, result in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            process.kill()


def _serve(rank: int, world: int, store: str, pipe: Any, device: str) -> None:
    is_cpu = device == "cpu"
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": device,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if is_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        assert "preloaded" in sys.modules, "the server passes over what it cannot import without a word"
    else:
        from lowbit_dist.machine import REPEATING, repeat_on_gpus

        os.environ |= REPEATING
    import torch
    import torch.distributed as dist

    gc.freeze()  # DeepSpeed collects garbage for each engine, which takes the longer the more is imported
    torch.set_num_threads(1)
    if not is_cpu:
        torch.cuda.set_device(rank)
        repeat_on_gpus()
    backend = "gloo" if is_cpu else "nccl"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args, **kwargs)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
