"""Documents become chunks of tokens, in parallel and in the order of the corpus."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowbit_dist import documents, folders, network, tokenizer
from lowbit_dist.documents import text
from lowbit_dist.errors import ConfigError
from lowbit_dist.machine import processors
from lowbit_dist.tokenizer import TextTokenizer

TEXT_CHUNK = 1 << 22  # bytes of text that a task gives back at once

Array = NDArray[Any]


def check_ray() -> None:
    """ConfigError unless there is a Ray to join, or a folder for one that is started here."""
    if address := network.ray_address():
        network.check_ray_head(address)
    else:
        folders.for_sessions(os.getpid())


def tokenised(
    ranges: Sequence[documents.FileRange], chosen: TextTokenizer, seed: int, workers: int | None
) -> Iterator[dict[str, Any]]:
    """Chunks of tokenised documents, in the order of the parts: what `_tokenise` yields."""
    # Read when Ray is imported: its services then listen on 127.0.0.1 alone.
    if not (address := network.ray_address()):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray
    import ray.data

    session = contextlib.ExitStack()
    if not ray.is_initialized():
        session.enter_context(_started_ray(address, workers))
    context = ray.data.DataContext.get_current()
    before = (context.enable_progress_bars, context.print_on_execution_start)
    loggers = {name: logging.getLogger(name).level for name in ("ray.data", "ray.data.dataset")}
    try:
        context.enable_progress_bars = context.print_on_execution_start = False
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        bundles = _bundles(ranges)
        dataset = ray.data.from_items(
            [{"parts": bundle} for bundle in bundles], override_num_blocks=len(bundles)
        )
        dataset.context.execution_options.preserve_order = True
        tokenise: Any = _tokenise  # Ray's types know no further arguments
        chunks: Any = dataset.map_batches(
            tokenise,
            batch_size=1,
            fn_kwargs={"files": ray.put(dict(chosen.files)), "sha256": chosen.sha256, "seed": seed},
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
        session.close()


@contextlib.contextmanager
def _started_ray(address: str | None, workers: int | None) -> Iterator[None]:
    """Ray on this machine, or the cluster at an address."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with contextlib.ExitStack() as stack:
        if address:
            stack.callback(ray.shutdown)
            ray.init(**quiet)
        else:
            folder = stack.enter_context(folders.session_folder(os.getpid()))
            stack.callback(ray.shutdown)
            ray.init(
                address="local",
                num_cpus=workers or processors(),
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                object_store_memory=1 << 29,
                _temp_dir=str(folder),
                **quiet,
            )
        yield


def _bundles(ranges: Sequence[documents.FileRange]) -> list[str]:
    """Consecutive parts, some MB together, as JSON; at most some ten thousand tasks."""
    enough = max(text.PART, sum(part.size for part in ranges) // 10_000)
    bundles: list[list[documents.FileRange]] = []
    size = enough
    for part in ranges:
        if size >= enough:
            bundles.append([])
            size = 0
        bundles[-1].append(part)
        size += part.size
    return [json.dumps(bundle) for bundle in bundles]


def place_of(document: bytes, seed: int) -> bytes:
    """A hash of the text, uint64 little-endian, that says into which split it goes."""
    return hashlib.blake2b(document, digest_size=8, key=seed.to_bytes(8, "little")).digest()


_loaded: dict[str, TextTokenizer] = {}  # by hash; a Ray worker process serves many tasks


def _tokenise(batch: dict[str, Array], files: Any, sha256: str, seed: int) -> Iterator[dict[str, Array]]:
    """The documents of one bundle of parts, as rows of about TEXT_CHUNK bytes of text.

    `tokens` int32, every document between its marks; of every document its `lengths` int32 in tokens, and
    of them the `prompts` int32, which are those of its prompt and the mark before that; the `sizes` int64 in
    bytes of its text behind the prompt, and its `places` uint64; the last row has the rows that were skipped.
    """
    import ray

    if sha256 not in _loaded:
        _loaded[sha256] = tokenizer.of_files(ray.get(files), "tokenizer", sha256=sha256)
    chosen = _loaded[sha256]
    marks = tokenizer.marks(chosen)
    parts = [documents.FileRange.of_json(part) for part in json.loads(batch["parts"][0])]
    left = sum(part.size for part in parts)  # of the input, in bytes, for the progress bar
    chunk, tally = _Chunk(), documents.Tally()
    error = ""
    try:
        for document in documents.read_prompted(parts, tally):
            if not document.response:
                chunk.n_empty += 1
                continue
            # Apart, as they are when the model is used: the prompt is there before there is a response.
            prompt = chosen.encode(document.prompt) if document.prompt else []
            tokens = marks.around(prompt + chosen.encode(document.response))
            n_prompt = 0 if document.prompt is None else (marks.begin is not None) + len(prompt)
            chunk.add(document, tokens, n_prompt, seed)
            if chunk.n_bytes >= TEXT_CHUNK:
                size = min(left, chunk.n_bytes)
                left -= size
                yield chunk.row(size)
                chunk = _Chunk()
    except ConfigError as mistake:
        # Raised in a task, it would reach the user inside Ray's own report of a failed task.
        error = str(mistake)
    yield chunk.row(left, error, tally)


class _Chunk:
    def __init__(self) -> None:
        self.tokens: list[Array] = []
        self.prompts: list[int] = []
        self.sizes: list[int] = []
        self.places: list[bytes] = []
        self.n_empty = self.n_bytes = 0

    def add(self, document: documents.Document, tokens: list[int], n_prompt: int, seed: int) -> None:
        data = document.text.encode()
        self.tokens.append(np.array(tokens, np.int32))
        self.prompts.append(n_prompt)
        self.sizes.append(len(data) - len((document.prompt or "").encode()))
        self.places.append(place_of(data, seed))
        self.n_bytes += len(data)

    def row(self, size: int, error: str = "", tally: documents.Tally | None = None) -> dict[str, Array]:
        lengths = np.array([len(tokens) for tokens in self.tokens], np.int32)
        columns = {
            "tokens": np.concatenate([np.empty(0, np.int32), *self.tokens]).tobytes(),
            "lengths": lengths.tobytes(),
            "prompts": np.array(self.prompts, np.int32).tobytes(),
            "sizes": np.array(self.sizes, np.int64).tobytes(),
            "places": b"".join(self.places),
        }
        row: dict[str, Array] = {name: np.array([data], dtype=object) for name, data in columns.items()}
        return {
            **row,
            "n_empty": np.array([self.n_empty]),
            "n_skipped": np.array([tally.skipped_rows if tally else 0]),
            "first_skipped": np.array([json.dumps(tally and tally.first)], dtype=object),
            "size": np.array([size]),
            "error": np.array([error], dtype=object),
        }
