"""What a step costs: predicted for GPUs that nobody has, and as a share of what a GPU here could do.

`predict` says of a run and a number of GPUs how long a step takes, what it moves between GPUs and what it
keeps on each.  It is arithmetic on three things, each with a file of its own: what GPUs can do and what is
known or assumed of them (`hardware`), what the model and the method ask of them (`work`), and how the engine
goes about it (`prediction`).  **Nothing that it says was measured**; `CONSTANTS` says of each number where it
comes from.

MFU (model FLOPs utilization) is by one convention, predicted or of a run that trains (`Speed`): of a
GPU's peak in bf16, whatever the precision, the share that its tokens are worth by `Work.flops_per_token`.
"""

from lowbit_dist.cost.hardware import CONSTANTS, GPUS, Constant, Gpu, gpu_of, peak_flops
from lowbit_dist.cost.plan import DEFAULT_GPU, PREDICTED, check_multiplies, plan
from lowbit_dist.cost.prediction import COMPILED, EAGER, Execution, execution_of, predict, wire_bytes
from lowbit_dist.cost.work import Speed, Work

__all__ = [
    "COMPILED",
    "CONSTANTS",
    "DEFAULT_GPU",
    "EAGER",
    "GPUS",
    "PREDICTED",
    "Constant",
    "Execution",
    "Gpu",
    "Speed",
    "Work",
    "check_multiplies",
    "execution_of",
    "gpu_of",
    "peak_flops",
    "plan",
    "predict",
    "wire_bytes",
]
