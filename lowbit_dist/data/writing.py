"""Documents become tokens, tokens samples, samples hashed shards: `lowbit data prepare`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit_dist import documents
from lowbit_dist.data import tokenizing
from lowbit_dist.data.manifest import FORMAT, MANIFEST, is_remote, read_manifest
from lowbit_dist.data.shards import Writer
from lowbit_dist.errors import ConfigError
from lowbit_dist.files import atomic_folder, atomic_write
from lowbit_dist.tokenizer import FILES, MODEL, Tokenizer
from lowbit_dist.tokenizer import load as load_tokenizer


def prepare(
    inputs: Sequence[str | Path],
    tokenizer_dir: str | Path,
    out_dir: str | Path,
    *,
    seq_len: int = 256,
    workers: int | None = None,
    val_fraction: float = 0.02,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the prepared folder `out_dir` and return its manifest; the same bytes for any number of workers.

    The folder appears at its name complete or not at all.  If it is there already and was made from the same
    inputs in the same way, nothing is done; if it was made otherwise, it is not touched.
    """
    if not 2 <= seq_len <= 1 << 20:
        raise ConfigError(f"--seq-len ({seq_len}) must be from 2 to {1 << 20:,}; write 256, for example")
    if not 0 < val_fraction <= 0.5:
        raise ConfigError(f"--val-fraction ({val_fraction}) must be more than 0, at most 0.5; write 0.02")
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers ({workers}) must be at least 1; write 1, or leave it out")
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"--seed ({seed}) must be at least 0 and less than 2^63; write 0")
    if is_remote(str(out_dir)):
        raise ConfigError(
            f"--out ({out_dir}) must be a folder on this machine; copy it to a bucket afterwards"
        )
    out = Path(out_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    ranges = documents.parts(inputs)
    recipe = {
        "format": FORMAT,
        "seq_len": seq_len,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "sources": [str(source) for source in inputs],
        "sources_sha256": hashlib.sha256(json.dumps(ranges).encode()).hexdigest(),
        "val_fraction": val_fraction,
        "seed": seed,
    }
    if existing := _existing(out, recipe):
        return existing
    tokenizing.check_ray()
    needed = None
    with atomic_folder(out, needs=lambda: needed) as draft:
        _copy_tokenizer(Path(tokenizer_dir), tokenizer, draft / "tokenizer")
        writer = Writer(draft, tokenizer.vocab_size, seq_len, val_fraction)
        n_bytes, n_read = sum(part.size for part in ranges), 0
        with _progress(n_bytes) as advance:
            for chunk in tokenizing.tokenised(ranges, tokenizer, seed, workers):
                n_read += int(chunk["size"])
                needed = round(writer.bytes_with(chunk) * n_bytes / max(1, n_read))
                writer.add(chunk)
                advance(int(chunk["size"]))
        manifest = {**recipe, **writer.finish()}
        _write_manifest(manifest, draft)
    return manifest


def _existing(out: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of `out` when it is what `recipe` would make; None when there is nothing."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"--out ({out}) is there and is not prepared data; write the name of a new folder")
    manifest = read_manifest(out).model_dump()
    if differing := [name for name in recipe if manifest[name] != recipe[name]]:
        name = differing[0]
        what = (
            "its inputs have changed"
            if name == "sources_sha256"
            else f"{name} {manifest[name]}, not {recipe[name]}"
        )
        raise ConfigError(
            f"--out ({out}) holds data prepared otherwise ({what}); write another folder, or delete this one"
        )
    return manifest


def _copy_tokenizer(source: Path, tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir()
    (folder / MODEL).write_bytes(tokenizer.model)
    for name in FILES[1:] if source.is_dir() else ():
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_manifest(manifest: Mapping[str, Any], folder: Path) -> None:
    """Last: its presence says that everything it speaks of is there."""
    with atomic_write(folder / MANIFEST) as draft:
        draft.write_text(json.dumps(manifest, indent=1) + "\n")


@contextlib.contextmanager
def _progress(n_bytes: int) -> Iterator[Any]:
    """A bar on stderr; gives the function that moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("preparing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=n_bytes)
        yield lambda n: progress.advance(task, n)
