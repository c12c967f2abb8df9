"""Reading a checkpoint: any element of any tensor, whoever wrote it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from lowbit_dist import configfile
from lowbit_dist.checkpoint.layout import (
    MANIFEST,
    READABLE,
    SUMS,
    Position,
    check_parts,
    offset,
    sha256,
    slot_keys,
    sums_text,
)  # fmt: skip
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.errors import show
from lowbit_dist.grid import GRIDS, Grid
from lowbit_dist.machine import processors
from lowbit_dist.packed import PackedTensor

if TYPE_CHECKING:  # DeepSpeed takes seconds to import, and reading needs none of it
    from lowbit_dist.zero import Shard

HASHERS = min(8, processors())  # threads


class Kept(NamedTuple):
    """How a checkpoint of a model has a tensor."""

    shape: list[int]
    grid: str | None = None  # of a low-bit one
    scale_every: int | None = None  # elements of a low-bit one that share a scale
    planes: int = 1  # of which a low-bit one is the sum


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
            if manifest["format"] not in READABLE:
                raise ConfigError(
                    f"{path} has checkpoint format {show(manifest['format'])}, this version reads "
                    f"{' and '.join(map(str, READABLE))}; "
                    "read it with the version that wrote it"
                )
            check_parts(manifest)
            return cls(path, manifest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"{path}/{MANIFEST} cannot be read ({why}); name another checkpoint of the run"
            ) from None

    @cached_property
    def config(self) -> RunConfig:
        return configfile.from_dict(self.manifest["config"])

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
        planes = self.manifest["tensors"][name].get("planes", 1)
        codes, scale = self.slice(name, "codes", 0, planes * numel), self.scale(name)
        return PackedTensor(codes, scale, planes * numel // len(scale), grid, shape, planes)

    def scale(self, name: str) -> Tensor:
        return self.whole(name, "scale").float()

    def whole(self, name: str, key: str) -> Tensor:
        """What one worker has written for all of a tensor."""
        for file in self.manifest["files"]:
            with safe_open(self.path / file, "pt") as opened:
                if f"{name}/{key}" in opened.keys():  # noqa: SIM118  (not a mapping)
                    return opened.get_tensor(f"{name}/{key}")
        raise ConfigError(f"{self.path} has no {key} of {name}")

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
                first, last = (offset(key, grid, element - held_from) for element in (at, end))
                with safe_open(self.path / file, "pt") as opened:
                    parts.append(opened.get_slice(f"{name}/{key}")[first:last])
                at = end
        if at != start + numel:
            raise ConfigError(f"{self.path} lacks elements {at:,} to {start + numel:,} of {name}")
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def load_into(self, shards: Sequence[Shard], *, with_states: bool = True) -> None:
        """Fill a worker's shards, of any number of workers, with exactly what was saved; then
        `engine.refresh`.
        """
        self.check_fits(shards)
        for shard in shards:
            if shard.scale is not None:  # of the whole tensor, on workers that hold none of it too
                shard.scale.copy_(self.scale(shard.name))
            where = (shard.start, shard.numel)
            if shard.numel and shard.codes is not None:
                shard.codes.copy_(self.slice(shard.name, "codes", *where))
                shard.level_counts()  # refuses codes that stand for no level
            elif shard.numel:
                assert shard.weight is not None, f"{shard.name} has neither codes nor a weight"
                shard.weight.copy_(self.slice(shard.name, "weight", *where))
            for stored in shard.state if with_states else ():
                keys = slot_keys(stored.slot.name, self.manifest["format"])
                for key, values in zip(keys, (stored.values, stored.scale), strict=True):
                    if values is not None and stored.slot.per != "element":
                        values.copy_(self.whole(shard.name, key))
                    elif values is not None and shard.numel:
                        values.copy_(self.slice(shard.name, key, *where))

    def check_fits(self, shards: Sequence[Shard], instead: str = "choose another run.name") -> None:
        """`check_holds`, of all that a worker's shards are parts of."""
        packed = {s.name: (s.grid.name, s.scale_every) for s in shards if s.grid}
        self.check_holds({s.name: Kept(list(s.shape), *packed.get(s.name, ())) for s in shards}, instead)

    def check_holds(self, expected: Mapping[str, Kept], instead: str = "choose another run.name") -> None:
        """ConfigError naming the first tensor that differs, unless this is a checkpoint of the same model
        and grid.

        instead: what to do then
        """
        mine = {name: _words(kept) for name, kept in expected.items()}
        theirs = {
            name: _words(Kept(t["shape"], t["grid"], planes=t.get("planes", 1)))
            for name, t in self.manifest["tensors"].items()
        }
        every = {name: t.get("scale_every") for name, t in self.manifest["tensors"].items()}
        for name, kept in expected.items():
            if kept.grid and every.get(name) not in (None, kept.scale_every):  # format 1 does not say
                raise ConfigError(
                    f"{self.path} is a checkpoint of another model: {name} has a scale for each "
                    f"{every[name]:,} weights there, for each {kept.scale_every:,} here; {instead}"
                )
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise ConfigError(
                    f"{self.path} is a checkpoint of another model: {name} is "
                    f"{theirs.get(name, 'absent')} there (shape, grid), {mine.get(name, 'absent')} here; "
                    f"{instead}"
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
        # What else there is are the optimizer's slots.
        kinds = {"codes": "low_bit_weights", "scale": "scales", "weight": "other_weights"}
        sizes = dict.fromkeys(
            ("low_bit_weights", "scales", "other_weights", "optimizer_states", "overhead"), 0
        )
        total = sum((self.path / file).stat().st_size for file in (MANIFEST, SUMS))
        for file in self.manifest["files"]:
            total += (self.path / file).stat().st_size
            for key, size in _tensor_sizes(self.path / file):
                sizes[kinds.get(key.partition("/")[2], "optimizer_states")] += size
        sizes["overhead"] = total - sum(sizes.values())
        return sizes

    def verify(self) -> list[str]:
        """What is wrong with the files: nothing if each is there and has the SHA-256 it was saved with."""
        try:
            text = (self.path / SUMS).read_bytes().decode("ascii")
        except (OSError, UnicodeDecodeError) as error:
            return [f"{SUMS} cannot be read: {error}"]
        sums = {file: sum_ for sum_, _, file in (line.partition("  ") for line in text.split("\n") if line)}
        if text != sums_text(sums):
            return [f"{SUMS} is damaged"]
        expected = {MANIFEST, *self.manifest["files"]}
        problems = [f"{SUMS} does not list {file}" for file in sorted(expected - sums.keys())]
        files = sorted(expected & sums.keys())
        with ThreadPoolExecutor(HASHERS) as pool:  # hashing lets go of the interpreter
            answers = pool.map(lambda file: _damage(self.path / file, sums[file]), files)
            return problems + [
                f"{file} {answer}" for file, answer in zip(files, answers, strict=True) if answer
            ]


def _words(kept: Kept) -> tuple[Any, ...]:
    """Shape and grid, and of how many planes a weight is the sum, if it is one."""
    return (kept.shape, kept.grid) if kept.planes == 1 else (kept.shape, kept.grid, f"{kept.planes} planes")


def _damage(path: Path, expected: str) -> str | None:
    try:
        return None if sha256(path) == expected else "does not have the SHA-256 that it was saved with"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _tensor_sizes(path: Path) -> Iterator[tuple[str, int]]:
    """Each tensor's name and bytes, from a safetensors header (8 bytes of length, then JSON)."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for key, info in header.items():
        if key != "__metadata__":
            first, last = info["data_offsets"]
            yield key, last - first
