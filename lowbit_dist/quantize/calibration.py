"""What a model is calibrated on: samples of prepared data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lowbit_dist import data
from lowbit_dist.config import Data
from lowbit_dist.data.manifest import check_files, is_remote
from lowbit_dist.errors import ConfigError
from lowbit_dist.trained import Trained

SAMPLES = 512  # QuantLM's, of 2,048 tokens
TOKENS_AT_ONCE = 2048  # of a micro-batch, at most; one sample may be longer


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """So many samples of the training split of prepared data, in the order of a seed."""

    path: str
    samples: int | None = None  # None: 512, or all that there are
    seed: int = 0

    def read(self, source: Trained, widest: int) -> Tensor:  # [samples, seq_len] int64
        """ConfigError unless it is data of the model's tokenizer, of at least `widest` tokens."""
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(
                f"--seed ({self.seed}) must be at least 0 and less than 2^63; write 0, for example"
            )
        try:
            manifest = data.read_manifest(self.path)
            if manifest.tokenizer_sha256 != source.tokenizer.sha256:
                raise ConfigError(
                    f"--data ({self.path}) was prepared with another tokenizer than the one of "
                    f"{source.path}; prepare it with the model's own"
                )
            longest, length = source.max_positions, manifest.seq_len
            if longest is not None and length > longest:
                raise ConfigError(
                    f"--data ({self.path}) has samples of {length:,} tokens, more than the {longest:,} "
                    f"positions of the model; prepare it with --seq-len {longest}"
                )
            there = manifest.splits["train"].samples
            number = min(SAMPLES, there) if self.samples is None else self.samples
            if not 1 <= number <= there:
                raise ConfigError(
                    f"--samples ({number:,}) must be from 1 to {there:,}, the training samples of "
                    f"{self.path}; write {there}, or prepare more data"
                )
            if number * length < widest:
                more = f"--samples {-(-widest // length)}" if there * length >= widest else "more data"
                raise ConfigError(
                    f"{'--samples' if self.samples else '--data'} gives {number * length:,} calibration "
                    f"tokens, fewer than the {widest:,} inputs of the model's widest layer, so that nothing "
                    f"could be said of some of them; give {more}"
                )
            if not is_remote(self.path):
                check_files(Path(self.path), "train", manifest)
            read = Data(path=self.path, seq_len=length, cache=source.samples.cache)
            tokens = data.Batches(read, "train", self.seed).micro_batch(0, number)
        except (ConfigError, data.DamagedData) as error:
            raise ConfigError(str(error).replace("data.path", "--data")) from None
        source.check_tokens([int(tokens.max())], f"--data ({self.path})")
        return tokens


def micro_batches(tokens: Tensor) -> tuple[Tensor, ...]:
    """Of one size, the largest that divides the samples and is no more than `TOKENS_AT_ONCE`."""
    number, length = tokens.shape
    most = max(1, TOKENS_AT_ONCE // length)
    return tokens.split(next(size for size in range(most, 0, -1) if number % size == 0))
