"""What a trained model is worth, in one process: its loss, perplexity and bits per byte on any text."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowbit_dist import data, documents, model, tokenizer
from lowbit_dist.checkpoint import Checkpoint
from lowbit_dist.config import ConfigError, Data
from lowbit_dist.data.manifest import MANIFEST, check_files, is_remote
from lowbit_dist.grid import GRIDS
from lowbit_dist.linear import Linear
from lowbit_dist.methods import DQT, Method
from lowbit_dist.packed import PackedTensor

T = TypeVar("T")


def evaluate(
    checkpoint: Checkpoint, path: str, *, forward: str | None = None, n_samples: int | None = None
) -> dict[str, Any]:
    """Mean loss of `checkpoint` on a prepared folder's validation split, or on a text file or folder.

    Of a prepared folder the run's own `train.eval_samples` samples in the run's micro-batches, so that the
    loss is the training loop's; of text all of it, cut into samples as long as the run's.  `n_samples` says
    another number of samples.  `forward` names a grid through which the weights are pushed first.
    """
    config = checkpoint.config
    if forward is not None and forward not in GRIDS:
        raise ConfigError(f"--forward ({forward}) must be one of {', '.join(GRIDS)}; write one of them")
    words = run_tokenizer(checkpoint)
    if is_remote(path) or (Path(path) / MANIFEST).is_file():
        samples, bytes_per_token = _prepared(checkpoint, path, n_samples)
    else:
        samples, bytes_per_token = _text(path, words, config.data.seq_len, n_samples)
    network = load(checkpoint, forward=forward)
    device = next(network.parameters()).device
    size = min(config.train.micro_batch, len(samples))
    losses = []
    with torch.inference_mode():
        for batch in samples[: len(samples) // size * size].split(size):
            tokens = batch.to(device)
            losses.append(network(input_ids=tokens, labels=tokens).loss.double().item())
    loss = sum(losses) / len(losses)
    return {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "data": path,
        "forward": forward or getattr(config.method, "grid", config.method.name),
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "samples": len(losses) * size,
        "tokens": len(losses) * size * samples.shape[1],
    }


def run_tokenizer(checkpoint: Checkpoint) -> tokenizer.Tokenizer:
    """The tokenizer of the checkpoint's model: the copy in its run's folder, or its data's."""
    expected = checkpoint.manifest["tokenizer_sha256"]
    copied = checkpoint.path.resolve().parent.parent / "tokenizer"
    path = copied if copied.is_dir() else Path(checkpoint.config.data.path) / "tokenizer"
    found = tokenizer.load(path)
    if found.sha256 != expected:
        raise ConfigError(
            f"{path} is not the tokenizer of {checkpoint.path}: its hash is {found.sha256[:12]}, "
            f"the run's {expected[:12]}; put the run's own tokenizer there"
        )
    return found


def load(checkpoint: Checkpoint, *, forward: str | None = None) -> nn.Module:
    """The model with all of its weights decoded to the run's compute precision, ready for inference."""
    config = checkpoint.config
    method = config.method
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    network = model.build(config.model, checkpoint.manifest["vocab_size"], method, dtype)
    pushed = _pushed(network, method) if forward is not None else set()
    weights = {}
    for name in checkpoint.names:
        try:
            tensor = checkpoint.tensor(name)
        except Exception as error:  # of a shard that was made to fit its hash; parsers raise many kinds
            raise ConfigError(
                f"{checkpoint.path}: {name} cannot be read ({type(error).__name__}: {error}); name another "
                "checkpoint of the run"
            ) from None
        if name in pushed and forward is not None:
            whole = tensor.dequantize(torch.float32) if isinstance(tensor, PackedTensor) else tensor
            tensor = _through(forward, method).quantize(whole)
        weights[name] = tensor.dequantize(dtype) if isinstance(tensor, PackedTensor) else tensor.to(dtype)
    lacking = {name for name, _ in network.named_parameters()} ^ set(weights)
    if lacking:
        raise ConfigError(
            f"{checkpoint.path} does not fit its own configuration: {', '.join(sorted(lacking))}; "
            "name another checkpoint"
        )
    network.load_state_dict(weights, strict=False, assign=True)
    if getattr(network.config, "tie_word_embeddings", False):
        network.tie_weights()  # type: ignore[operator]
    if forward is not None:
        for module in network.modules():
            if isinstance(module, Linear):
                module.transform = None  # the weights have been through a grid already
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return network.to(device).eval().requires_grad_(False)


def _pushed(network: nn.Module, method: Method) -> set[str]:
    """What `--forward` quantises: the low-bit weights, or of another method the linears but the head."""
    return set(model.low_bit_names(network, method if isinstance(method, DQT) else DQT()))


def _through(grid: str, method: Method) -> DQT:
    """Rounding to the nearest level of `grid`, with the scale rule that the method uses for its own."""
    return DQT.model_validate({**(method.model_dump() if isinstance(method, DQT) else {}), "grid": grid})


def _prepared(
    checkpoint: Checkpoint, path: str, n_samples: int | None
) -> tuple[Tensor, float]:  # [samples, seq_len] int64, bytes per token
    manifest = _of_data(lambda: data.read_manifest(path))
    if manifest.tokenizer_sha256 != checkpoint.manifest["tokenizer_sha256"]:
        raise ConfigError(
            f"--data ({path}) was prepared with another tokenizer than the one of {checkpoint.path}; "
            "prepare it with the tokenizer in the run's folder, or give plain text"
        )
    config = checkpoint.config
    if manifest.seq_len > config.model.max_seq_len:
        raise ConfigError(
            f"--data ({path}) has samples of {manifest.seq_len:,} tokens, more than the model's max_seq_len "
            f"{config.model.max_seq_len:,}; prepare it with --seq-len {config.data.seq_len}"
        )

    def read() -> Tensor:
        if not is_remote(path):
            check_files(Path(path), "val", manifest)
        batches = data.Batches(
            Data(path=path, seq_len=manifest.seq_len, cache=config.data.cache), "val", config.run.seed
        )
        return batches.micro_batch(0, min(n_samples or config.train.eval_samples, batches.n_samples))

    return _of_data(read), manifest.splits["val"].bytes_per_token


def _of_data(read: Callable[[], T]) -> T:
    """What `read` gives; its mistakes are those of --data."""
    try:
        return read()
    except (ConfigError, data.DamagedData) as error:
        raise ConfigError(str(error).replace("data.path", "--data")) from None


def _text(
    path: str, words: tokenizer.Tokenizer, seq_len: int, n_samples: int | None
) -> tuple[Tensor, float]:  # [samples, seq_len] int64, bytes per token
    """Documents between `<s>` and `</s>`, one after the other, cut; what is left at the end is dropped."""
    ids: list[int] = []
    n_bytes = 0
    for text in filter(None, _documents(path)):
        ids += [words.bos_id, *words.encode(text), words.eos_id]
        n_bytes += len(text.encode())
    if not ids:
        raise ConfigError(f"--data ({path}) holds no text; write the path of a file that does")
    # A text shorter than a sample is a short sample.
    length = min(seq_len, len(ids))
    n = len(ids) // length
    if n_samples is not None:
        n = min(n, n_samples)
    return torch.tensor(ids[: n * length]).view(n, length), n_bytes / len(ids)


def _documents(path: str) -> Iterator[str]:
    try:
        yield from documents.read(documents.parts([path]))
    except ConfigError as error:
        raise ConfigError(str(error).replace("--input", "--data")) from None
