"""Checkpoints: packed codes, scales, moments and ordinary weights, published whole or not at all.

A checkpoint is a folder `checkpoints/step-N` of
* `shard-RRRRR.safetensors`: what worker R holds of every tensor, `NAME/codes` or `NAME/weight`, and the
  moments `NAME/m` and `NAME/v` (8-bit ones with `NAME/m_scale`, `NAME/v_scale`).  Worker 0 adds `NAME/scale`
  (float16).
* `manifest.json`: the run's configuration and position, every tensor's shape and grid, and which elements
  each file holds.
* `SHA256SUMS`: of each of these files, as `sha256sum --check` reads it.

Everything is addressed by element of the unsharded tensor, so any number of workers can read it.  Each
worker copies its part to host memory and writes it beside the training, into a folder of a temporary name;
worker 0 collects what each says of its file, writes the manifest, flushes all to the disk and renames the
folder last.  Loading executes nothing: safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowbit_dist.answers import show
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.grid import BLOCK, GRIDS, Grid
from lowbit_dist.methods import METHODS
from lowbit_dist.packed import PackedTensor

if TYPE_CHECKING:  # DeepSpeed takes seconds to import, and reading needs none of it
    from lowbit_dist.zero import Shard

FORMAT = 1
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
STATES = ("m", "v", "m_scale", "v_scale")
HASHERS = min(8, os.cpu_count() or 1)  # threads
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where a run stands: all that is not in the tensors."""

    step: int  # optimizer steps done
    samples: int  # training samples consumed, over all epochs; the data position
    tokens: int
    skipped_steps: int = 0
    mlflow_run_id: str | None = None
    train_loss: float | None = None  # as last logged
    # since the last log, so that a resumed run logs what an undisturbed one does
    loss_sum: float = 0.0
    loss_count: int = 0
    flips: int = 0
    # of the last applied steps, by which the next ones are judged
    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    skipped_in_a_row: int = 0
    rollbacks: int = 0  # returns to a checkpoint after a spike

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Position:
        """Fields that an older manifest lacks have their defaults."""
        found: dict[str, Any] = {key: manifest[key] for key in cls.__dataclass_fields__ if key in manifest}
        found |= {key: tuple(value) for key, value in found.items() if isinstance(value, list)}
        return cls(**found)


# ------------------------------------------------------------------ writing


class Saver:
    """Writes a run's checkpoints beside its training, one at a time; every worker has one.

    `save` returns when the worker's part is copied to host memory; a thread writes it.  A full or broken disk
    costs the checkpoint of that step only: it is removed, the older ones stay, training goes on.
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

    def save(self, shards: Sequence[Shard], position: Position) -> None:
        """Begin to write a checkpoint; on every worker, with the same `position`."""
        self.wait()
        # Under stage 0 every worker holds everything.
        is_copy = self.rank != 0 and self.config.zero.stage == 0
        part = _Part.copied([] if is_copy else shards, self.rank)
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
                f"{self.folder} and start the run again: it goes on from the newest checkpoint"
            )

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _run(self, part: _Part, position: Position) -> None:
        try:
            self._write(part, position)
        except BaseException as error:  # of a collective whose other end died, or a bug: for `wait`
            self._crash = error

    def _write(self, part: _Part, position: Position) -> None:
        final = self.folder / f"step-{position.step}"
        partial = self.folder / f".step-{position.step}.partial"
        try:
            partial.mkdir(parents=True, exist_ok=True)
            note = part.write(partial)
        except (OSError, SafetensorError) as error:
            note = {"error": f"worker {self.rank}: {_reason(error)}"}
        notes = self._gathered(note)
        if self.rank != 0:
            return
        self._failure = next((each["error"] for each in notes if "error" in each), None)
        if self._failure is None:
            try:
                self._publish(partial, final, part, notes, position)
            except OSError as error:
                self._failure = f"worker 0: {_reason(error)}"
        if self._failure is not None:
            shutil.rmtree(partial, ignore_errors=True)
            log.warning(
                "CHECKPOINT NOT SAVED: step %d (%s); training goes on, older checkpoints are intact; free "
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
        self, partial: Path, final: Path, part: _Part, notes: list[dict[str, Any]], position: Position
    ) -> None:
        manifest = {
            "format": FORMAT,
            **asdict(position),
            **self.facts,
            "config": self.config.to_dict(),
            "tensors": part.tensors,
            "files": {note["file"]: {"bytes": note["bytes"], "holds": note["holds"]} for note in notes},
        }
        _write_synced(partial / MANIFEST, json.dumps(manifest).encode())
        sums = {note["file"]: note["sha256"] for note in notes} | {MANIFEST: _sha256(partial / MANIFEST)}
        _write_synced(partial / SUMS, _sums_text(sums).encode())
        _publish(partial, final)
        _prune(self.folder, self.config.train.keep_last, self.config.train.keep_every)
        _write_synced(self.config.run_dir / ".latest", final.name.encode())
        (self.config.run_dir / ".latest").rename(self.config.run_dir / "latest")
        _sync_folder(self.config.run_dir)


@dataclass(frozen=True)
class _Part:
    """One worker's share of a checkpoint, in host memory."""

    file: str
    held: dict[str, Tensor]  # NAME/codes, NAME/weight, NAME/scale and NAME/m ...
    holds: dict[str, list[int]]  # NAME -> [start, numel] of the unsharded tensor
    tensors: dict[str, dict[str, Any]]  # NAME -> shape and grid of the unsharded tensor

    @classmethod
    def copied(cls, shards: Sequence[Shard], rank: int) -> _Part:
        held: dict[str, Tensor] = {}
        holds: dict[str, list[int]] = {}
        for shard in shards:
            if rank == 0 and shard.scale is not None:
                held[f"{shard.name}/scale"] = shard.scale.to("cpu", torch.float16)
            if not shard.numel:
                continue
            holds[shard.name] = [shard.start, shard.numel]
            stored = {"codes": shard.codes} if shard.codes is not None else {"weight": shard.weight}
            stored |= {key: getattr(shard.moments, key) for key in STATES}
            for key, value in stored.items():
                if value is not None:
                    held[f"{shard.name}/{key}"] = value.detach().to("cpu", copy=True).contiguous()
        tensors = {s.name: {"shape": list(s.shape), "grid": s.grid.name if s.grid else None} for s in shards}
        return cls(f"shard-{rank:05}.safetensors", held, holds, tensors)

    def write(self, folder: Path) -> dict[str, Any]:
        """What worker 0 must know of the file, which is on the disk when this returns."""
        path = folder / self.file
        save_file(self.held, path)
        _sync_file(path)
        return {
            "file": self.file, "sha256": _sha256(path), "bytes": path.stat().st_size, "holds": self.holds
        }  # fmt: skip


