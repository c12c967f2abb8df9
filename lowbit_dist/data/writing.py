"""Documents become tokens, tokens samples, samples hashed shards: `lowbit data prepare`."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit_dist import tokenizer
from lowbit_dist.config import ConfigError
from lowbit_dist.data import documents
from lowbit_dist.data.library import import_streaming
from lowbit_dist.data.manifest import FORMAT, HASH, MANIFEST, SPLITS, is_remote, read_manifest
from lowbit_dist.files import is_full, sync, whole

SHARD_BYTES = 1 << 24  # uncompressed
TEXT_CHUNK = 1 << 22  # bytes of text that a task gives back at once
HELD_TOKENS = 1 << 22  # a corpus of fewer tokens is held in memory until its split is decided

Array = NDArray[Any]


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
    words = tokenizer.load(tokenizer_dir)
    chosen = documents.parts(inputs)
    recipe = {
        "format": FORMAT,
        "seq_len": seq_len,
        "vocab_size": words.vocab_size,
        "tokenizer_sha256": words.sha256,
        "sources": [str(each) for each in inputs],
        "sources_sha256": hashlib.sha256(json.dumps(chosen).encode()).hexdigest(),
        "val_fraction": val_fraction,
        "seed": seed,
    }
    if existing := _existing(out, recipe):
        return existing
    with drafted(out) as draft:
        _copy_tokenizer(Path(tokenizer_dir), words, draft.folder / "tokenizer")
        writer = _Writer(draft.folder, words, seq_len, val_fraction)
        n_bytes, n_read = sum(part.size for part in chosen), 0
        with _progress(n_bytes) as advance:
            for chunk in _tokenised(chosen, words, seed, workers):
                n_read += int(chunk["size"])
                draft.needs = round(writer.bytes_with(chunk) * n_bytes / max(1, n_read))
                writer.add(chunk)
                advance(int(chunk["size"]))
        manifest = {**recipe, **writer.finish()}
        _write_manifest(manifest, draft.folder)
        draft.publish()
    return manifest


def _existing(out: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of `out` when it is what `recipe` would make; None when there is nothing."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"--out ({out}) is there and is not prepared data; write the name of a new folder")
    found = read_manifest(out).model_dump()
    if differing := [name for name in recipe if found[name] != recipe[name]]:
        name = differing[0]
        what = (
            "its inputs have changed"
            if name == "sources_sha256"
            else f"{name} {found[name]}, not {recipe[name]}"
        )
        raise ConfigError(
            f"--out ({out}) holds data prepared otherwise ({what}); write another folder, or delete this one"
        )
    return found


@dataclass
class Draft:
    """A folder to write into that becomes `out` when it is complete."""

    out: Path
    folder: Path
    needs: int | None = None  # bytes in all, once they can be guessed

    def publish(self) -> None:
        for where, _, files in os.walk(self.folder):
            for name in (*files, "."):
                sync(Path(where, name))
        os.rename(self.folder, self.out)  # an empty folder may stand there
        sync(self.out.parent)


@contextlib.contextmanager
def drafted(out: Path) -> Iterator[Draft]:
    """An empty folder beside `out` to write into; gone afterwards unless it was published.

    Its name does not change, so what a killed process left is cleared by the next one; a lock that dies with
    its process keeps two living ones apart.
    """
    draft = Draft(out, out.parent / f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft.folder.mkdir(exist_ok=True)
        descriptor = os.open(draft.folder, os.O_RDONLY)
    except OSError as error:
        if is_full(error):
            raise RuntimeError(_full(draft)) from error
        raise ConfigError(
            f"--out ({out}) cannot be written: {error.strerror or error}; write a folder that can"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = draft.folder.exists() and os.path.samestat(os.fstat(descriptor), draft.folder.stat())
        except BlockingIOError:
            ours = False
        if not ours:
            raise ConfigError(
                f"--out ({out}) is being written by another process; wait for it, or name another"
            )
        for left in draft.folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        full: OSError | None = None
        try:
            yield draft
        except OSError as error:
            if not is_full(error):
                raise
            full = error
        finally:
            shutil.rmtree(draft.folder, ignore_errors=True)
        if full is not None:
            raise RuntimeError(_full(draft)) from full
    finally:
        os.close(descriptor)


def _full(draft: Draft) -> str:
    """What to do about a full disk, once what was written is removed."""
    size = "more space than there is"
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(draft.out.parent).free
        if draft.needs is not None:
            size = f"about {draft.needs / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
    return (
        f"the disk of {draft.out.parent} is full, and what was written of {draft.out} is removed: it needs "
        f"{size}; free space there, or write another --out, and start again"
    )


def _copy_tokenizer(source: Path, words: tokenizer.Tokenizer, folder: Path) -> None:
    folder.mkdir()
    (folder / tokenizer.MODEL).write_bytes(words.model)
    for name in tokenizer.FILES[1:] if source.is_dir() else ():
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_manifest(manifest: Mapping[str, Any], folder: Path) -> None:
    """Last, whole, and after everything that it speaks of."""
    with whole(folder / MANIFEST) as draft:
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


def _tokenised(
    chosen: Sequence[documents.Part], words: tokenizer.Tokenizer, seed: int, workers: int | None
) -> Iterator[dict[str, Any]]:
    """Chunks of tokenised documents, in the order of the parts: what `_tokenise` yields."""
    # Read when Ray is imported: its services then listen on 127.0.0.1 alone.
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray
    import ray.data

    is_ours = not ray.is_initialized()
    if is_ours:
        _start_ray(workers)
    context = ray.data.DataContext.get_current()
    before = (context.enable_progress_bars, context.print_on_execution_start)
    loggers = {name: logging.getLogger(name).level for name in ("ray.data", "ray.data.dataset")}
    try:
        context.enable_progress_bars = context.print_on_execution_start = False
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        bundles = _bundles(chosen)
        dataset = ray.data.from_items([{"parts": each} for each in bundles], override_num_blocks=len(bundles))
        dataset.context.execution_options.preserve_order = True
        tokenise: Any = _tokenise  # Ray's types know no further arguments
        chunks: Any = dataset.map_batches(
            tokenise,
            batch_size=1,
            fn_kwargs={"model": ray.put(words.model), "sha256": words.sha256, "seed": seed},
            concurrency=workers,
        )
        for table in chunks.iter_batches(batch_size=None, batch_format="pyarrow"):
            for chunk in table.to_pylist():
                if chunk["error"]:
                    raise ConfigError(chunk["error"])
                yield chunk
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before
        for name, level in loggers.items():
            logging.getLogger(name).setLevel(level)
        if is_ours:
            ray.shutdown()


def _start_ray(workers: int | None) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        return
    ray.init(
        address="local",
        num_cpus=workers or os.cpu_count(),
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=1 << 29,
        **quiet,
    )


def _bundles(chosen: Sequence[documents.Part]) -> list[str]:
    """Consecutive parts, some MB together, as JSON; at most some ten thousand tasks."""
    enough = max(documents.PART, sum(part.size for part in chosen) // 10_000)
    bundles: list[list[documents.Part]] = []
    size = enough
    for part in chosen:
        if size >= enough:
            bundles.append([])
            size = 0
        bundles[-1].append(part)
        size += part.size
    return [json.dumps(bundle) for bundle in bundles]


_loaded: dict[str, tokenizer.Tokenizer] = {}  # by hash; a Ray worker process serves many tasks


def _tokenise(batch: dict[str, Array], model: Any, sha256: str, seed: int) -> Iterator[dict[str, Array]]:
    """The documents of one bundle of parts, as rows of about TEXT_CHUNK bytes of text.

    `tokens` int32, every document with its <s> and </s>; of every document its `lengths` int32 in tokens, the
    `sizes` int64 of its text in bytes, and its `places` uint64, a hash that says into which split it goes.
    """
    import ray

    if sha256 not in _loaded:
        _loaded[sha256] = tokenizer.Tokenizer(ray.get(model))
    words = _loaded[sha256]
    parts = [documents.Part(*part) for part in json.loads(batch["parts"][0])]
    left = sum(part.size for part in parts)  # of the input, in bytes, for the progress bar
    key = seed.to_bytes(8, "little")
    chunk = _Chunk()
    error = ""
    try:
        for text in documents.read(parts):
            data = text.encode()
            if not data:
                chunk.n_empty += 1
                continue
            place = hashlib.blake2b(data, digest_size=8, key=key).digest()
            chunk.add([words.bos_id, *words.encode(text), words.eos_id], len(data), place)
            if chunk.n_bytes >= TEXT_CHUNK:
                size = min(left, chunk.n_bytes)
                left -= size
                yield chunk.row(size)
                chunk = _Chunk()
    except ConfigError as mistake:
        # Raised in a task, it would reach the user inside Ray's own report of a failed task.
        error = str(mistake)
    yield chunk.row(left, error)


class _Chunk:
    def __init__(self) -> None:
        self.tokens: list[Array] = []
        self.sizes: list[int] = []
        self.places: list[bytes] = []
        self.n_empty = self.n_bytes = 0

    def add(self, tokens: list[int], size: int, place: bytes) -> None:
        self.tokens.append(np.array(tokens, np.int32))
        self.sizes.append(size)
        self.places.append(place)
        self.n_bytes += size

    def row(self, size: int, error: str = "") -> dict[str, Array]:
        lengths = np.array([len(each) for each in self.tokens], np.int32)
        columns = {
            "tokens": np.concatenate([np.empty(0, np.int32), *self.tokens]).tobytes(),
            "lengths": lengths.tobytes(),
            "sizes": np.array(self.sizes, np.int64).tobytes(),
            "places": b"".join(self.places),
        }
        row: dict[str, Array] = {name: np.array([data], dtype=object) for name, data in columns.items()}
        return {
            **row,
            "n_empty": np.array([self.n_empty]),
            "size": np.array([size]),
            "error": np.array([error], dtype=object),
        }


class _Writer:
    """Chunks in, two MDS datasets out."""

    def __init__(self, folder: Path, words: tokenizer.Tokenizer, seq_len: int, val_fraction: float):
        self.dtype: Any = np.uint16 if words.vocab_size <= 1 << 16 else np.uint32
        self.val_fraction = val_fraction
        self.limit = int(val_fraction * 2**64)  # documents whose place is below go to val
        self.seq_len = seq_len
        self.vocab_size = words.vocab_size
        self.held: list[dict[str, Array]] | None = []
        self.n_held = self.n_empty = 0
        self.splits = {name: _SplitWriter(folder / name, self) for name in SPLITS}
        self.n_tokens = 0

    def bytes_with(self, row: Mapping[str, Any]) -> float:
        """What all chunks up to this one need on disk when nothing of it can be compressed."""
        self.n_tokens += len(row["tokens"]) // 4
        return self.n_tokens * (np.dtype(self.dtype).itemsize + 8 / self.seq_len)

    def add(self, row: Mapping[str, Any]) -> None:
        chunk: dict[str, Array] = {
            "tokens": np.frombuffer(row["tokens"], np.int32),
            "lengths": np.frombuffer(row["lengths"], np.int32),
            "sizes": np.frombuffer(row["sizes"], np.int64),
            "places": np.frombuffer(row["places"], np.uint64),
        }
        self.n_empty += int(row["n_empty"])
        if self.held is None:
            self._write(chunk)
            return
        self.held.append(chunk)
        self.n_held += len(chunk["tokens"])
        if self.n_held >= HELD_TOKENS:
            self._release()

    def _release(self) -> None:
        held, self.held = self.held or [], None
        for chunk in held:
            self._write(chunk)

    def _write(self, chunk: Mapping[str, Array]) -> None:
        is_val = chunk["places"] < self.limit
        for name, chosen in (("train", ~is_val), ("val", is_val)):
            tokens = chunk["tokens"][np.repeat(chosen, chunk["lengths"])]
            self.splits[name].add(tokens, int(chosen.sum()), int(chunk["sizes"][chosen].sum()))

    def _limit_of_few(self) -> int:
        """Of few documents, perhaps none has a place below the limit; then the lowest of all go to val."""
        chunks = self.held or []
        places = np.concatenate([np.empty(0, np.uint64), *(chunk["places"] for chunk in chunks)])
        lengths = np.concatenate([np.empty(0, np.int64), *(chunk["lengths"] for chunk in chunks)])
        if lengths[places < self.limit].sum() >= self.seq_len:
            return self.limit
        each, where = np.unique(places, return_inverse=True)
        tokens = np.bincount(where, lengths, len(each)).cumsum()  # in documents up to this place
        enough = max(self.seq_len, self.val_fraction * self.n_held)
        n = int(np.searchsorted(tokens, enough)) + 1
        if n >= len(each) or tokens[-1] - tokens[n - 1] < self.seq_len:
            raise ConfigError(
                f"--input has {len(places):,} documents with {self.n_held:,} tokens, too few for a "
                f"training and a validation sample of --seq-len {self.seq_len} tokens from different "
                "documents; give more text"
            )
        return int(each[n])

    def finish(self) -> dict[str, Any]:
        """Close the shards; what the manifest says of them."""
        if self.held is not None:
            self.limit = self._limit_of_few()
            self._release()
        splits = {name: writer.finish() for name, writer in self.splits.items()}
        for name, split in splits.items():
            if not split["samples"]:
                raise ConfigError(
                    f"--val-fraction ({self.val_fraction}) leaves {name} {split['dropped_tokens']:,} tokens, "
                    f"less than one sample of {self.seq_len}; write a "
                    f"{'larger' if name == 'val' else 'smaller'} one"
                )
        train, val = (self.splits[name].counts for name in SPLITS)
        nats = np.log(train.sum() + self.vocab_size) - np.log(train + 1.0)
        return {
            "dtype": np.dtype(self.dtype).name,
            "splits": splits,
            "unigram_entropy": float((nats * val).sum() / val.sum()),
            "empty_documents": self.n_empty,
        }


class _SplitWriter:
    def __init__(self, folder: Path, settings: _Writer):
        import_streaming()
        from streaming import MDSWriter

        self.folder = folder
        self.seq_len, self.dtype = settings.seq_len, settings.dtype
        self.mds = MDSWriter(
            columns={"tokens": f"ndarray:{np.dtype(self.dtype).name}:{self.seq_len}"},
            out=str(folder),
            compression="zstd",
            hashes=["sha256", HASH],
            size_limit=max(SHARD_BYTES, 1 << 12 | 8 * self.seq_len),
        )
        self.rest = np.empty(0, np.int32)
        self.counts = np.zeros(settings.vocab_size, np.int64)  # of each token in the samples
        self.samples = self.documents = self.bytes = 0

    def add(self, tokens: Array, n_documents: int, n_bytes: int) -> None:
        tokens = np.concatenate([self.rest, tokens])
        n = len(tokens) // self.seq_len
        whole, self.rest = tokens[: n * self.seq_len], tokens[n * self.seq_len :]
        for sample in whole.astype(self.dtype).reshape(n, self.seq_len):
            self.mds.write({"tokens": sample})
        self.counts += np.bincount(whole, minlength=len(self.counts))
        self.samples += n
        self.documents += n_documents
        self.bytes += n_bytes

    def finish(self) -> dict[str, Any]:
        self.mds.finish()
        return {
            "samples": self.samples,
            "tokens": self.samples * self.seq_len,
            "dropped_tokens": len(self.rest),
            "documents": self.documents,
            "bytes": self.bytes,
            "index_sha256": hashlib.sha256((self.folder / "index.json").read_bytes()).hexdigest(),
        }
