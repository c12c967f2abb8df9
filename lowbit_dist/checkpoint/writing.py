"""One worker's part of a checkpoint, and how files get to the disk under their names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit_dist.checkpoint.finding import newest_first, step_of
from lowbit_dist.checkpoint.layout import REPLACED, sha256, slot_keys
from lowbit_dist.files import os_errors, sync

if TYPE_CHECKING:  # DeepSpeed takes seconds to import, and this needs none of it
    from lowbit_dist.config import Train
    from lowbit_dist.zero import Shard


@dataclass(frozen=True)
class WorkerFile:
    """One worker's share of a checkpoint, in host memory: of a GPU's tensors once `arrived` has happened."""

    file: str
    held: dict[str, Tensor]  # NAME/codes, NAME/weight, NAME/scale and NAME/slots/m ...
    holds: dict[str, list[int]]  # NAME -> [start, numel] of the unsharded tensor
    tensors: dict[str, dict[str, Any]]  # NAME -> shape, grid and scale_every of the unsharded tensor
    arrived: torch.cuda.Event | None = None

    @classmethod
    def copied(cls, shards: Sequence[Shard], rank: int) -> WorkerFile:
        """As the shards are now: what a GPU is given to do afterwards comes after the copies."""
        held: dict[str, Tensor] = {}
        holds: dict[str, list[int]] = {}
        for shard in shards:
            if rank == 0 and shard.scale is not None:
                held[f"{shard.name}/scale"] = _on_host(shard.scale.half())
            if not shard.numel:
                continue
            holds[shard.name] = [shard.start, shard.numel]
            stored = {"codes": shard.codes} if shard.codes is not None else {"weight": shard.weight}
            for slot_state in shard.state:
                if rank and slot_state.slot.per != "element":
                    continue  # every worker has all of it
                values, scale = slot_keys(slot_state.slot.name)
                stored |= {values: slot_state.values, scale: slot_state.scale}
            for key, value in stored.items():
                if value is not None:
                    held[f"{shard.name}/{key}"] = _on_host(value.detach())
        tensors: dict[str, dict[str, Any]] = {
            s.name: {"shape": list(s.shape), "grid": s.grid.name, "scale_every": s.scale_every}
            if s.grid
            else {"shape": list(s.shape), "grid": None}
            for s in shards
        }
        arrived = None
        if any(tensor.is_pinned() for tensor in held.values()):
            arrived = torch.cuda.Event()
            arrived.record()
        return cls(f"shard-{rank:05}.safetensors", held, holds, tensors, arrived)

    def write(self, folder: Path) -> dict[str, Any]:
        """What worker 0 must know of the file, which is on the disk when this returns."""
        path = folder / self.file
        if self.arrived is not None:
            self.arrived.synchronize()
        with os_errors():
            save_file(self.held, path)
        sync(path)
        return {
            "file": self.file, "sha256": sha256(path), "bytes": path.stat().st_size, "holds": self.holds
        }  # fmt: skip


def _on_host(tensor: Tensor) -> Tensor:
    """A copy; of a GPU's tensor in pinned memory, which the GPU fills while training continues."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


def publish(partial: Path, final: Path) -> None:
    """Give a complete checkpoint its name."""
    sync(partial)
    if final.exists():  # a run that went back to an older checkpoint writes this step again
        stale = final.with_name(f".{final.name}.{REPLACED}")
        shutil.rmtree(stale, ignore_errors=True)
        final.rename(stale)
        partial.rename(final)
        shutil.rmtree(stale)
    else:
        partial.rename(final)
    sync(final.parent)


def prune(newest: Path, train: Train) -> None:
    """Remove the checkpoints that a run need not keep beside `newest`, which it has just published.

    Those of later steps are damaged, and the run went back behind them: they do not count.  A run that goes
    back after a spike keeps a checkpoint to go back to, which one of a stop in between is not.
    """
    usable = [path for path in newest_first(newest.parent.parent) if step_of(path) <= step_of(newest)]
    kept = usable[: train.keep_last]
    if train.on_spike == "rollback":
        kept += [path for path in usable if step_of(path) % train.save_every == 0][:1]
    for path in usable:
        if path not in kept and (train.keep_every is None or step_of(path) % train.keep_every):
            shutil.rmtree(path)


def write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
