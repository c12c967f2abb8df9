"""What a step costs: predicted for GPUs that nobody has, and as a share of what a GPU here could do.

`predict` says of a run and a number of GPUs how long a step takes, what it moves between GPUs and what it
keeps on each.  It is arithmetic on three things, each with a file of its own: what GPUs can do and what is
known or assumed of them (`hardware`), what the model and the method ask of them (`work`), and how the engine
goes about it (`prediction`).  **Nothing that it says was measured**; `CONSTANTS` says of each number where it
comes from.

`flops_per_token` and `peak_flops` are what MFU is made of, predicted or of a run that trains.
"""

from lowbit_dist.cost.hardware import CONSTANTS, GPUS, Constant, Gpu, gpu_of, peak_flops
from lowbit_dist.cost.plan import DEFAULT_GPU, PREDICTED, plan
from lowbit_dist.cost.prediction import COMPILED, EAGER, Execution, execution_of, predict
from lowbit_dist.cost.work import Work, flops_per_token, utilization

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
    "Work",
    "execution_of",
    "flops_per_token",
    "gpu_of",
    "peak_flops",
    "plan",
    "predict",
    "utilization",
]
