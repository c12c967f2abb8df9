"""A worker that is not there: the process group and the tensors in which its engine can be simulated.

In PyTorch's `FakeTensorMode` a tensor has a shape and a storage of so many bytes, but no values, and in a
process group of the `fake` backend a collective does nothing.  `Engine` runs in both as it is; replaced is
only what reads values or memory, each for the reason beside it.
"""

import gc
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.comm import comm
from deepspeed.runtime.utils import CheckOverflow
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.utils import groups
from torch import Tensor, nn
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensorMode

from lowbit_dist import loss, ops
from lowbit_dist.grid import Grid
from lowbit_dist.zero.contract import check_deepspeed

_one_at_a_time = threading.Lock()  # what is replaced is the whole process's


@contextmanager
def fake_worker(rank: int, workers: int, *, experts: int = 1) -> Iterator[None]:
    """Inside, this process is worker `rank` of `workers`, all on CPUs, and new tensors have no storage.

    Of the tokens that choose among `experts`, each expert is given as many as any other.
    Afterwards all is as before, also after an exception.  RuntimeError in a live process group: PyTorch has
    one default group for all threads of a process.
    """
    with _one_at_a_time, ExitStack() as stack:
        if dist.is_initialized():
            raise RuntimeError("this process is in a process group: simulate a worker in another one")
        enter, shapes = stack.enter_context, _Shapes()
        place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers}
        enter(patch.dict(os.environ, {name: str(value) for name, value in place.items()}))
        enter(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of the data pointers, which DeepSpeed compares with alignments
        enter(patch.object(sys, "excepthook", sys.excepthook))  # a process group names its rank in tracebacks
        enter(patch.object(torch.cuda, "is_available", lambda: False))  # as the engine asks for its device
        enter(_without_values())
        # DeepSpeed collects garbage to free memory, which takes a second where much is imported.
        enter(patch.object(gc, "collect", lambda *_: 0))
        if gc.isenabled():
            gc.disable()
            stack.callback(gc.enable)
        dist.init_process_group("fake", rank=rank, world_size=workers)
        stack.callback(dist.destroy_process_group)
        # C and Triton read memory; the reference would take each tensor apart into thousands of chunks.
        enter(patch.object(ops, "_backend", lambda device: shapes))
        enter(patch.object(ops, "_host_backend", lambda device: shapes))
        # Rows of logits as on a GPU, a few thousand operations less.
        enter(patch.dict(loss.BLOCKS, cpu=loss.BLOCKS["cuda"]))
        # DeepSpeed moves the module to its device, where it is; to swap a fake tensor's data is refused.
        enter(patch.object(nn.Module, "_apply", lambda self, *_, **__: self))
        enter(patch.object(dist, "all_gather_into_tensor", _gather))
        values = {
            torch.ops.aten._local_scalar_dense.default: _number,
            torch.ops.aten.nonzero.default: partial(_chosen, experts),
        }
        enter(patch.dict(op_implementations_dict, values))
        enter(patch.object(torch, "rand", partial(_above_chance, torch.rand)))
        enter(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@contextmanager
def _without_values() -> Iterator[None]:
    """Inside, DeepSpeed asks fake tensors for no values; afterwards it has forgotten them."""
    check_deepspeed()
    with ExitStack() as stack:
        for module in (comm, groups):  # the communication backend and the groups, made once for a process
            stack.enter_context(patch.dict(vars(module)))
        comm.cdb = None
        # It would use a GPU's streams where there is one.
        stack.enter_context(patch.object(real_accelerator, "ds_accelerator", CPU_Accelerator()))
        # A step is left out if a number that is not there is infinite: under stage 0 and under 1 and 2.
        stack.enter_context(patch.object(CheckOverflow, "has_overflow_serial", lambda self, params: False))
        stack.enter_context(patch.object(stage_1_and_2, "is_invalid_grad_norm", lambda norm: False))
        # Its warnings go to stdout, where a command's answer goes.
        stack.enter_context(patch.object(logging.getLogger("DeepSpeed"), "disabled", True))
        yield


def _number(mode: FakeTensorMode, func: Any, tensor: Tensor) -> int:
    """What Python gets when it asks a tensor for its number: finite, not 0, true.  Of a byte 0: DeepSpeed's
    flag of an overflow.
    """
    return 0 if tensor.dtype == torch.uint8 else 1


def _chosen(experts: int, mode: FakeTensorMode, func: Any, mask: Tensor) -> Tensor:
    """Where a mask is true that says of each choice of each token whether it fell on one expert."""
    return mask.new_empty((max(1, mask.numel() // experts), mask.dim()), dtype=torch.int64)


def _above_chance(rand: Any, *size: Any, **options: Any) -> Tensor:
    """`torch.rand`, whose single numbers are drawn to leave out a layer if they are small: none is."""
    is_number = not size or size[0] in ((), [])
    return torch.tensor(1.0) if is_number else rand(*size, **options)  # a fake one that has a value


class _gather:
    """`dist.all_gather_into_tensor`, and what it returns."""

    def __init__(self, *_: Any, **__: Any):
        # Work of gloo keeps the state of the thread that began it.  In a forward pass under activation
        # checkpointing that includes hooks which hold a block's input: until a weight that was fetched ahead
        # is waited for, in the backward pass, the input stays.
        self.hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def wait(self) -> None:
        pass


class _Shapes:
    """A backend of `ops` whose results have the right shapes; what it would write stays unwritten."""

    def step_(self, *_: Any, **__: Any) -> Tensor:
        return torch.empty(1, dtype=torch.int64)

    apply_ = step_

    def decode(self, *_: Any, out: Tensor, **__: Any) -> Tensor:
        return out

    def encode(self, weight: Tensor, scale: Tensor, *, grid: Grid, **_: Any) -> Tensor:
        return torch.empty(weight.numel() * grid.bits // 8, dtype=torch.uint8)

    def largest(self, *_: Any) -> Tensor:
        return torch.empty(1, dtype=torch.float64)

    def square_sum(self, *_: Any) -> Tensor:
        return torch.empty(1, dtype=torch.int64)

    def pack(self, levels: Tensor, *, grid: Grid) -> Tensor:
        return torch.empty(levels.numel() * grid.bits // 8, dtype=torch.uint8)

    def unpack(self, codes: Tensor, *, grid: Grid) -> Tensor:
        return torch.empty(codes.numel() * 8 // grid.bits, dtype=torch.int8)

    def code_counts(self, codes: Tensor, *, grid: Grid) -> Tensor:
        return torch.empty(grid.n_levels, dtype=torch.int64)
