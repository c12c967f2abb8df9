"""Samples by number: the order of samples as a pure function, and the shards they are read from."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lowbit_dist import folders
from lowbit_dist.config import ConfigError, Data
from lowbit_dist.data.library import import_streaming
from lowbit_dist.data.manifest import (
    HASH,
    Manifest,
    download,
    is_remote,
    manifest_bytes,
    parse_index,
    parse_manifest,
)
from lowbit_dist.errors import why_not_writable
from lowbit_dist.files import atomic_write, is_full, locked

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 16  # shards among which samples are shuffled
IGNORED = -100  # the label of a token that the loss leaves out, PyTorch's own
FETCHES = 4  # of a remote file: one, and three more when it arrives damaged
BACKOFF = 0.5  # s before the second fetch; doubled before each further one

Array = NDArray[Any]


class Order:
    """Where sample number `s` stands in the data: a pure function of (seed, s) and of the shards' sizes.

    Without a seed, the natural order.  Random keys are Philox's raw output, which NumPy keeps the same in all
    its versions, and are sorted stably.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int | None, window: int = WINDOW):
        self.sizes = np.array(shard_sizes, np.int64)
        self.n_samples = int(self.sizes.sum())
        self.seed, self.window = seed, window
        self._begins = self.sizes.cumsum() - self.sizes  # of each shard, in samples
        self._epoch: tuple[int, Array, Array] | None = None
        self._windows: dict[tuple[int, int], Array] = {}

    def indices(self, first_sample: int, size: int) -> Array:  # [size] int64
        """The indices of samples `first_sample`, ..., `first_sample + size - 1`."""
        runs = []
        while size > 0:
            epoch, position = divmod(first_sample, self.n_samples)
            _, borders = self.shards(epoch)
            number = int(np.searchsorted(borders, position, side="right")) - 1
            start = position - int(borders[number])
            run = self._window(epoch, number)[start : start + size]
            runs.append(run)
            first_sample += len(run)
            size -= len(run)
        return np.concatenate([np.empty(0, np.int64), *runs])

    def shards(self, epoch: int) -> tuple[Array, Array]:
        """The epoch's order of shards, and the position at which each of its windows begins."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = self._permutation(len(self.sizes), epoch, 0)
            ends = self.sizes[order].cumsum()
            borders = np.concatenate([[0], ends[self.window - 1 : -1 : self.window]])
            self._epoch = epoch, order, borders
        return self._epoch[1:]

    def _window(self, epoch: int, number: int) -> Array:
        if (epoch, number) not in self._windows:
            while len(self._windows) >= 2:  # two, for a batch across a border
                del self._windows[next(iter(self._windows))]
            shards = self.shards(epoch)[0][number * self.window : (number + 1) * self.window]
            samples = np.concatenate([self._begins[k] + np.arange(self.sizes[k]) for k in shards])
            self._windows[epoch, number] = samples[self._permutation(len(samples), epoch, number + 1)]
        return self._windows[epoch, number]

    def _permutation(self, n: int, epoch: int, stream: int) -> Array:
        if self.seed is None:
            return np.arange(n)
        key = np.array([self.seed, epoch << 32 | stream], np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


class DamagedData(RuntimeError):
    """A file of prepared data does not have the content that its hash promises, or cannot be read."""


def check_cache(data: Data) -> None:
    """ConfigError unless this machine's cache of shards can be written; leaves nothing behind."""
    folder = _cache(data)
    if why := why_not_writable(folder):
        raise _not_writable(folder, why)


def _cache(data: Data) -> Path:
    return folders.cache() / "data" if data.cache is None else data.cache.expanduser()


def _not_writable(folder: Path, why: str) -> ConfigError:
    return ConfigError(f"data.cache ({folder}) cannot be written: {why}; write a folder that can")


