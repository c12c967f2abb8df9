"""What a prepared folder says of itself, and everything that can be wrong with one before it is read."""

from __future__ import annotations

import errno
import filecmp
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from lowbit_dist import hf_tokenizer
from lowbit_dist.config import Data, RunConfig
from lowbit_dist.data.library import import_streaming
from lowbit_dist.errors import ConfigError, show
from lowbit_dist.files import atomic_write
from lowbit_dist.section import Section
from lowbit_dist.tokenizer import FILES, Marks
from lowbit_dist.tokenizer import load as load_tokenizer

FORMAT = 1  # of the prepared folder
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
AGAIN = "copy or prepare the data again"
HASH = "xxh64"  # what readers check; sha256 stands beside it


Number = Annotated[int, Field(ge=0, lt=2**63)]
FileName = Annotated[str, Field(pattern=r"^[a-z_]+\.(json|model|jinja)$")]  # no name leads out of the folder


def shard_columns(dtype: str, seq_len: int, *, has_prompts: bool) -> dict[str, str]:
    """The columns of a shard, sorted, and Streaming's names of their encodings."""
    # Whether the loss counts a token: not that of a prompt, nor the mark before it.
    is_counted = {"is_counted": f"ndarray:uint8:{seq_len}"} if has_prompts else {}
    return {**is_counted, "tokens": f"ndarray:{dtype}:{seq_len}"}


class Split(Section):
    """One side of prepared data."""

    samples: Annotated[int, Field(ge=1, lt=2**63)]
    tokens: Number  # samples * seq_len
    dropped_tokens: Number  # less than one sample, at the end, and samples of prompts alone
    documents: Number
    bytes: Number  # of the documents' text in UTF-8, without prompts
    # Of all of these tokens, those that the loss counts; None: every one, for there are no prompts.
    counted_tokens: Number | None = None
    index_sha256: str  # of index.json, which holds the hashes of the shards

    @property
    def counted_share(self) -> float:
        """How much of its documents' tokens the loss counts."""
        n_tokens = self.tokens + self.dropped_tokens
        return 1.0 if self.counted_tokens is None else self.counted_tokens / max(1, n_tokens)

    @property
    def bytes_per_token(self) -> float:
        """Bits per byte are a loss in nats per token / (ln 2 * this)."""
        n_tokens = self.tokens + self.dropped_tokens
        return self.bytes / max(1, n_tokens if self.counted_tokens is None else self.counted_tokens)


