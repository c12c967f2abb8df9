"""DeepSpeed beside tensors without values: what it reads of them, and what it remembers of a process."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.comm import comm
from deepspeed.runtime.utils import CheckOverflow
from deepspeed.runtime.zero import partitioned_param_coordinator, stage_1_and_2
from deepspeed.utils import groups

from lowbit_dist.zero.contract import check_deepspeed


@contextmanager
def without_values() -> Iterator[None]:
    """Inside, engines work on fake tensors of the CPU; afterwards DeepSpeed has forgotten them."""
    check_deepspeed()
    with ExitStack() as stack:
        for module in (comm, groups):  # the communication backend and the groups, made once for a process
            stack.enter_context(patch.dict(vars(module)))
        comm.cdb = None
        # It would use a GPU's streams where there is one.
        stack.enter_context(patch.object(real_accelerator, "ds_accelerator", CPU_Accelerator()))
        # Workers compare the order of modules that they recorded, number by number.
        stack.enter_context(
            patch.object(partitioned_param_coordinator, "assert_ints_same_as_other_ranks", lambda ints: None)
        )
        # A step is left out if a number that is not there is infinite: under stage 0 and under 1 and 2.
        stack.enter_context(patch.object(CheckOverflow, "has_overflow_serial", lambda self, params: False))
        stack.enter_context(patch.object(stage_1_and_2, "is_invalid_grad_norm", lambda norm: False))
        # Its warnings go to stdout, where a command's answer goes.
        stack.enter_context(patch.object(logging.getLogger("DeepSpeed"), "disabled", True))
        yield
