"""What of DeepSpeed's private interface packed ZeRO-3 depends on, checked when a run starts."""

import contextlib
import inspect
import os
import sys
from collections.abc import Iterator
from unittest.mock import patch

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # read at import


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """Inside, importing `module` fails, as if it were not installed."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


# Its autotuner imports all of MLflow if it can, which takes as long as DeepSpeed itself, at every restart.
with _without("mlflow"):
    import deepspeed
    import deepspeed.utils.nvtx
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.partitioned_param_coordinator import (
        PartitionedParameterCoordinator as Coordinator,
    )
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    # Asked whether an optimizer is its own, DeepSpeed imports its Muon, which is compiled: for that PyTorch
    # imports its whole compiler.
    with patch("deepspeed.runtime.compiler.compile", lambda: lambda function: function):
        import deepspeed.runtime.zero.muon.original_muon

# Else each of its functions makes a range for NVIDIA's profiler, hundreds of times a step.
deepspeed.utils.nvtx.enable_nvtx = False

DEEPSPEED_VERSION = "0.19.8"
# Private methods overridden or called below, with the parameters they must have ("args, kwargs": DeepSpeed's
# own tracing decorator hides them).
CONTRACT: tuple[tuple[type, str, str], ...] = (
    (Init, "_padding_size", "self, param"),
    (Init, "_aligned_size", "self, param"),
    (Init, "_convert_to_deepspeed_param", "self, param"),
    (Init, "_all_gather", "args, kwargs"),
    (Init, "_partition_param", "args, kwargs"),
    (Stage3, "_get_parameter_partitions", "self"),
    (Stage3, "_set_fp16_partitioned_groups_flat", "self"),
    (Stage3, "_create_fp32_partitions", "self"),
    (Stage3, "_setup_for_real_optimizer", "self"),
    (Stage3, "initialize_optimizer_states", "self"),
    (Stage3, "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads", "args, kwargs"),
    (Stage3, "partition_grads", "args, kwargs"),
    # Of `reduce_and_partition_stream` it calls `synchronize`, which does nothing here.
    (Stage3, "independent_gradient_partition_epilogue", "args, kwargs"),
    (Stage3, "_pre_step", "self"),
    (Stage3, "_partition_all_parameters", "args, kwargs"),
    (Stage3, "zero_grad", "args, kwargs"),
    (Stage3, "step", "args, kwargs"),
    (Stage3, "create_reduce_and_remove_grad_hooks", "self"),
    # What coordinator.py does in its place.
    (Coordinator, "reset_step", "self"),
    (Coordinator, "trace_prologue", "self, sub_module"),
    (Coordinator, "is_record_trace", "self"),
    (Coordinator, "is_invalid_trace", "self"),
    (Coordinator, "fetch_sub_module", "args, kwargs"),
    (Coordinator, "release_sub_module", "args, kwargs"),
    (Coordinator, "release_backward_leftovers", "args, kwargs"),
    (Coordinator, "release_and_reset_all", "args, kwargs"),
    (DeepSpeedEngine, "_configure_zero_optimizer", "self, optimizer"),
)


def check_deepspeed() -> None:
    """RuntimeError naming what moved, unless DeepSpeed is the version this file was written against."""
    if deepspeed.__version__ != DEEPSPEED_VERSION:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} is installed; packed ZeRO-3 overrides private methods of "
            f"{DEEPSPEED_VERSION}: pip install deepspeed=={DEEPSPEED_VERSION}"
        )
    for owner, name, expected in CONTRACT:
        method = getattr(owner, name, None)
        actual = None if method is None else ", ".join(inspect.signature(method).parameters)
        if actual != expected:
            raise RuntimeError(
                f"DeepSpeed's {owner.__name__}.{name} takes ({actual}), packed ZeRO-3 expects ({expected})"
            )
