"""The folder that a quantised model is written to: a draft beside it, which a killed process leaves to the
next one, and at last a checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit_dist.checkpoint import MANIFEST, SUMS, Checkpoint
from lowbit_dist.checkpoint.layout import sha256, sums_text
from lowbit_dist.checkpoint.writing import WorkerFile
from lowbit_dist.errors import ConfigError, in_bytes, why_not_writable
from lowbit_dist.files import atomic_write, check_apart, clear
from lowbit_dist.grid import GRIDS
from lowbit_dist.packed import PackedTensor
from lowbit_dist.trained import Trained

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"  # its folder
BEGUN = "begun.json"  # what a draft is of
PER_TENSOR, PER_FOLDER = 400, 20_000  # bytes of names, shapes and configurations, at most


def check_out(source: Trained, out: Path, force: bool) -> None:
    """ConfigError unless `out` can be written, and nothing is lost by it."""
    check_apart(out, source.path)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out ({out}) is a file; write the name of a folder")
    if out.is_dir() and any(out.iterdir()):
        if not _is_ours(out):
            raise ConfigError(
                f"--out ({out}) is not empty and holds no quantised model; write another folder"
            )
        if not force:
            raise ConfigError(f"--out ({out}) exists already; write another folder, or --force to replace it")
    if why := why_not_writable(out.parent):
        raise ConfigError(f"--out ({out}) cannot be written: {why}; write a folder that can")


def _is_ours(folder: Path) -> bool:
    """Whether `quantize` has written it: nothing else is ever replaced."""
    try:
        return "quantized" in Checkpoint.open(folder).manifest
    except ConfigError:
        return False


def size_of(manifest: Mapping[str, Any]) -> int:
    """Bytes of the weights of a checkpoint."""
    n_bytes = 0
    for tensor in manifest["tensors"].values():
        n = prod(tensor["shape"])
        if tensor["grid"] is None:
            n_bytes += 4 * n
        else:
            codes, scales = n * GRIDS[tensor["grid"]].bits // 8, 2 * n // tensor["scale_every"]
            n_bytes += tensor.get("planes", 1) * (codes + scales)
    return n_bytes


def check_disk(out: Path, manifest: Mapping[str, Any]) -> None:
    """ConfigError unless there is space for what is not in the draft yet."""
    n_bytes = size_of(manifest) + PER_TENSOR * len(manifest["tensors"]) + PER_FOLDER
    place = next(folder for folder in out.absolute().parents if folder.exists())
    draft = out.parent / f".{out.name}.partial"
    there = sum(file.stat().st_size for file in draft.glob("*.safetensors")) if draft.is_dir() else 0
    free = shutil.disk_usage(place).free
    if n_bytes - there > free:
        raise ConfigError(
            f"--out ({out}) needs {in_bytes(n_bytes - there)}, but {place} has {in_bytes(free)} free; free "
            "space there, or write another folder"
        )


def take_up(draft: Path, identity: str) -> None:
    """Leave in a draft what was begun for the same result, nothing else."""
    begun = draft / BEGUN
    if begun.exists() and begun.read_text() == identity:
        return
    if any(draft.iterdir()):
        log.warning("what was begun of %s was of another model or other options, and is removed", draft)
        clear(draft)
    with atomic_write(begun) as file:
        file.write_text(identity)


def write(draft: Path, file: str, tensors: Mapping[str, PackedTensor | Tensor]) -> None:
    """One file of a checkpoint, which is there complete or not at all."""
    held = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, PackedTensor):
            held[f"{name}/codes"], held[f"{name}/scale"] = tensor.codes.cpu(), tensor.scale.half().cpu()
        else:
            held[f"{name}/weight"] = tensor.reshape(-1)  # parts of it are read by element
    with atomic_write(draft / file) as place:
        WorkerFile(place.name, held, {}, {}).write(draft)


def finish(draft: Path, manifest: dict[str, Any], source: Trained) -> None:
    """What makes a checkpoint of its files."""
    (draft / TOKENIZER).mkdir(exist_ok=True)
    for name, content in source.tokenizer.files.items():
        (draft / TOKENIZER / name).write_bytes(content)
    for file, info in manifest["files"].items():
        info["bytes"] = (draft / file).stat().st_size
    (draft / MANIFEST).write_text(json.dumps(manifest))
    sums = {file: sha256(draft / file) for file in (*manifest["files"], MANIFEST)}
    (draft / SUMS).write_text(sums_text(sums))
    (draft / BEGUN).unlink()
