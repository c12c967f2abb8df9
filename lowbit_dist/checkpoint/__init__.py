"""Checkpoints: packed codes, scales, optimizer states and ordinary weights, published whole or not at all.

A checkpoint is a folder `checkpoints/step-N` of
* `shard-RRRRR.safetensors`: what worker R holds of every tensor, `NAME/codes` or `NAME/weight`, and the
  optimizer's slots `NAME/slots/SLOT` (8-bit ones with `NAME/slots/SLOT/scale`).  Worker 0 adds `NAME/scale`
  (float16).
* `manifest.json`: the run's configuration and position, every tensor's shape, grid and `scale_every`, and
  which elements each file holds; of a weight that is a sum the number of its `planes`, too.
* `SHA256SUMS`: of each of these files, as `sha256sum --check` reads it.

Everything is addressed by element of the unsharded tensor, so any number of workers can read it.  Each
worker copies its part to host memory and writes it beside the training, into a folder of a temporary name;
worker 0 collects what each says of its file, writes the manifest, flushes all to the disk and renames the
folder last.  Loading executes nothing: safetensors and JSON.

This is format 2.  Format 1, which had AdamW's `NAME/m` and `NAME/v` in the place of slots, is read as well.
"""

from lowbit_dist.checkpoint.finding import clear_partial, latest, newest, newest_first, resolve, step_of
from lowbit_dist.checkpoint.layout import FORMAT, MANIFEST, SUMS, Position
from lowbit_dist.checkpoint.reading import Checkpoint, Kept
from lowbit_dist.checkpoint.saver import Saver
from lowbit_dist.checkpoint.space import check_disk, checkpoint_bytes

__all__ = [
    "FORMAT", "MANIFEST", "SUMS", "Checkpoint", "Kept", "Position", "Saver", "check_disk", "checkpoint_bytes",
    "clear_partial", "latest", "newest", "newest_first", "resolve", "step_of",
]  # fmt: skip