class Batches:
    """The samples of one split, by number; processes of one host may share folder and cache."""

    def __init__(self, data: Data, split: str, seed: int):
        content = manifest_bytes(data.path)
        manifest = parse_manifest(content, data.path)
        if data.seq_len != manifest.seq_len:
            raise ConfigError(
                f"data.seq_len ({data.seq_len}) must be {manifest.seq_len}, as {data.path} has it"
            )
        self.seq_len = manifest.seq_len
        self.has_prompts = manifest.prompt_field is not None
        # Named by the content: data that is prepared anew under the same path never meets old shards.
        folder = _cache(data) / hashlib.sha256(content).hexdigest()[:16] / split
        self._shards = _Shards(data.path, split, folder, manifest)
        self.order = Order(self._shards.sizes, seed if split == "train" else None)
        self.n_samples = self.order.n_samples
        self._ends = self.order.sizes.cumsum()
        self._ahead: tuple[int, int] | None = None
        self._one_at_a_time = threading.Lock()  # what reads ahead is another thread

    def micro_batch(self, first_sample: int, size: int) -> Tensor:  # [size, seq_len] int64
        """Samples `first_sample`, ..., `first_sample + size - 1`, counted over all epochs."""
        import torch

        samples = self._samples(first_sample, size)
        return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))

    def labels(self, first_sample: int, size: int) -> Tensor | None:  # [size, seq_len] int64
        """Of the same samples the tokens that the loss counts, and IGNORED in the place of those of prompts.
        None if it counts all.
        """
        import torch

        if not self.has_prompts:
            return None
        samples = self._samples(first_sample, size)
        labels = np.stack([sample["tokens"] for sample in samples]).astype(np.int64)
        labels[np.stack([sample["is_counted"] for sample in samples]) == 0] = IGNORED
        return torch.from_numpy(labels)

    def _samples(self, first_sample: int, size: int) -> list[dict[str, Array]]:
        if first_sample < 0 or size < 1:
            raise ValueError(
                f"a micro-batch needs first_sample >= 0 and size >= 1, not {first_sample}, {size}"
            )
        samples = []
        with self._one_at_a_time:
            self._read_ahead(first_sample)
            for index in self.order.indices(first_sample, size).tolist():
                shard = int(np.searchsorted(self._ends, index, side="right"))
                begin = int(self._ends[shard] - self.order.sizes[shard])
                samples.append(self._shards.sample(shard, index - begin))
        return samples

    def _read_ahead(self, first_sample: int) -> None:
        """In a window of remote shards, begin to fetch all of its shards and those of the next."""
        if not self._shards.is_remote:
            return
        epoch, position = divmod(first_sample, self.n_samples)
        order, borders = self.order.shards(epoch)
        number = int(np.searchsorted(borders, position, side="right")) - 1
        if self._ahead != (epoch, number):
            self._ahead = epoch, number
            begin = number * self.order.window
            self._shards.fetch_ahead(order[begin : begin + 2 * self.order.window].tolist())


