"""What a prepared folder says of itself, and everything that can be wrong with one before it is read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowbit_dist import tokenizer
from lowbit_dist.config import ConfigError, Data, RunConfig, Section

FORMAT = 1  # of the prepared folder
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
HASH = "xxh64"  # what readers check; sha256 stands beside it


class Split(Section):
    """One side of prepared data."""

    samples: int
    tokens: int  # samples * seq_len
    dropped_tokens: int  # less than one sample, at the end
    documents: int
    bytes: int  # of the documents' text in UTF-8
    index_sha256: str  # of index.json, which holds the hashes of the shards

    @property
    def bytes_per_token(self) -> float:
        """Bits per byte are a loss in nats per token / (ln 2 * this)."""
        return self.bytes / max(1, self.tokens + self.dropped_tokens)


class Manifest(Section):
    """What a prepared folder holds, and from what it was made."""

    format: int
    seq_len: int
    vocab_size: int
    dtype: str  # uint16 or uint32
    tokenizer_sha256: str  # of tokenizer.model
    splits: dict[str, Split]
    unigram_entropy: float  # nats per token of val under train's token frequencies, each count one more
    empty_documents: int
    sources: list[str]
    sources_sha256: str  # of the names, sizes and times of what was read
    val_fraction: float
    seed: int


def is_remote(path: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]+:/", path) is not None


def download(url: str, file: Path) -> None:
    """Copy one file here.  `file://` is a folder that is slow or shared: it is read once, into the cache."""
    from streaming.base.storage.download import DOWNLOADER_MAPPINGS, CloudDownloader

    source = url.removeprefix("file://")
    try:
        downloader = CloudDownloader.get(source)
    except ValueError:
        known = ", ".join(sorted(f"{name}://" for name in DOWNLOADER_MAPPINGS if name))
        raise ConfigError(f"data.path ({url}) must be a folder, file:// or one of {known}") from None
    file.unlink(missing_ok=True)
    downloader.download(source, str(file))


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a prepared folder or URL."""
    return parse_manifest(manifest_bytes(str(path)), str(path))


