"""Bytes of a run, component by component: planned from its configuration, measured on its live workers.

`plan` needs no data, no worker and no weights. What stays allocated between steps is arithmetic on the
model's shapes (`resident`); what lives only inside a step comes from a rehearsal of that step on tensors
without storage (`rehearsal`, `lifetimes`). `measure` looks at a worker's live tensors, each storage once
(`live`), and `compare` sets the largest worker's measurement against the plans of the two baselines. All
answer with the same names (`report`).
"""

from lowbit_dist.memory.live import measure, track_peak
from lowbit_dist.memory.plan import compare, plan
from lowbit_dist.memory.report import COMPONENTS, largest, metrics

__all__ = ["COMPONENTS", "compare", "largest", "measure", "metrics", "plan", "track_peak"]