class Manifest(Section):
    """What a prepared folder holds, and from what it was made."""

    format: int
    seq_len: Annotated[int, Field(ge=2, le=2**20)]
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)]
    dtype: Literal["uint16", "uint32"]
    tokenizer_sha256: str  # of tokenizer.model, or of the files that a tokenizer.json stands for
    splits: dict[str, Split]
    unigram_entropy: float  # nats per token of val under train's token frequencies, each count one more
    largest_token: Number | None = None  # of the samples; older manifests do not say
    empty_documents: Number
    sources: list[str]
    sources_sha256: str  # of the names, sizes and times of what was read, and of data sets' fingerprints
    # In tokenizer/, and the ids that stand before and after each document; older manifests do not say.
    tokenizer_files: list[FileName] | None = None
    document_begin: Number | None = None
    document_end: Number | None = None
    # How documents were found, and what of the sources they are not; older manifests do not say.
    field: str = "text"
    prompt_field: str | None = None
    separator: str | None = None
    on_bad_row: Literal["fail", "skip"] = "fail"
    longest_document: Number | None = None  # bytes; longer ones were split, for there are few
    skipped_rows: Number = 0
    first_skipped_row: str | None = None
    left_out: dict[str, Number] = Field(default_factory=dict)  # files and folders, by the reason
    val_fraction: float
    seed: int

    @property
    def used(self) -> int:
        """So many of the tokenizer's first tokens are all that the samples have, as far as that is known."""
        return self.vocab_size if self.largest_token is None else self.largest_token + 1

    @property
    def marks(self) -> Marks:
        """What stands around documents."""
        return Marks(self.document_begin, self.document_end)

    @property
    def digest(self) -> str:
        """SHA-256 of what is trained on: of the tokens and their order, whatever they were made from and
        wherever they lie.
        """
        content = {
            "seq_len": self.seq_len,
            "vocab_size": self.vocab_size,
            "dtype": self.dtype,
            "tokenizer": self.tokenizer_sha256,
            "splits": {name: split.index_sha256 for name, split in self.splits.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_remote(path: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]+:/", path) is not None


def download(url: str, file: Path) -> None:
    """Copy one file here.  `file://` is a folder that is slow or shared: it is read once, into the cache."""
    import_streaming()
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
            raise ConfigError(
                f"data.path ({path}): its {MANIFEST} cannot be read ({error.strerror or error}); {AGAIN}"
            ) from None
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
    what = f"data.path ({path}): its {MANIFEST}"
    fields = parse_json(text, what)
    if isinstance(fields, dict) and fields.get("format", FORMAT) != FORMAT:
        raise ConfigError(
            f"data.path ({path}) has data of format {show(fields['format'])}, this version reads {FORMAT}; "
            "prepare it again with `lowbit data prepare`"
        )
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"])) or "it"
        raise ConfigError(
            f"{what} is damaged ({place} is {show(wrong['input'])}: {wrong['msg']}); {AGAIN}"
        ) from None
    if set(manifest.splits) != set(SPLITS):
        raise ConfigError(f"{what} is damaged: it must have the splits {', '.join(SPLITS)}; {AGAIN}")
    return manifest


def parse_json(text: bytes, what: str) -> Any:
    """The value of a JSON file; a ConfigError says at which byte it stops being one."""
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        place, why = error.start, "is not UTF-8 text"
    except json.JSONDecodeError as error:
        place, why = len(error.doc[: error.pos].encode()), f"is not JSON ({error.msg})"
    except (RecursionError, ValueError) as error:  # ValueError: a number of more digits than Python converts
        place, why = 0, f"begins what cannot be read ({type(error).__name__})"
    where = f"byte {place:,} of {len(text):,} {why}" if text else "it is empty"
    raise ConfigError(f"{what} is damaged ({where}); {AGAIN}")


def check(config: RunConfig) -> Manifest:
    """Everything that can be wrong with `config.data` and is cheap to see, before a worker starts."""
    data = config.data
    manifest = read_manifest(data.path)
    if data.seq_len != manifest.seq_len:
        raise ConfigError(
            f"data.seq_len ({data.seq_len}) must be {manifest.seq_len}, with which {data.path} was prepared; "
            f"write data.seq_len: {manifest.seq_len}, or prepare the data with --seq-len {data.seq_len}"
        )
    expected = manifest.tokenizer_sha256
    if data.tokenizer is not None and load_tokenizer(data.tokenizer, sha256=expected).sha256 != expected:
        raise ConfigError(
            f"data.tokenizer ({data.tokenizer}) is not the one that {data.path} was prepared with; leave it "
            "out, or prepare the data with this tokenizer"
        )
    if not is_remote(data.path):
        folder = Path(data.path)
        for name in manifest.tokenizer_files or ():
            if not (folder / "tokenizer" / name).exists():
                raise ConfigError(f"data.path ({data.path}) lacks tokenizer/{name}; {AGAIN}")
        tokenizer = load_tokenizer(folder / "tokenizer", sha256=expected)
        if tokenizer.sha256 != expected:
            raise ConfigError(
                f"data.path ({data.path}): its tokenizer/ is not the one its shards were written "
                f"with; {AGAIN}"
            )
        if tokenizer.vocab_size != manifest.vocab_size:
            raise ConfigError(
                f"data.path ({data.path}): its {MANIFEST} has vocab_size {manifest.vocab_size:,}, its "
                f"tokenizer {tokenizer.vocab_size:,} pieces; {AGAIN}"
            )
        for split in SPLITS:
            check_files(folder, split, manifest)
    if data.document_mask and manifest.marks == Marks(None, None):
        raise ConfigError(
            f"data.document_mask (true) needs data that says what separates its documents, as {data.path} of "
            "an earlier version does not; prepare it again into another folder, or write false"
        )
    n_samples, needed = manifest.splits["train"].samples, config.train.batch_tokens // data.seq_len
    if n_samples < needed:
        raise ConfigError(
            f"train.batch_tokens ({config.train.batch_tokens:,}) needs {needed:,} samples of {data.seq_len} "
            f"tokens, but {data.path} has {n_samples:,}; write at most {n_samples * data.seq_len:,}, or "
            "prepare more text"
        )
    return manifest


def check_files(folder: Path, split: str, manifest: Manifest) -> None:
    """Every shard is there in full length; that its bytes are right is seen when it is read."""
    file = folder / split / "index.json"
    try:
        for info in parse_index(file.read_bytes(), f"{folder}/{split}", split, manifest):
            stored = info["zip_data"] or info["raw_data"]
            file = folder / split / stored["basename"]
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
            if (size := file.stat().st_size) != stored["bytes"]:
                raise ConfigError(
                    f"data.path ({folder}): {split}/{file.name} has {size:,} bytes and must have "
                    f"{stored['bytes']:,}; {AGAIN}"
                )
    except FileNotFoundError:
        raise ConfigError(f"data.path ({folder}) lacks {file.relative_to(folder)}; {AGAIN}") from None
    except OSError as error:
        raise ConfigError(
            f"data.path ({folder}): {file.relative_to(folder)} cannot be read ({error.strerror or error}); "
            f"{AGAIN}"
        ) from None


def parse_index(index: bytes, place: str, split: str, manifest: Manifest) -> list[dict[str, Any]]:
    """What a split's index.json says of its shards, with everything in it that readers rely on."""
    what = f"{place}/index.json"
    content = parse_json(index, what)
    if hashlib.sha256(index).hexdigest() != manifest.splits[split].index_sha256:
        raise ConfigError(
            f"{what} is damaged or of other data (its SHA-256 is not the one in {MANIFEST}); {AGAIN}"
        )
    expected = shard_columns(manifest.dtype, manifest.seq_len, has_prompts=manifest.prompt_field is not None)
    try:
        shards: list[dict[str, Any]] = content["shards"]
        for info in shards:
            for file in (info["raw_data"], *filter(None, [info["zip_data"]])):
                # No name leads out of the folder, or to another file of the cache.
                if not re.fullmatch(r"shard\.[0-9]{5,}\.mds(\.[a-z0-9]+)?", file["basename"]):
                    raise ConfigError(
                        f"{what} names a shard {show(file['basename'])}, which is no shard's name; {AGAIN}"
                    )
                if not isinstance(file["hashes"][HASH], str) or not isinstance(file["bytes"], int):
                    raise TypeError("a hash or a size is none")
            columns = (info["format"], info["column_names"], info["column_encodings"])
            # Of Streaming's encodings some, such as pkl, run code when they are read.
            if columns != ("mds", list(expected), list(expected.values())):
                raise ConfigError(f"{what} holds {show(columns)}, not tokens of this manifest; {AGAIN}")
            if not isinstance(info["samples"], int) or info["samples"] < 0:
                raise TypeError("a number of samples is none")
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{what} is damaged ({type(error).__name__}: {error}); {AGAIN}") from None
    return shards


def copy_tokenizer(data: Data, manifest: Manifest, folder: Path, *, is_new: bool) -> None:
    """Put the tokenizer of prepared data into `folder`: a run keeps what its weights were trained with.

    One that `is_new` keeps nothing of another one, which a start before its first checkpoint may have left
    there; a later one has this one, and beside it what its user has put there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = manifest.tokenizer_files or FILES
    for name in {*hf_tokenizer.FILES}.difference(names) if is_new else ():
        (folder / name).unlink(missing_ok=True)
    for name in names:
        source, copy = f"{data.path}/tokenizer/{name}", folder / name
        if is_remote(data.path):
            with atomic_write(copy) as draft:
                download(source, draft)
        elif Path(source).exists() and not (copy.exists() and filecmp.cmp(source, copy, shallow=False)):
            with atomic_write(copy) as draft:
                shutil.copyfile(source, draft)
