"""A Hugging Face model's `tokenizer.json`, with the members of `tokenizer.Tokenizer`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from textwrap import shorten

from lowbit_dist.errors import ConfigError

FILE = "tokenizer.json"


class FastTokenizer:
    """A tokenizer that transformers reads from a folder without running code of it; never changes.

    `bos_id` and `eos_id` are what its `tokenizer_config.json` says, or else the given ones, which are the
    model's; None where a model begins or ends no text with a mark of its own.
    """

    def __init__(self, folder: Path, *, bos_id: int | None = None, eos_id: int | None = None):
        from transformers import PreTrainedTokenizerFast

        try:
            self.sha256 = hashlib.sha256((folder / FILE).read_bytes()).hexdigest()
            self._fast = PreTrainedTokenizerFast.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the library's parser in Rust raises `Exception` itself
            raise ConfigError(
                f"{folder / FILE} cannot be read ({first_line(error)}); copy the model's tokenizer again"
            ) from None
        self.ids: Collection[int] = frozenset(self._fast.get_vocab().values())
        self.vocab_size: int = max(self.ids, default=-1) + 1  # there may be holes
        self.bos_id: int | None = bos_id if self._fast.bos_token_id is None else self._fast.bos_token_id
        self.eos_id: int | None = eos_id if self._fast.eos_token_id is None else self._fast.eos_token_id

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without the marks of its beginning and end."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens have none."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def first_line(error: Exception) -> str:
    """What went wrong in a library, whose messages may be pages or name every model that there is."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {shorten(lines[0], 160)}"
