"""What a checkpoint's folder is made of, for whoever writes or reads one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit_dist.errors import show
from lowbit_dist.grid import BLOCK, GRIDS, Grid

FORMAT = 2
READABLE = (1, 2)
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
REPLACED = "replaced"  # ends the name of a checkpoint that is written again, until the new one has its own


@dataclass(frozen=True)
class Position:
    """Where a run stands: all that is not in the tensors."""

    step: int  # optimizer steps done
    samples: int  # training samples consumed, over all epochs; the data position
    tokens: int
    skipped_steps: int = 0
    # since the last log, so that a resumed run logs what an undisturbed one does
    loss_sum: float = 0.0
    loss_count: int = 0
    flips: int = 0
    # of the last applied steps, by which the next ones are judged
    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    skipped_in_a_row: int = 0
    rollbacks: int = 0  # returns to a checkpoint after a spike
    compiled: str | None = None  # for which instructions blocks were compiled; None: they were not
    in_integers: bool = False  # whether layers multiplied these because `precision.matmul: auto` chose so
    updates_before: int = 0  # that the optimizer's states have seen in the run that this one started from

    @property
    def updates(self) -> int:
        """That the optimizer's states have seen."""
        return self.updates_before + self.step - self.skipped_steps

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Position:
        """Fields that an older manifest lacks have their defaults."""
        fields: dict[str, Any] = {key: manifest[key] for key in cls.__dataclass_fields__ if key in manifest}
        fields |= {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        return cls(**fields)


def check_parts(manifest: dict[str, Any]) -> None:
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
        for key in ("scale_every", "planes"):
            number = tensor.get(key, 1)
            if not _are_counts([number]) or not number:
                raise ValueError(f"the {key} of {show(name)} is none")
    if not _are_counts([manifest[key] for key in ("step", "samples", "tokens", "vocab_size")]):
        raise ValueError("step, samples, tokens and vocab_size must be whole numbers")
    if not all(
        isinstance(manifest[key], kind) for key, kind in (("config", dict), ("tokenizer_sha256", str))
    ):
        raise ValueError("config or tokenizer_sha256 is none")


def _are_counts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)


def slot_keys(slot: str, format: int = FORMAT) -> tuple[str, str]:
    """The keys of an optimizer's slot: its values, and the scales of 8-bit ones.

    Format 1 knew AdamW's m and v alone, beside `codes`, `scale` and `weight`.
    """
    return (slot, f"{slot}_scale") if format == 1 else (f"slots/{slot}", f"slots/{slot}/scale")


def sums_text(sums: dict[str, str]) -> str:
    """`SHA256SUMS`, of each file's hash."""
    return "".join(f"{sum_}  {file}\n" for file, sum_ in sums.items())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def offset(key: str, grid: Grid | None, element: int) -> int:
    """Where element number `element` of a shard stands in the stored tensor `key`."""
    if key == "codes":
        assert grid is not None, "only low-bit tensors have codes"
        return -(-element // BLOCK) * grid.bytes_per_block
    is_scale = key in ("m_scale", "v_scale") or (key.startswith("slots/") and key.endswith("/scale"))
    return -(-element // BLOCK) if is_scale and key != "slots/scale" else element