def _publish(partial: Path, final: Path) -> None:
    _sync_folder(partial)
    if final.exists():  # a run that went back to an older checkpoint writes this step again
        stale = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(stale, ignore_errors=True)
        final.rename(stale)
        partial.rename(final)
        shutil.rmtree(stale)
    else:
        partial.rename(final)
    _sync_folder(final.parent)


def _prune(folder: Path, keep_last: int, keep_every: int | None) -> None:
    for path in _newest_first(folder)[keep_last:]:
        if keep_every is None or _step(path) % keep_every:
            shutil.rmtree(path)


def _reason(error: Exception) -> str:
    """safetensors says "Error while serializing: I/O error: No space left on device (os error 28)"."""
    return getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2].split(" (os error")[0]


def clear_partial(run_dir: Path) -> None:
    """Remove what a killed save left behind; call before training, while nobody writes."""
    for path in (run_dir / "checkpoints").glob(".step-*"):
        shutil.rmtree(path)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------ finding


def _newest_first(folder: Path) -> list[Path]:
    paths = [path for path in folder.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(paths, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name[5:])


def latest(run_dir: Path | str) -> Path | None:
    """The newest checkpoint of a run that is complete and undamaged; damaged ones are named in a warning.

    None if the run has no checkpoint yet; ConfigError if all that it has are damaged.
    """
    found, damaged = _newest_whole(Path(run_dir))
    for each in damaged:
        log.warning("DAMAGED CHECKPOINT %s", each)
    if damaged and found is None:
        raise ConfigError(
            f"{run_dir} has no checkpoint that is not damaged ({damaged[0]}); bring one back, or remove "
            f"{Path(run_dir) / 'checkpoints'} to begin again"
        )
    return found


def _newest_whole(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and what is wrong with the newer ones."""
    damaged: list[str] = []
    for path in _newest_first(run_dir / "checkpoints"):
        try:
            problems = Checkpoint.open(path).verify()
        except ConfigError as error:
            problems = [str(error)]
        if not problems:
            return path, damaged
        damaged.append(f"{path} is not used: {'; '.join(problems)}")
    return None, damaged


def resolve(run_or_checkpoint: str | Path, runs_dir: Path | str = "runs") -> Path:
    """The checkpoint folder meant by a run's name, a run's folder or a checkpoint's folder."""
    for path in (Path(run_or_checkpoint), Path(runs_dir) / run_or_checkpoint):
        if (path / MANIFEST).exists():
            return path
        if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
            found, damaged = _newest_whole(path)
            if found is None:
                why = f": {'; '.join(damaged)}" if damaged else " yet"
                raise ConfigError(
                    f"{path} has no usable checkpoint{why}; train it, or write another run's name"
                )
            for each in damaged:
                log.warning("DAMAGED CHECKPOINT %s", each)
            return found
    raise ConfigError(
        f"'{run_or_checkpoint}' is neither a run (in {runs_dir}/), a run's folder nor a checkpoint's folder; "
        "write the name or folder of one"
    )


# ------------------------------------------------------------------ reading


class Checkpoint:
    """A published checkpoint, read tensor by tensor."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        self.position = Position.of(manifest)

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        path = Path(path)
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
            if manifest["format"] != FORMAT:
                raise ConfigError(
                    f"{path} has checkpoint format {show(manifest['format'])}, this version reads {FORMAT}; "
                    "read it with the version that wrote it"
                )
            _check_parts(manifest)
            return cls(path, manifest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"{path}/{MANIFEST} cannot be read ({why}); name another checkpoint of the run"
            ) from None

    @cached_property
    def config(self) -> RunConfig:
        return RunConfig.from_dict(self.manifest["config"], METHODS)

    @property
    def step(self) -> int:
        return self.position.step

    @property
    def names(self) -> list[str]:
        """Every tensor, in canonical order."""
        return sorted(self.manifest["tensors"])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.manifest["tensors"][name]["shape"])

    def grid(self, name: str) -> Grid | None:
        grid = self.manifest["tensors"][name]["grid"]
        return None if grid is None else GRIDS[grid]

    def tensor(self, name: str) -> PackedTensor | Tensor:
        """The whole tensor: packed if it is low-bit, else float32."""
        shape, grid = self.shape(name), self.grid(name)
        numel = int(torch.Size(shape).numel())
        if grid is None:
            return self.slice(name, "weight", 0, numel).view(shape)
        return PackedTensor(self.slice(name, "codes", 0, numel), self.scale(name), grid, shape)

    def scale(self, name: str) -> Tensor:
        for file in self.manifest["files"]:
            with safe_open(self.path / file, "pt") as opened:
                if f"{name}/scale" in opened.keys():  # noqa: SIM118  (not a mapping)
                    return opened.get_tensor(f"{name}/scale").float()
        raise ConfigError(f"{self.path} has no scale of {name}")

    def slice(self, name: str, key: str, start: int, numel: int) -> Tensor:
        """What stands for elements [start, start + numel) of a tensor under `key`, from whichever files
        hold them.
        """
        grid, parts, at = self.grid(name), [], start
        holders = sorted(
            (info["holds"][name][0], info["holds"][name][1], file)
            for file, info in self.manifest["files"].items()
            if name in info["holds"]
        )
        for held_from, held, file in holders:
            end = min(held_from + held, start + numel)
            if held_from <= at < end:
                first, last = (_offset(key, grid, element - held_from) for element in (at, end))
                with safe_open(self.path / file, "pt") as opened:
                    parts.append(opened.get_slice(f"{name}/{key}")[first:last])
                at = end
        if at != start + numel:
            raise ConfigError(f"{self.path} lacks elements {at:,} to {start + numel:,} of {name}")
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def load_into(self, shards: Sequence[Shard]) -> None:
        """Fill a worker's shards, of any number of workers, with exactly what was saved; then
        `engine.refresh`.
        """
        self.check_fits(shards)
        for shard in shards:
            if not shard.numel:
                continue
            where = (shard.start, shard.numel)
            if shard.codes is not None:
                shard.codes.copy_(self.slice(shard.name, "codes", *where))
                shard.check_codes()
                assert shard.scale is not None, f"{shard.name} has codes without a scale"
                shard.scale.copy_(self.scale(shard.name))
            else:
                assert shard.weight is not None, f"{shard.name} has neither codes nor a weight"
                shard.weight.copy_(self.slice(shard.name, "weight", *where))
            for key in STATES:
                state = getattr(shard.moments, key)
                if state is not None:
                    state.copy_(self.slice(shard.name, key, *where))

    def check_fits(self, shards: Sequence[Shard]) -> None:
        """ConfigError naming the first tensor that differs, unless this is a checkpoint of the same model
        and grid.
        """
        mine = {s.name: (list(s.shape), s.grid.name if s.grid else None) for s in shards}
        theirs = {name: (t["shape"], t["grid"]) for name, t in self.manifest["tensors"].items()}
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise ConfigError(
                    f"{self.path} is a checkpoint of another model: {name} is "
                    f"{theirs.get(name, 'absent')} there (shape, grid), {mine.get(name, 'absent')} here; "
                    "choose another run.name"
                )

    def digest(self) -> str:
        """SHA-256 over all weights: names in order, each with its int8 levels and float32 scale, or its
        float32 values.

        Independent of the number of workers, the residency and the packing: two runs are equal when their
        digests are.
        """
        sha = hashlib.sha256()
        for name in self.names:
            sha.update(name.encode())
            tensor = self.tensor(name)
            parts = (tensor.levels(), tensor.scale) if isinstance(tensor, PackedTensor) else (tensor,)
            for part in parts:
                sha.update(part.contiguous().view(-1).numpy().data)
        return sha.hexdigest()

    def components(self) -> dict[str, int]:
        """Bytes on disk of each kind of content; `overhead` is file headers and the manifest."""
        kinds = {"codes": "low_bit_weights", "scale": "scales", "weight": "other_weights"}
        sizes = dict.fromkeys(
            ("low_bit_weights", "scales", "other_weights", "optimizer_states", "overhead"), 0
        )
        total = sum((self.path / file).stat().st_size for file in (MANIFEST, SUMS))
        for file in self.manifest["files"]:
            total += (self.path / file).stat().st_size
            for key, size in _tensor_sizes(self.path / file):
                sizes[kinds.get(key.rpartition("/")[2], "optimizer_states")] += size
        sizes["overhead"] = total - sum(sizes.values())
        return sizes

    def verify(self) -> list[str]:
        """What is wrong with the files: nothing if each is there and has the SHA-256 it was saved with."""
        try:
            text = (self.path / SUMS).read_bytes().decode("ascii")
        except (OSError, UnicodeDecodeError) as error:
            return [f"{SUMS} cannot be read: {error}"]
        sums = {file: sum_ for sum_, _, file in (line.partition("  ") for line in text.split("\n") if line)}
        if text != _sums_text(sums):
            return [f"{SUMS} is damaged"]
        expected = {MANIFEST, *self.manifest["files"]}
        problems = [f"{SUMS} does not list {file}" for file in sorted(expected - sums.keys())]
        files = sorted(expected & sums.keys())
        with ThreadPoolExecutor(HASHERS) as pool:  # hashing lets go of the interpreter
            answers = pool.map(lambda file: _damage(self.path / file, sums[file]), files)
            return problems + [
                f"{file} {answer}" for file, answer in zip(files, answers, strict=True) if answer
            ]


def _check_parts(manifest: dict[str, Any]) -> None:
    """ValueError, or whatever a missing part raises, unless readers can rely on every part of a manifest.

    Names of files come from the file: only a worker's own are opened, so that none leads out of the folder.
    """
    for file, info in manifest["files"].items():
        if not re.fullmatch(r"shard-[0-9]{5,}\.safetensors", file):
            raise ValueError(f"it names {show(file)}, which is no shard of a checkpoint")
        numbers = [info["bytes"], *(number for held in info["holds"].values() for number in held)]
        if not all(len(held) == 2 for held in info["holds"].values()) or not _are_counts(numbers):
            raise ValueError(f"what {file} holds is not in numbers")
    for name, tensor in manifest["tensors"].items():
        if not _are_counts(tensor["shape"]) or tensor["grid"] not in (None, *GRIDS):
            raise ValueError(f"the shape or grid of {show(name)} is none")
    if not _are_counts([manifest[key] for key in ("step", "samples", "tokens", "vocab_size")]):
        raise ValueError("step, samples, tokens and vocab_size must be whole numbers")
    if not all(
        isinstance(manifest[key], kind) for key, kind in (("config", dict), ("tokenizer_sha256", str))
    ):
        raise ValueError("config or tokenizer_sha256 is none")


def _are_counts(values: Sequence[Any]) -> bool:
    return all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in values)


def _sums_text(sums: dict[str, str]) -> str:
    return "".join(f"{sum_}  {file}\n" for file, sum_ in sums.items())


def _damage(path: Path, sha256: str) -> str | None:
    try:
        return None if _sha256(path) == sha256 else "does not have the SHA-256 that it was saved with"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({_reason(error)})"


def _offset(key: str, grid: Grid | None, element: int) -> int:
    """Where element number `element` of a shard stands in the stored tensor `key`."""
    if key == "codes":
        assert grid is not None, "only low-bit tensors have codes"
        return -(-element // BLOCK) * grid.bytes_per_block
    return -(-element // BLOCK) if key.endswith("_scale") else element


def _tensor_sizes(path: Path) -> Iterator[tuple[str, int]]:
    """Each tensor's name and bytes, from a safetensors header (8 bytes of length, then JSON)."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for key, info in header.items():
        if key != "__metadata__":
            first, last = info["data_offsets"]
            yield key, last - first