class _Shards:
    """The shards of one split: fetched, checked, decompressed into `folder` once per machine, and read.

    Whatever is in `folder` was put there by a rename under a lock, and its hash is checked by every process
    before it reads the first sample; so neither a killed process nor a bad disk can do harm.
    """

    def __init__(self, path: str, split: str, folder: Path, manifest: Manifest):
        import_streaming()
        from streaming.base.format.mds.reader import MDSReader

        self.path, self.split, self.folder = path.rstrip("/") or path, split, folder
        self.is_remote = is_remote(path)
        place = f"{self.path}/{split}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(folder, error.strerror or str(error)) from None
        try:
            with locked(folder / "index.json.lock"):
                index = self._checked_read("index.json", manifest.splits[split].index_sha256, _sha256)
        except OSError as error:
            raise self._without_room(error) from error
        self._readers: list[MDSReader] = []
        for info in parse_index(index, place, split, manifest):
            try:
                reader = MDSReader.from_json(str(folder), None, info)
                reader.validate(allow_unsafe_types=False)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ConfigError(
                    f"{place}/index.json is damaged ({type(error).__name__}: {error}); prepare the data again"
                ) from None
            if reader.zip_data is None and not self.is_remote:
                reader.dirname = place  # nothing to decompress
            self._readers.append(reader)
        self.sizes = [reader.samples for reader in self._readers]
        self._ready: set[int] = set()
        self._queue: queue.SimpleQueue[int] | None = None

    def sample(self, shard: int, number: int) -> dict[str, Array]:  # [seq_len] of each column
        for _ in range(2):
            if shard not in self._ready:
                self._make_ready(shard)
                self._ready.add(shard)
            try:
                columns: dict[str, Array] = self._readers[shard].get_item(number)
                return columns
            except FileNotFoundError:
                self._ready.discard(shard)  # somebody has cleared the cache
        raise RuntimeError(f"{self._readers[shard].dirname} loses its files while they are read")

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        if self._queue is None:
            self._queue = queue.SimpleQueue()
            threading.Thread(target=self._fetch_queued, args=(self._queue,), daemon=True).start()
        for shard in shards:
            if shard not in self._ready:
                self._queue.put(shard)

    def _fetch_queued(self, wanted: queue.SimpleQueue[int]) -> None:
        while True:
            # What fails here fails again, and is reported, when the sample is asked for.
            with contextlib.suppress(Exception):
                self._make_ready(wanted.get())

    def _make_ready(self, shard: int) -> None:
        """The shard's uncompressed file is in its place, and is right."""
        reader = self._readers[shard]
        raw, zipped = reader.raw_data, reader.zip_data
        file = Path(reader.dirname, raw.basename)
        if zipped is None and not self.is_remote:
            self._checked_read(raw.basename, raw.hashes[HASH])
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with locked(file.with_name(f"{file.name}.lock")):
                if file.exists() and _hash(file.read_bytes()) == raw.hashes[HASH]:
                    return
                info = zipped or raw
                data = self._checked_read(info.basename, info.hashes[HASH])
                if zipped is not None:
                    import_streaming()
                    from streaming.base.compression import decompress

                    data = decompress(reader.compression, data)
                if _hash(data) != raw.hashes[HASH]:
                    raise DamagedData(
                        f"{file.name} of {self.path} is not what its index says; prepare it again"
                    )
                with atomic_write(file) as draft:
                    draft.write_bytes(data)
        except OSError as error:
            raise self._without_room(error) from error

    def _without_room(self, error: OSError) -> RuntimeError:
        return RuntimeError(
            f"the cache {self.folder} cannot be written: {error.strerror or error}; free space there, "
            "or write another folder as data.cache"
        )

    def _checked_read(self, name: str, expected: str, hashed: Callable[[bytes], str] | None = None) -> bytes:
        """The bytes of one file of the data, once their hash is right; a remote file is fetched again."""
        n_fetches = FETCHES if self.is_remote else 1
        for fetch in range(n_fetches):
            if fetch:
                time.sleep(BACKOFF * 2 ** (fetch - 1))
            try:
                data = self._read(name)
            except ConfigError:
                raise
            except Exception as error:  # every storage client has its own
                if isinstance(error, OSError) and is_full(error):
                    raise  # the cache is full; the data may be well
                wrong = f"cannot be read ({type(error).__name__}: {error})"
                continue
            if (actual := (hashed or _hash)(data)) == expected:
                return data
            wrong = f"is damaged (its hash is {actual}, and must be {expected})"
        times = f", after {n_fetches} fetches" if self.is_remote else ""
        raise DamagedData(f"{self.path}/{self.split}/{name} {wrong}{times}; copy or prepare the data again")

    def _read(self, name: str) -> bytes:
        """Alone, under the lock of `name`."""
        if not self.is_remote:
            return Path(self.path, self.split, name).read_bytes()
        draft = self.folder / f"{name}.fetched"
        try:
            download(f"{self.path}/{self.split}/{name}", draft)
            return draft.read_bytes()
        finally:
            draft.unlink(missing_ok=True)
            Path(f"{draft}.tmp").unlink(missing_ok=True)  # where Streaming downloads to


def _hash(data: bytes) -> str:
    import_streaming()
    from streaming.base.hashing import get_hash

    return get_hash(HASH, data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