def manifest_bytes(path: str) -> bytes:
    if not is_remote(path):
        folder = Path(path)
        try:
            return (folder / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if not folder.exists():
                what = "does not exist"
            elif not folder.is_dir():
                what = "is a file"
            else:
                what = f"has no {MANIFEST}, so it is not prepared data, or incomplete"
            raise ConfigError(
                f"data.path ({path}) {what}; write a folder made by `lowbit data prepare`"
            ) from None
        except OSError as error:
            raise ConfigError(f"data.path ({path}) cannot be read: {error.strerror or error}") from None
    with tempfile.TemporaryDirectory(prefix="lowbit-") as drafts:
        try:
            download(f"{path.rstrip('/')}/{MANIFEST}", Path(drafts, MANIFEST))
            return Path(drafts, MANIFEST).read_bytes()
        except ConfigError:
            raise
        except Exception as error:  # every storage client has its own
            raise ConfigError(
                f"data.path ({path}): its {MANIFEST} cannot be fetched ({type(error).__name__}: {error}); "
                "write a folder or URL of data made by `lowbit data prepare`"
            ) from None


def parse_manifest(text: bytes, path: str) -> Manifest:
    try:
        fields = json.loads(text)
        if isinstance(fields, dict) and fields.get("format", FORMAT) != FORMAT:
            raise ConfigError(
                f"data.path ({path}) has data of format {fields['format']!r}, this version reads {FORMAT}; "
                "prepare it again with `lowbit data prepare`"
            )
        manifest = Manifest.model_validate(fields)
    except (ValueError, RecursionError) as error:  # JSON's, UTF-8's and pydantic's errors are ValueErrors
        why = error.errors()[0]["loc"] if isinstance(error, ValidationError) else str(error)
        raise ConfigError(
            f"data.path ({path}): its {MANIFEST} is damaged ({why}); prepare the data again, or copy it again"
        ) from None
    if set(manifest.splits) != set(SPLITS):
        raise ConfigError(f"data.path ({path}): its {MANIFEST} must have the splits {', '.join(SPLITS)}")
    return manifest


def check(config: RunConfig) -> Manifest:
    """Everything that can be wrong with `config.data` and is cheap to see, before a worker starts."""
    data = config.data
    manifest = read_manifest(data.path)
    if data.seq_len != manifest.seq_len:
        raise ConfigError(
            f"data.seq_len ({data.seq_len}) must be {manifest.seq_len}, with which {data.path} was prepared; "
            f"write data.seq_len: {manifest.seq_len}, or prepare the data with --seq-len {data.seq_len}"
        )
    if data.tokenizer is not None and tokenizer.load(data.tokenizer).sha256 != manifest.tokenizer_sha256:
        raise ConfigError(
            f"data.tokenizer ({data.tokenizer}) is not the one that {data.path} was prepared with; leave it "
            "out, or prepare the data with this tokenizer"
        )
    if not is_remote(data.path):
        folder = Path(data.path)
        if tokenizer.load(folder / "tokenizer").sha256 != manifest.tokenizer_sha256:
            raise ConfigError(
                f"data.path ({data.path}): its tokenizer/{tokenizer.MODEL} is not the one its shards were "
                "written with; copy or prepare the data again"
            )
        for split in SPLITS:
            _check_files(folder, split, manifest)
    n_samples, needed = manifest.splits["train"].samples, config.train.batch_tokens // data.seq_len
    if n_samples < needed:
        raise ConfigError(
            f"train.batch_tokens ({config.train.batch_tokens:,}) needs {needed:,} samples of {data.seq_len} "
            f"tokens, but {data.path} has {n_samples:,}; write at most {n_samples * data.seq_len:,}, or "
            "prepare more text"
        )
    return manifest


def _check_files(folder: Path, split: str, manifest: Manifest) -> None:
    """Every shard is there in full length; that its bytes are right is seen when it is read."""
    try:
        index = (folder / split / "index.json").read_bytes()
        for info in parse_index(index, f"{folder}/{split}", split, manifest):
            file = folder / split / (info["zip_data"] or info["raw_data"])["basename"]
            size, expected = file.stat().st_size, (info["zip_data"] or info["raw_data"])["bytes"]
            if size != expected:
                raise ConfigError(
                    f"data.path ({folder}): {split}/{file.name} has {size:,} bytes and must have "
                    f"{expected:,}; copy or prepare the data again"
                )
    except FileNotFoundError as error:
        missing = Path(error.filename).relative_to(folder)
        raise ConfigError(f"data.path ({folder}) lacks {missing}; copy or prepare the data again") from None
    except OSError as error:
        raise ConfigError(f"data.path ({folder}) cannot be read: {error}") from None


def parse_index(index: bytes, place: str, split: str, manifest: Manifest) -> list[dict[str, Any]]:
    if hashlib.sha256(index).hexdigest() != manifest.splits[split].index_sha256:
        raise ConfigError(f"{place}/index.json is damaged or of other data; copy or prepare the data again")
    shards: list[dict[str, Any]] = json.loads(index)["shards"]
    for info in shards:
        for file in filter(None, (info["raw_data"], info["zip_data"])):
            if os.path.basename(file["basename"]) != file["basename"] or HASH not in file["hashes"]:
                raise ConfigError(
                    f"{place}/index.json has a shard with a path or without a hash; prepare again"
                )
    return shards


def copy_tokenizer(data: Data, folder: Path) -> None:
    """Put the tokenizer of prepared data into `folder`: a run keeps what its weights were trained with."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in tokenizer.FILES:
        source = f"{data.path}/tokenizer/{name}"
        if is_remote(data.path):
            download(source, folder / name)
        elif Path(source).exists():
            shutil.copyfile(source, folder / name)
