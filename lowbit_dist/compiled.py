"""Compiled transformer blocks (`train.compile`): what stands between two matrix products becomes one pass.

    x -> norm | q, k, v -> rotary | attention -> o -> + | norm | gate, up -> silu, * | down -> +

PyTorch's compiler, inductor, makes one graph of a block, with one backward, in which it fuses what stands
between products; these it calls as they are (compiled_linear.py).  A layer whose method has a view of its
weight, or a mixture of experts, is left out, and parts a block into several graphs.  Intermediate results
stay in float32 instead of being rounded one by one, so a compiled run has bits of its own: as without, the
same on any number of workers and after a resume, but those of the processor's instructions.  What is no
training pass, as an evaluation, is not compiled.

A first compilation takes tens of seconds.  Its results are kept in the folder `inductor` of $LOWBIT_CACHE (by
default `folders.cache`); of the workers of a machine one compiles while the others wait for what it makes.
"""

import logging
import os
import shlex
import shutil
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lowbit_dist import compiled_linear, experts, folders, machine
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.errors import why_not_writable
from lowbit_dist.files import locked
from lowbit_dist.linear import Linear
from lowbit_dist.model import blocks_of

log = logging.getLogger(__name__)

# With `auto`, a run that is expected to take less is not compiled: it would not regain what that takes.
LEAST_SECONDS = 600.0
SPEED = {"cpu": 1e11, "cuda": 2e14}  # operations of a worker in a second, roughly
RECOMPILATIONS = 64  # of one function: of blocks that differ, and of other lengths of a batch


def why_not(device: str) -> tuple[str, str] | None:
    """What blocks cannot be compiled without on this machine, for "cpu" or "cuda", and how to get it."""
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++"]
    if device == "cuda":
        if find_spec("triton") is None:
            return "no Triton", "pip install triton"
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(shutil.which(shlex.split(command)[0]) for command in compilers if command.strip()):
        return f"no compiler {' or '.join(compilers)}", "install one"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "no Python.h", "install Python's development files"
    if why := why_not_writable(_folder()):
        return f"no folder for what is compiled ({_folder()}: {why})", "set LOWBIT_CACHE to one"
    return None


def check(config: RunConfig, device: str, place: str) -> None:
    """ConfigError if blocks must be compiled and cannot be."""
    if config.train.compile == "on" and (why := why_not(device)) is not None:
        raise _impossible("on", place, *why)


def decide(
    config: RunConfig, device: str, n_parameters: int, *, is_new: bool, before: str | None
) -> str | None:
    """For which instructions a run's blocks are compiled, None if they are not; on every worker alike.

    `before`: the same of the checkpoint that a run that is not new resumes from, whose way `auto` goes on.
    """
    asked, world = config.train.compile, dist.get_world_size()
    if asked == "auto":
        is_wanted = _is_worth_it(config, n_parameters, world, device) if is_new else before is not None
    else:
        is_wanted = asked == "on"
    if not is_wanted:
        return None
    of_workers: list[Any] = [None] * world
    dist.all_gather_object(of_workers, why_not(device) or instructions(device))
    for worker, why in enumerate(of_workers):
        if isinstance(why, str):
            continue
        if asked == "on" or not is_new:
            raise _impossible(asked if is_new else f"{asked}, and so until now", f"worker {worker}", *why)
        log.warning("blocks run uncompiled: worker %d has %s; %s", worker, *why)
        return None
    own = "; ".join(sorted(set(of_workers)))
    if before not in (None, own):
        log.warning(
            "blocks were compiled for %s until now, here they are for %s: bits may differ", before, own
        )
    return own


def _impossible(asked: str, place: str, why: str, remedy: str) -> ConfigError:
    return ConfigError(
        f"train.compile ({asked}) must go with what PyTorch compiles with, but {place} has {why}; {remedy}, "
        "or write train.compile: off"
    )


def _is_worth_it(config: RunConfig, n_parameters: int, workers: int, device: str) -> bool:
    """Whether a run is long enough for `auto`: six operations for each parameter and token."""
    n_tokens = config.train.steps * config.train.batch_tokens
    return 6 * n_parameters * n_tokens >= LEAST_SECONDS * SPEED[device] * workers


def instructions(device: str) -> str:
    """Those that code which is compiled here is made of."""
    return torch.cuda.get_device_name() if device == "cuda" else machine.instructions()


def compile_blocks(model: nn.Module, heartbeat: Callable[[], object]) -> None:
    """Let the training passes of a model's blocks run compiled; `heartbeat` is called for each part."""
    import torch._dynamo.config
    import torch._inductor.config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    # PyTorch writes its default there when it first asks.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    torch._dynamo.config.recompile_limit = RECOMPILATIONS
    torch._inductor.config.deterministic = True  # else what is fastest in a trial decides on sums
    torch._inductor.config.compile_threads = 1  # no further processes beside each worker

    def inner(*args: Any, **kwargs: Any) -> Any:
        heartbeat()
        with locked(folder / "lock", if_possible=True):  # whoever comes next finds it in the cache
            return compile_fx_inner(*args, **kwargs)

    def backend(graph: Any, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=inner)

    mixtures = set(experts.mixtures(model))
    for block in blocks_of(model):
        for module in block.modules():
            is_part = not isinstance(module, Linear) or compiled_linear.take(module)
            if not is_part or module in mixtures:
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        block.forward = _in_training(
            block.forward, torch.compile(block.forward, backend=backend, dynamic=False)
        )


def _in_training(plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward


def _folder() -> Path:
    return Path(os.environ.get("LOWBIT_CACHE") or folders.cache()) / "inductor"
