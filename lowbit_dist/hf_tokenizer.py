"""A Hugging Face model's own tokenizer, `tokenizer.json`, with the members of `tokenizer.TextTokenizer`.

Its ids are those of transformers' `AutoTokenizer` without what that puts around a text.  So a special token
that is written in a text is that token.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit_dist.errors import ConfigError, first_line

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
# What ids may depend on, and how a conversation is written; nothing else of a folder is looked at.
FILES = (
    FILE, CONFIG, "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "chat_template.jinja"
)  # fmt: skip


class FastTokenizer:
    """A tokenizer that transformers reads from its files without running code of theirs; never changes.

    `files`: the content of each of FILES that is there, by name.  `bos_id` and `eos_id` are what they say,
    None where they say that there is none; where they say nothing, the given ones, which are the model's.
    """

    def __init__(
        self, files: Mapping[str, bytes], name: str, *, bos_id: int | None = None, eos_id: int | None = None
    ):
        self.files: Mapping[str, bytes] = dict(files)
        self.sha256 = _identity(files)
        config = config_of(files, name)
        try:
            self._fast = _loaded(files, config)
        except Exception as error:  # the library's parser in Rust raises `Exception` itself
            raise ConfigError(
                f"{name}: its {FILE} cannot be read ({first_line(error)}); copy the model's tokenizer again"
            ) from None
        self.ids: Collection[int] = frozenset(self._fast.get_vocab().values())
        self.vocab_size: int = max(self.ids, default=-1) + 1  # there may be holes
        self.n_pieces: int = self._fast.vocab_size
        bos, eos = self._fast.bos_token_id, self._fast.eos_token_id
        self.bos_id: int | None = bos_id if bos is None and "bos_token" not in config else bos
        self.eos_id: int | None = eos_id if eos is None and "eos_token" not in config else eos

    @property
    def description(self) -> dict[str, Any]:
        """All that it does, in the words of `tokenizer.json`."""
        content: dict[str, Any] = json.loads(self._fast.backend_tokenizer.to_str())
        return content

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without the marks of its beginning and end."""
        ids: list[int] = self._fast.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens have none."""
        text: str = self._fast.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def config_of(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """What `tokenizer_config.json` says; nothing where it is missing."""
    try:
        content = json.loads(files.get(CONFIG, b"{}"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{name}: its {CONFIG} is damaged; copy the model's tokenizer again")
    return content


def _identity(files: Mapping[str, bytes]) -> str:
    """SHA-256 by which a tokenizer is known: two of one `tokenizer.json` may end a text differently."""
    sha = hashlib.sha256()
    for name in FILES:
        if name in files:
            sha.update(f"{name} {len(files[name])}\n".encode() + files[name])
    return sha.hexdigest()


def _loaded(files: Mapping[str, bytes], config: Mapping[str, Any]) -> Any:  # PreTrainedTokenizerFast
    """By the class that `AutoTokenizer` would take, which may change how `tokenizer.json` splits a text; by
    the base class where that one wants files that are not there.
    """
    from transformers import PreTrainedTokenizerFast

    # Paths that are written there lead to files of another machine.
    settings = {name: value for name, value in config.items() if not name.endswith("_file")}
    with tempfile.TemporaryDirectory(prefix="lowbit-") as folder:
        for name, content in {**files, CONFIG: json.dumps(settings).encode()}.items():
            Path(folder, name).write_bytes(content)
        own = _own_class(settings.get("tokenizer_class"))
        if own is not None:
            try:
                loaded = own.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception:  # whatever the class of an older format raises
                loaded = None
            if isinstance(loaded, PreTrainedTokenizerFast):  # the library may return False
                return loaded
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _own_class(name: object) -> Any:
    """transformers' fast tokenizer of this name, or of the slow one of this name; None if it has none."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    for candidate in (f"{name}Fast", name) if isinstance(name, str) else ():
        own = tokenizer_class_from_name(candidate)
        if isinstance(own, type) and issubclass(own, PreTrainedTokenizerFast):
            return own
    return None
