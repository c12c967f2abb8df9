"""DeepSpeed ZeRO with packed low-bit shards: the only package that knows DeepSpeed.

Under stage 3 a low-bit weight is an ordinary `nn.Parameter` whose shard (`ds_tensor`) IS its packed codes.
DeepSpeed's hooks say when a module needs its parameters, and bucket and accumulate gradients; ours is what a
shard is made of, and its way from worker to worker:

* `shards.Partitioner` (DeepSpeed's `zero.Init`) cuts each parameter into shards on borders of 256 elements,
  and gathers packed bytes, decoded when the layer that needs them runs.
* `coordinator` begins gathers, waits for them and releases what they brought, block by block; `gathers` are
  these collectives.
* `first` gives shards their first values, each tensor made by one worker for all.
* `stage3.PackedZero3` (DeepSpeed's stage-3 optimizer) keeps no full-precision partition of low-bit
  parameters, sums gradients instead of averaging them, and updates every shard in place with
  `lowbit_dist.ops`.  Under `train.gradient_release` it does so bucket by bucket, within the backward pass.
* `whole` makes matrices whole on one worker each, for rules that must see them so.
* `standard` runs latent-weight methods on DeepSpeed's own stages 0 to 2 (on stage 3 they share the classes
  above).
* `fake` is a worker that is not there, whose engine is simulated for a plan.
* `contract` names the private methods that this depends on, and checks them when a run starts.

What makes a run independent of the number of workers: shards end on block borders, gradients are summed over
micro-batches and workers and divided once, the gradient norm is a sum of integers, and random bits are a
function of position.
"""

from lowbit_dist.zero.contract import check_deepspeed
from lowbit_dist.zero.engine import Engine
from lowbit_dist.zero.shards import Initial, Shard
from lowbit_dist.zero.stage3 import Update

__all__ = ["Engine", "Initial", "Shard", "Update", "check_deepspeed"]
