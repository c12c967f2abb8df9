"""`lowbit plan --gpus`: a run on several numbers of GPUs, beside the dense one, and whether it fits."""

from collections.abc import Sequence
from typing import Any

from lowbit_dist import configfile
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.cost.hardware import CONSTANTS, GPUS, Gpu
from lowbit_dist.cost.prediction import Execution, execution_of, predict
from lowbit_dist.cost.work import Work
from lowbit_dist.memory import CUDA_CONTEXT
from lowbit_dist.memory.plan import DENSE, EACH, planned

PREDICTED = "predicted, never measured"
DEFAULT_GPU = "H100"


def plan(
    config: RunConfig,
    vocab_size: int,
    numbers: Sequence[int],
    gpu: Gpu,
    *,
    execution: Execution | None = None,  # None: as the configuration says
    with_memory: bool = True,
) -> dict[str, Any]:
    """A row for each number of GPUs.  ConfigError if one does not divide the batch, or a GPU cannot what the
    run asks.

    Memory: what stays between steps is of each number; what a step takes above it was simulated of the
    fewest, which have the most.
    """
    check_multiplies(config, gpu)
    execution = execution or execution_of(config)
    work = Work.of(config, vocab_size)
    # On equal terms: the same states and the same precision.
    dense = configfile.changed(
        config, DENSE | EACH | {"precision": config.precision.of_latent().model_dump()}
    )
    rows, peaks = [], dict[bool, int]()
    for n in sorted(numbers):
        here = configfile.changed(config, {"cluster.workers": n})
        row = predict(here, vocab_size, n, gpu, execution=execution)
        of_dense = predict(dense, vocab_size, n, gpu, execution=execution)
        row["speed_to_dense"] = row["tokens_per_second_per_gpu"] / of_dense["tokens_per_second_per_gpu"]
        if with_memory:
            at_rest = planned(here, vocab_size, n, with_step=False)["resident_bytes_per_worker"]
            adds_up = row["micro_batches"] > 1
            if adds_up not in peaks:
                whole = planned(here, vocab_size, n)
                peaks[adds_up] = whole["peak_bytes_per_worker"] - whole["resident_bytes_per_worker"]
            row["memory_bytes_per_gpu"] = at_rest + peaks[adds_up] + CUDA_CONTEXT
            row["fits"] = row["memory_bytes_per_gpu"] <= gpu.memory
        rows.append(row)
    seq_len = config.data.seq_len
    return {
        "note": PREDICTED,
        "gpu": gpu._asdict(),
        "method": config.method.label,
        "execution": execution.name,
        "tokens_per_micro_batch": config.train.micro_batch * seq_len,
        "tokens_per_step": config.train.batch_tokens,
        "parameters": work.n_parameters,
        "flops_per_token": work.flops_per_token(seq_len),
        "flops_per_token_with_embedding": work.flops_per_token(seq_len, with_embedding=True),
        "rows": rows,
        "constants": {name: constant._asdict() for name, constant in CONSTANTS.items()},
    }


def check_multiplies(config: RunConfig, gpu: Gpu) -> None:
    """ConfigError if the run asks for products that the GPU does not make."""
    if config.precision.matmul == "fp8" and gpu.fp8 is None:
        able = ", ".join(kind.name for kind in GPUS.values() if kind.fp8 is not None)
        raise ConfigError(
            f"precision (fp8) must go with GPUs that multiply 8-bit floats, not {gpu.name}; write --gpu of "
            f"{able}, or precision=bf16"
        )
