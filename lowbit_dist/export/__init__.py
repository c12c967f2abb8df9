"""Exports: a trained model as files that stock software loads, published only once they have proved right.

    export(lowbit_dist.open("quickstart"), "compressed-tensors", "out/quickstart")

1. `finished.of` says what leaves: each weight as levels and scales, or as numbers (`Method.finished`).
2. The format refuses what it cannot hold (`check`), or writes it into a folder beside the output (`write`).
3. The format's own public reader reads the files back (`read_back`), and `proof.prove` compares that with
   the model: every weight bit for bit, the logits of a text, the ids of texts.
4. The model card is written, and the folder is renamed to the output.

What fails in 3 leaves nothing.  Codes go to a format as they are: nothing is quantised again.  A format is a
module with the members of `Format`, and a line of FORMATS.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lowbit_dist.errors import ConfigError, in_bytes, nearest, show
from lowbit_dist.files import atomic_folder, check_apart

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lowbit_dist.export.finished import Finished
    from lowbit_dist.trained import Trained

# Name -> module, imported when it is asked for, so that the command line starts without torch.
FORMATS = {
    "hf": "lowbit_dist.export.hf",
    "hf-bitnet": "lowbit_dist.export.hf_bitnet",
    "compressed-tensors": "lowbit_dist.export.compressed",
    "gguf": "lowbit_dist.export.gguf",
}


class ReadBack(Protocol):
    """What a format's own public reader makes of its files; nothing of this package interprets them."""

    rounding: (
        nn.Module | None
    )  # what the kind does to the inputs [..., K] of linear layers before it multiplies
    has_reciprocals: bool  # of scales, whose values may then be off by one in the last place of a float32

    def weight(self, name: str) -> Tensor | None:  # of its shape, float32
        """A tensor by its name in `Finished`; None for one that the kind rounds to narrower floats."""
        ...

    def logits(self, ids: Sequence[int]) -> Tensor:  # [len(ids), vocabulary] float32
        """Of each position of one text, whose first token is ids[0]."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without marks of its beginning and end."""
        ...


class Format(Protocol):
    """One format: these are the members of its module."""

    SUFFIX: str  # of the one file that it writes, named after the output; "": a folder's files
    KINDS: tuple[str, ...]  # values of --type; none: there is one kind
    HALF_SCALES: bool  # it has scales of rows and groups as float16, and rounds those that are finer
    READER: tuple[str, ...]  # packages that read it back, beside those that are always there
    USE: str  # Markdown for the model card: how to load `{path}`, a folder or a file

    def check(self, model: Finished, kind: str | None) -> str:
        """The kind to write, which is the model's own for None; ConfigError if the format cannot hold it."""
        ...

    def size(self, model: Finished, kind: str) -> int:
        """About how many bytes will be written."""
        ...

    def write(self, model: Finished, path: Path, kind: str) -> None:
        """Write into an empty folder, or to a file if there is a SUFFIX."""
        ...

    def read_back(self, path: Path) -> ReadBack:
        """Read what was written, with the public reader; whatever that raises is a proof that failed."""
        ...

    def note(self, path: Path, card: str) -> None:
        """Of a file with a SUFFIX: put the model card into its metadata, too."""
        ...


def export(
    trained: Trained, format: str, out: str | Path, *, kind: str | None = None, force: bool = False
) -> dict[str, Any]:
    """Write `trained` into the folder `out`, which has its model card, too: the proof, as numbers.

    ConfigError, before anything is written, where the format cannot hold the model or `out` cannot be
    written; `ProofFailed`, with nothing left, where the files are not the model.  `force`: an earlier export
    in `out` is replaced.
    """
    from lowbit_dist.export import card, finished, proof

    chosen = _format(format)
    out = Path(out)
    check_apart(out, trained.path)
    _check_out(out, chosen.SUFFIX, force)
    model = finished.of(trained)
    if chosen.HALF_SCALES:
        model = model.with_half_scales()
    kind = chosen.check(model, _kind(chosen, format, kind))
    needed = chosen.size(model, kind)
    _check_disk(out, needed)
    with atomic_folder(out, needs=lambda: needed, replaces=force) as draft:
        path = draft / f"{os.path.basename(os.path.realpath(out))}{chosen.SUFFIX}" if chosen.SUFFIX else draft
        chosen.write(model, path, kind)
        proved = proof.prove(model, lambda: chosen.read_back(path))
        written = {
            "export": str(out),
            "format": format,
            "type": kind,
            "checkpoint": str(trained.path),
            "step": trained.step,
            "bytes": sum(file.stat().st_size for file in draft.rglob("*") if file.is_file()),
            "proof": proved.as_mapping(),
        }
        text = card.text(model, chosen, written)
        (draft / card.FILE).write_text(text)
        if chosen.SUFFIX:
            chosen.note(path, text)
    return written


def _format(name: str) -> Format:
    """ConfigError if there is none of this name, or its public reader is not installed."""
    if name not in FORMATS:
        meant = nearest(name, FORMATS)
        advice = f"did you mean {meant!r}?" if meant else "write one of them"
        raise ConfigError(f"--format ({show(name)}) must be one of {', '.join(FORMATS)}; {advice}")
    chosen: Any = import_module(FORMATS[name])
    for package in chosen.READER:
        if find_spec(package) is None:
            raise ConfigError(
                f"--format ({name}) is proved by reading it back with {package}, which is not installed; "
                "install lowbit-dist[export]"
            )
    return chosen  # type: ignore[no-any-return]


def _kind(chosen: Format, format: str, kind: str | None) -> str | None:
    if kind is None or kind in chosen.KINDS:
        return kind
    if not chosen.KINDS:
        raise ConfigError(f"--type ({show(kind)}) must be left out: {format} has one type")
    meant = nearest(kind, chosen.KINDS)
    advice = f"did you mean {meant!r}?" if meant else "write one of them, or leave it out"
    raise ConfigError(f"--type ({show(kind)}) must be one of {', '.join(chosen.KINDS)}; {advice}")


def _check_out(out: Path, suffix: str, force: bool) -> None:
    from lowbit_dist.export import card

    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--out ({str(out)!r}) must be a name in UTF-8; write one") from None
    if suffix and out.suffix == suffix:
        raise ConfigError(
            f"--out ({out}) must be a folder, for {out.name} and its model card; write --out "
            f"{out.with_suffix('')}"
        )
    if out.is_file():
        raise ConfigError(f"--out ({out}) is a file; write the name of a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not card.is_export(out):
        raise ConfigError(f"--out ({out}) is not empty and holds no export; write another folder")
    if not force:
        raise ConfigError(f"--out ({out}) holds an export; write --force to replace it, or another folder")


def _check_disk(out: Path, needed: int) -> None:
    place = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConfigError(
            f"--out ({out}) needs {in_bytes(needed)}, but {place} has {in_bytes(free)} free; free "
            f"{in_bytes(needed - free)}, or write another folder"
        )
