"""The saver of a run: copies on the training thread, writes on another, and worker 0 publishes."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors import SafetensorError

from lowbit_dist.checkpoint.layout import FORMAT, MANIFEST, SUMS, Position, sha256, sums_text
from lowbit_dist.checkpoint.writing import WorkerFile, prune, publish, write_synced
from lowbit_dist.config import RunConfig
from lowbit_dist.files import sync

if TYPE_CHECKING:  # DeepSpeed takes seconds to import, and this needs none of it
    from lowbit_dist.zero import Shard

log = logging.getLogger(__name__)


class Saver:
    """Writes a run's checkpoints beside its training, one at a time; every worker has one.

    `save` returns when the worker's part is copied to host memory; a thread writes it.  A full or broken disk
    costs the checkpoint of that step only: it is removed, the older ones stay, training continues.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        rank: int,
        world: int,
        facts: dict[str, Any],  # what a reader must know beside the configuration: vocabulary, tokenizer hash
    ):
        self.config, self.rank, self.world, self.facts = config, rank, world, facts
        self.folder = config.run_dir / "checkpoints"
        # A process group for the threads alone: training's collectives must never meet theirs.
        self._group: Any = dist.new_group(backend="gloo") if world > 1 else None
        self._thread: threading.Thread | None = None
        self._crash: BaseException | None = None
        self._failure: str | None = None  # worker 0: why the last save did not succeed
        self._position: Position | None = None

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, once it is published."""
        return self.folder / f"step-{step}"

    def save(self, shards: Sequence[Shard], position: Position) -> None:
        """Begin to write a checkpoint; on every worker, with the same `position`."""
        self.wait()
        # Under stage 0 every worker holds everything.
        is_copy = self.rank != 0 and self.config.zero.stage == 0
        part = WorkerFile.copied([] if is_copy else shards, self.rank)
        self._position = position
        self._thread = threading.Thread(
            target=self._run, args=(part, position), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the last save has ended, well or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._crash is not None:
            raise self._crash

    def finish(self, shards: Sequence[Shard], position: Position) -> None:
        """Return when the checkpoint of `position` is on disk; RuntimeError on worker 0 if it cannot be."""
        if self._position != position:
            self.save(shards, position)
        self.wait()
        if self._failure is not None:
            raise RuntimeError(
                f"the checkpoint of step {position.step} could not be saved ({self._failure}); free space in "
                f"{self.folder} and start the run again: it resumes from the newest checkpoint"
            )

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _run(self, part: WorkerFile, position: Position) -> None:
        try:
            self._write(part, position)
        except BaseException as error:  # of a collective whose other end died, or a bug: for `wait`
            self._crash = error

    def _write(self, part: WorkerFile, position: Position) -> None:
        final = self.path(position.step)
        partial = self.folder / f".step-{position.step}.partial"
        try:
            partial.mkdir(parents=True, exist_ok=True)
            note = part.write(partial)
        except (OSError, SafetensorError) as error:
            note = {"error": f"worker {self.rank}: {getattr(error, 'strerror', None) or error}"}
        notes = self._gathered(note)
        if self.rank != 0:
            return
        self._failure = next((note["error"] for note in notes if "error" in note), None)
        if self._failure is None:
            try:
                self._publish(partial, final, part, notes, position)
            except OSError as error:
                self._failure = f"worker 0: {getattr(error, 'strerror', None) or error}"
        if self._failure is not None:
            shutil.rmtree(partial, ignore_errors=True)
            log.warning(
                "CHECKPOINT NOT SAVED: step %d (%s); training continues, older checkpoints are intact; free "
                "space in %s",
                position.step, self._failure, self.folder,
            )  # fmt: skip

    def _gathered(self, note: dict[str, Any]) -> list[dict[str, Any]]:
        """On worker 0, every worker's note."""
        if self._group is None:
            return [note]
        notes: list[Any] | None = [None] * self.world if self.rank == 0 else None
        dist.gather_object(note, notes, dst=0, group=self._group)
        return notes or []

    def _publish(
        self, partial: Path, final: Path, part: WorkerFile, notes: list[dict[str, Any]], position: Position
    ) -> None:
        manifest = {
            "format": FORMAT,
            **asdict(position),
            **self.facts,
            "config": self.config.to_dict(),
            "tensors": part.tensors,
            "files": {note["file"]: {"bytes": note["bytes"], "holds": note["holds"]} for note in notes},
        }
        write_synced(partial / MANIFEST, json.dumps(manifest).encode())
        sums = {note["file"]: note["sha256"] for note in notes} | {MANIFEST: sha256(partial / MANIFEST)}
        write_synced(partial / SUMS, sums_text(sums).encode())
        publish(partial, final)
        prune(final, self.config.train)
        write_synced(self.config.run_dir / ".latest", final.name.encode())
        (self.config.run_dir / ".latest").rename(self.config.run_dir / "latest")
        sync(self.config.run_dir)
