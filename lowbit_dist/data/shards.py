"""Chunks of tokenised documents become two datasets of hashed shards, train and val."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit_dist.data.library import import_streaming
from lowbit_dist.data.manifest import HASH, SPLITS, shard_columns
from lowbit_dist.errors import ConfigError

SHARD_BYTES = 1 << 24  # uncompressed
HELD_TOKENS = 1 << 22  # tokens that are held in memory before the split of a corpus is decided

Array = NDArray[Any]


class Writer:
    """Chunks in, two MDS datasets out."""

    def __init__(
        self, folder: Path, vocab_size: int, seq_len: int, val_fraction: float, *, has_prompts: bool = False
    ):
        self.dtype: Any = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self.val_fraction = val_fraction
        self.limit = int(val_fraction * 2**64)  # documents whose place is below go to val
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self.has_prompts = has_prompts
        self.held: list[dict[str, Array]] | None = []
        self.n_held = self.n_empty = 0
        self.splits = {name: SplitWriter(folder / name, self) for name in SPLITS}
        self.n_tokens = 0

    def bytes_with(self, row: Mapping[str, Any]) -> float:
        """What all chunks up to this one need on disk when nothing of it can be compressed."""
        self.n_tokens += len(row["tokens"]) // 4
        return self.n_tokens * (np.dtype(self.dtype).itemsize + self.has_prompts + 8 / self.seq_len)

    def add(self, row: Mapping[str, Any]) -> None:
        chunk: dict[str, Array] = {
            "tokens": np.frombuffer(row["tokens"], np.int32),
            "lengths": np.frombuffer(row["lengths"], np.int32),
            "prompts": np.frombuffer(row["prompts"], np.int32),
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
            self._release(self._limit_of_few() or self.limit)

    def _release(self, limit: int) -> None:
        self.limit, held, self.held = limit, self.held or [], None
        for chunk in held:
            self._write(chunk)

    def _write(self, chunk: Mapping[str, Array]) -> None:
        is_val, lengths, prompts = chunk["places"] < self.limit, chunk["lengths"], chunk["prompts"]
        parts = np.stack([prompts, lengths - prompts], axis=1).ravel()
        is_counted = np.repeat(np.tile([False, True], len(lengths)), parts)
        for name, is_in in (("train", ~is_val), ("val", is_val)):
            here = np.repeat(is_in, lengths)
            n_documents, n_bytes = int(is_in.sum()), int(chunk["sizes"][is_in].sum())
            self.splits[name].add(chunk["tokens"][here], is_counted[here], n_documents, n_bytes)

    def _limit_of_few(self) -> int | None:
        """Of few documents, perhaps none or all have a place below the limit; then the lowest go to val.

        None if they do not fill a sample of each split.
        """
        chunks = self.held or []
        places = np.concatenate([np.empty(0, np.uint64), *(chunk["places"] for chunk in chunks)])
        lengths = np.concatenate([np.empty(0, np.int64), *(chunk["lengths"] for chunk in chunks)])
        n_val = int(lengths[places < self.limit].sum())
        if min(n_val, self.n_held - n_val) >= self.seq_len:
            return self.limit
        distinct, where = np.unique(places, return_inverse=True)
        tokens = np.bincount(where, lengths, len(distinct)).cumsum()  # in documents up to this place
        enough = max(self.seq_len, self.val_fraction * self.n_held)
        n = int(np.searchsorted(tokens, enough)) + 1
        if n >= len(distinct) or tokens[-1] - tokens[n - 1] < self.seq_len:
            return None
        return int(distinct[n])

    def finish(self) -> dict[str, Any]:
        """Close the shards; what the manifest says of them."""
        if self.held is not None:
            limit = self._limit_of_few()
            if limit is None:
                n_documents = sum(len(chunk["lengths"]) for chunk in self.held)
                raise too_few(n_documents, f"{self.n_held:,} tokens", self.seq_len)
            self._release(limit)
        splits = {name: writer.finish() for name, writer in self.splits.items()}
        for name, split in splits.items():
            if not split["samples"]:
                raise ConfigError(
                    f"--val-fraction ({self.val_fraction}) leaves {name} {split['dropped_tokens']:,} tokens, "
                    f"less than one sample of {self.seq_len}{' with a response' * self.has_prompts}; write a "
                    f"{'larger' if name == 'val' else 'smaller'} one"
                )
        train, val = (self.splits[name].counts for name in SPLITS)
        nats = np.log(train.sum() + self.vocab_size) - np.log(train + 1.0)
        return {
            "dtype": np.dtype(self.dtype).name,
            "splits": splits,
            "unigram_entropy": float((nats * val).sum() / val.sum()),
            "largest_token": int(np.flatnonzero(train + val)[-1]),
            "empty_documents": self.n_empty,
        }


def too_few(n_documents: int, size: str, seq_len: int) -> ConfigError:
    return ConfigError(
        f"--input has {n_documents:,} documents with {size}, too few for a training and a validation sample "
        f"of --seq-len {seq_len} tokens from different documents; give more text"
    )


class SplitWriter:
    def __init__(self, folder: Path, settings: Writer):
        import_streaming()
        from streaming import MDSWriter

        self.folder = folder
        self.seq_len, self.dtype, self.has_prompts = settings.seq_len, settings.dtype, settings.has_prompts
        self.mds = MDSWriter(
            columns=shard_columns(np.dtype(self.dtype).name, self.seq_len, has_prompts=self.has_prompts),
            out=str(folder),
            compression="zstd",
            hashes=["sha256", HASH],
            size_limit=max(SHARD_BYTES, 1 << 12 | 8 * self.seq_len),
        )
        self.rest, self.rest_counted = np.empty(0, np.int32), np.empty(0, bool)
        self.counts = np.zeros(settings.vocab_size, np.int64)  # of each token that is counted in the samples
        self.samples = self.dropped = self.counted = self.documents = self.bytes = 0

    def add(self, tokens: Array, is_counted: Array, n_documents: int, n_bytes: int) -> None:
        self.counted += int(is_counted.sum())
        self.documents += n_documents
        self.bytes += n_bytes
        tokens = np.concatenate([self.rest, tokens])
        is_counted = np.concatenate([self.rest_counted, is_counted])
        end = len(tokens) // self.seq_len * self.seq_len
        self.rest, self.rest_counted = tokens[end:], is_counted[end:]
        tokens, is_counted = (part[:end].reshape(-1, self.seq_len) for part in (tokens, is_counted))
        # A sample of a prompt's middle alone is left out, so that every batch has something to learn: a
        # sample's first token is predicted from nothing.
        teaches = is_counted[:, 1:].any(axis=1)
        tokens, is_counted = tokens[teaches], is_counted[teaches]
        for sample, mask in zip(tokens.astype(self.dtype), is_counted.astype(np.uint8), strict=True):
            self.mds.write({"tokens": sample, "is_counted": mask})  # of which it takes its columns
        self.counts += np.bincount(tokens[is_counted], minlength=len(self.counts))
        self.samples += len(tokens)
        self.dropped += end - tokens.size

    def finish(self) -> dict[str, Any]:
        self.mds.finish()
        return {
            "samples": self.samples,
            "tokens": self.samples * self.seq_len,
            "dropped_tokens": self.dropped + len(self.rest),
            "documents": self.documents,
            "bytes": self.bytes,
            **({"counted_tokens": self.counted} if self.has_prompts else {}),
            "index_sha256": hashlib.sha256((self.folder / "index.json").read_bytes()).hexdigest(),
        }
