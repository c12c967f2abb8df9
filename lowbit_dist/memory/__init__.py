"""Bytes of a run, component by component: planned from its configuration, measured on its live workers.

`plan` needs no data, no worker and no weights. What stays allocated between steps is arithmetic on the
model's shapes (`resident`); what lives only inside a step is measured on a step of the real engine whose
tensors have no storage (`simulation`, `fake`). `measure` looks at a worker's live tensors, each storage once
(`live`), and `compare` sets the largest worker's measurement against the plans of the two baselines. All
answer with the same names (`report`).

Before a run starts, `check_memory` refuses what does not fit (`fitting`, `machine`).
"""

from lowbit_dist.memory.fitting import CUDA_CONTEXT, check_memory, fits_here
from lowbit_dist.memory.live import measure, track_peak
from lowbit_dist.memory.machine import MemoryBudget, local_budget
from lowbit_dist.memory.plan import baselines, compare, plan
from lowbit_dist.memory.report import COMPONENTS, largest, metrics

__all__ = [
    "COMPONENTS",
    "CUDA_CONTEXT",
    "MemoryBudget",
    "baselines",
    "check_memory",
    "compare",
    "fits_here",
    "largest",
    "local_budget",
    "measure",
    "metrics",
    "plan",
    "track_peak",
]
