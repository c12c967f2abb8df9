"""What a model is worth: its loss, perplexity and bits per byte; of a trained one on any text, of one that
trains on its validation split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowbit_dist import attention, data, documents
from lowbit_dist.config import ConfigError, Data, RunConfig
from lowbit_dist.data.manifest import MANIFEST, check_files, is_remote
from lowbit_dist.grid import GRIDS, Grid
from lowbit_dist.inference import multiplies_integers
from lowbit_dist.loss import chunk_loss
from lowbit_dist.methods.method import Scale
from lowbit_dist.model import DTYPES
from lowbit_dist.tokenizer import marks

if TYPE_CHECKING:
    from lowbit_dist.trained import Trained
    from lowbit_dist.zero import Engine

T = TypeVar("T")
PRODUCTS = ("floats", "integers")  # of linear layers
Labelled = list[tuple[Tensor, Tensor]]  # tokens, and labels of them, each [samples, seq_len] int64


def evaluate(
    trained: Trained,
    path: str,
    *,
    forward: str | None = None,
    scale: Scale | None = None,
    integer: bool = False,
    n_samples: int | None = None,
    reading: documents.Reading | None = None,
    tally: documents.Tally | None = None,
) -> dict[str, Any]:
    """Mean loss of `trained` on a prepared folder's validation split, or on a text file or folder.

    Of a prepared folder as many samples as `trained.samples` says, in its micro-batches, so that the loss of
    a run is its training loop's; of text all of it, cut into samples as long as it says, of which the last
    one may be shorter.  `n_samples` is another number of samples.  `forward` names a grid to which the
    weights are rounded first, with scales as `Method.through` says; one that they are on already changes
    nothing.  For `integer` see `loaded`.  `reading` says how documents are found in text; `tally` counts
    what of it is not read.
    """
    if forward is not None and forward not in GRIDS:
        raise ConfigError(f"--forward ({forward}) must be one of {', '.join(GRIDS)}; write one of them")
    grid = None if forward is None else GRIDS[forward]
    rounds = grid is not None and not trained.is_on(grid)
    if scale is not None and not rounds:
        rule = (
            "the grid that it is of; write --forward ternary, or leave it out"
            if forward is None
            else f"a grid to which weights are rounded, and those of {trained.path} are on {forward}; leave "
            "it out"
        )
        raise ConfigError(f"--forward-scale ({scale}) must go with --forward, {rule}")
    if is_remote(path) or (Path(path) / MANIFEST).is_file():
        if reading not in (None, documents.Reading()):
            raise ConfigError(
                f"--data ({path}) is prepared data, and --field, --separator and --on-bad-row are for text; "
                "leave them out"
            )
        samples, bytes_per_token = _prepared(trained, path, n_samples)
    else:
        tally = documents.Tally() if tally is None else tally
        with tally.naming_skipped():
            samples, bytes_per_token = _text(trained, path, _texts(path, reading, tally), n_samples)
    batches = _batches(trained, samples)
    trained.check_tokens((int(tokens.max()) for tokens, _ in batches), f"--data ({path})")
    network = loaded(trained, integer=integer, forward=grid, scale=scale)
    mean = _mean_loss(trained, network, batches)
    own, planes = trained.method.forward_grid, f", {n} planes" if (n := trained.planes) > 1 else ""
    return {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "data": path,
        "forward": forward or (trained.method.name if own is None else own.name) + planes,
        "forward_scale": (scale or "rms") if rounds else None,
        "products": PRODUCTS[integer],
        "loss": mean,
        **quality(mean, bytes_per_token),
        "samples": sum(len(labels) for _, labels in batches),
        "tokens": sum(int((labels != data.IGNORED).sum()) for _, labels in batches),
    }


def text_loss(trained: Trained, network: nn.Module, text: str) -> tuple[float, int]:
    """The mean loss of a text, as `evaluate` measures a file with it alone, and how many tokens it has, marks
    included; (0, 0) of no text.
    """
    if not text:
        return 0.0, 0
    samples, _ = _text(trained, "a text", iter([text]), None)
    batches = _batches(trained, samples)
    trained.check_tokens((int(tokens.max()) for tokens, _ in batches), "a text")
    return _mean_loss(trained, network, batches), sum(tokens.numel() for tokens, _ in batches)


def _batches(trained: Trained, samples: Labelled) -> Labelled:
    size = trained.samples.micro_batch
    return [
        batch
        for tokens, labels in samples
        for batch in zip(tokens.split(size), labels.split(size), strict=True)
    ]


def _mean_loss(trained: Trained, network: nn.Module, batches: Labelled) -> float:
    device = next(network.parameters()).device
    nats = 0.0
    with torch.inference_mode():
        for batch in batches:
            tokens, labels = (part.to(device) for part in batch)
            with attention.causal(network):
                loss = network(input_ids=tokens, labels=labels, **_mask(trained, tokens)).loss
            nats += n_predicted(labels) * loss.double().item()
    return nats / sum(n_predicted(labels) for _, labels in batches)


def loaded(
    trained: Trained, *, integer: bool = False, forward: Grid | None = None, scale: Scale | None = None
) -> nn.Module:
    """The model as it is measured, with the training loop's own products.

    `integer`: layers that round their inputs to 8 bits multiply integers (inference.py), whose sums round
    otherwise; ConfigError if none does.
    """
    network = trained.network(integer=integer, forward=forward, scale=scale)
    chunk_loss(network)
    if integer and not multiplies_integers(network):
        raise ConfigError(
            f"--integer needs layers that round their inputs to 8 bits, and a CPU with a C compiler; "
            f"{trained.path} has no such layer here; leave it out"
        )
    return network


def validation_loss(
    engine: Engine,
    config: RunConfig,
    manifest: data.Manifest,
    *,
    heartbeat: Callable[[], None] = lambda: None,
) -> float:
    """Mean negative log-likelihood (nats per token that counts) of the first `train.eval_samples` samples of
    the val split, while a model trains; on every worker at once.
    """
    batches = data.Batches(config.data, "val", config.run.seed)
    n, size = n_validation_samples(config, manifest), config.train.micro_batch
    starts = range(0, n, size)
    # Of each batch the sum over its tokens that count, and their number: the last one may have fewer samples.
    sums = torch.zeros((2, len(starts)), dtype=torch.float64, device=engine.device)
    for first in range(0, len(starts), engine.world):
        # Every worker takes part in every gather; one that has no batch left repeats one and drops the
        # result.
        mine = first + engine.rank
        start = starts[min(mine, len(starts) - 1)]
        place = start, min(size, n - start)
        tokens, labels = batches.micro_batch(*place), batches.labels(*place)
        loss = engine.forward(tokens.to(engine.device), labels)
        if mine < len(starts):
            number = n_predicted(tokens if labels is None else labels)
            sums[0, mine], sums[1, mine] = loss.double() * number, number
        heartbeat()
    dist.all_reduce(sums)
    nats, number = sums.sum(dim=1).tolist()
    return nats / number


def n_validation_samples(config: RunConfig, manifest: data.Manifest) -> int:
    """How many samples the validation loss of a run is the mean of: all of the split, or the first."""
    return min(config.train.eval_samples, manifest.splits["val"].samples)


def quality(loss: float, bytes_per_token: float) -> dict[str, float]:
    """What a loss in nats per token means."""
    return {
        "perplexity": math.exp(min(loss, 700.0)),  # beyond is no float64
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
    }


def n_predicted(labels: Tensor) -> int:  # [samples, seq_len]
    """How many tokens a loss is the mean of: the first of a sample is predicted from nothing."""
    return int((labels[:, 1:] != data.IGNORED).sum())


def _mask(trained: Trained, tokens: Tensor) -> dict[str, Tensor]:
    """What keeps attention within documents, of a model that was trained so."""
    if not trained.samples.document_mask:
        return {}
    return attention.within_documents(tokens, marks(trained.tokenizer), DTYPES[trained.precision])


def _prepared(trained: Trained, path: str, n_samples: int | None) -> tuple[Labelled, float]:
    """Samples, and bytes per token that counts."""
    manifest = _of_data(lambda: data.read_manifest(path))
    if manifest.tokenizer_sha256 != trained.tokenizer.sha256:
        raise ConfigError(
            f"--data ({path}) was prepared with another tokenizer than the one of {trained.path}; "
            "prepare it with the tokenizer in the run's folder, or give plain text"
        )
    _check_length(trained, path, manifest.seq_len)

    def read() -> tuple[Tensor, Tensor]:
        if not is_remote(path):
            check_files(Path(path), "val", manifest)
        source = Data(path=path, seq_len=manifest.seq_len, cache=trained.samples.cache)
        batches = data.Batches(source, "val", seed=0)  # the order of the validation split needs none
        place = 0, min(n_samples or trained.samples.number, batches.n_samples)
        tokens, labels = batches.micro_batch(*place), batches.labels(*place)
        return tokens, tokens if labels is None else labels

    return [_of_data(read)], manifest.splits["val"].bytes_per_token


def _check_length(trained: Trained, path: str, seq_len: int) -> None:
    longest = trained.max_positions
    if longest is not None and seq_len > longest:
        raise ConfigError(
            f"--data ({path}) has samples of {seq_len:,} tokens, more than the model's max_seq_len "
            f"{longest:,}; prepare it with --seq-len {trained.samples.seq_len}"
        )


def _of_data(read: Callable[[], T]) -> T:
    """What `read` gives; its mistakes are those of --data."""
    try:
        return read()
    except (ConfigError, data.DamagedData) as error:
        raise ConfigError(str(error).replace("data.path", "--data")) from None


def _text(trained: Trained, path: str, texts: Iterator[str], n_samples: int | None) -> tuple[Labelled, float]:
    """Documents between the tokenizer's marks, in one row, cut; what is left at the end is a short sample."""
    tokenizer = trained.tokenizer
    around, length = marks(tokenizer).around, trained.samples.seq_len
    ids: list[int] = []
    n_bytes = 0
    for text in filter(None, texts):
        ids += around(tokenizer.encode(text))
        n_bytes += len(text.encode())
        if n_samples is not None and len(ids) >= n_samples * length:
            break
    if len(ids) < 2:  # the first token is predicted from nothing
        raise ConfigError(f"--data ({path}) holds no text; write the path of a file that does")
    bytes_per_token = n_bytes / len(ids)
    if n_samples is not None:
        ids = ids[: n_samples * length]
    n, rest = divmod(len(ids), length)
    whole, last = torch.tensor(ids).split([n * length, rest])
    # A last token alone is predicted from nothing.
    samples = [whole.view(n, length), *([last.view(1, rest)] if rest > 1 else [])]
    return [(part, part) for part in samples if len(part)], bytes_per_token


def _texts(path: str, reading: documents.Reading | None, tally: documents.Tally) -> Iterator[str]:
    try:
        yield from documents.read(documents.parts([path], reading, tally), tally)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--input", "--data")) from None
