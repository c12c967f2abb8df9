"""The tokenizer: sentencepiece BPE with byte fallback, LLaMA's conventions, text that comes back unchanged.

Ids: 0 `<unk>`, 1 `<s>` (begins a document), 2 `</s>` (ends one), 3 to 258 the bytes, then the pieces.
Nothing is normalised, no space is put in front, runs of spaces and line ends are kept, digits stand alone.
So `decode(encode(text)) == text` for every text without U+2581, by which sentencepiece writes a space.

Beside `tokenizer.model` stand `tokenizer.json` and `tokenizer_config.json`, with which Hugging Face's
`LlamaTokenizerFast` gives the same ids.  `split_special_tokens` there makes a `<s>` written in a text plain
text, as it is for sentencepiece.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from lowbit_dist import documents
from lowbit_dist.errors import ConfigError, why_not_writable
from lowbit_dist.files import atomic_folder, os_errors

MODEL = "tokenizer.model"
FILES = (MODEL, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SAMPLE_BYTES = 64 << 20  # of text that the pieces are learned from
LINE_BYTES = 4000  # of one training sentence


class Tokenizer:
    """A sentencepiece model; thread-safe, and never changes."""

    def __init__(self, model: bytes, name: str = MODEL):
        from sentencepiece import SentencePieceProcessor

        wrong = ConfigError(f"{name} is not a sentencepiece model; write the path of a tokenizer.model")
        if not model:  # the library takes no bytes for a model of no pieces
            raise wrong
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise wrong from None
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.ids: Collection[int] = range(self.vocab_size)
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ConfigError(f"{name} has no <s> or no </s>, which begin and end documents; train another")

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without `<s>` and `</s>`."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; `<s>` and `</s>` have none, and half a character becomes U+FFFD."""
        text: str = self._processor.decode(list(ids))
        return text


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder, or of a sentencepiece model's file."""
    path = Path(path)
    file = path / MODEL if path.is_dir() else path
    try:
        return Tokenizer(file.read_bytes(), str(file))
    except FileNotFoundError:
        raise ConfigError(
            f"tokenizer ({path}) has no {MODEL}; write a folder made by `lowbit tokenizer train`"
            if path.is_dir()
            else f"tokenizer ({path}) does not exist; write a folder made by `lowbit tokenizer train`"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"tokenizer ({file}) cannot be read: {error.strerror or error}; write a folder made by "
            "`lowbit tokenizer train`"
        ) from None


def train(inputs: Iterable[str | Path], vocab_size: int, out_dir: str | Path) -> Tokenizer:
    """Learn `vocab_size` pieces from the inputs' documents and write the tokenizer's files to `out_dir`.

    The same inputs give the same files; a folder that holds another tokenizer is not overwritten.
    """
    out = Path(out_dir)
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 260 <= vocab_size <= 1 << 20:
        raise ConfigError(
            f"--vocab-size ({vocab_size}) must be from 260 to {1 << 20:,} (256 are bytes, 3 are marks); "
            "write 4096, for example"
        )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out ({out}) is a file; write the name of a folder")
    # Seen before the pieces are learned, which takes minutes.
    if out.is_dir() and any(out.iterdir()) and not (out / MODEL).is_file():
        raise ConfigError(f"--out ({out}) is not empty and holds no tokenizer; write another folder")
    if why := why_not_writable(out.parent):
        raise ConfigError(f"--out ({out}) cannot be written: {why}; write a folder that can")
    model = _learn(_sentences(documents.sample(documents.parts(inputs), SAMPLE_BYTES)), vocab_size)
    tokenizer = Tokenizer(model)
    if out.is_dir() and any(out.iterdir()):
        if (out / MODEL).is_file() and (out / MODEL).read_bytes() == model and (out / FILES[1]).is_file():
            return tokenizer
        raise ConfigError(f"--out ({out}) is not empty and holds no such tokenizer; write another folder")
    try:
        with atomic_folder(out, needs=lambda: 10 * len(model)) as draft:
            _write(model, draft)
    except OSError as error:
        raise ConfigError(
            f"--out ({out}) cannot be written: {error.strerror or error}; write a folder that can"
        ) from None
    return tokenizer


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """The texts in runs of whole lines, line ends included, of at most LINE_BYTES where the lines allow."""
    for text in texts:
        run: list[str] = []
        n_bytes = 0
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), LINE_BYTES):
                piece = line[start : start + LINE_BYTES]
                if run and n_bytes + len(piece.encode()) > LINE_BYTES:
                    yield "".join(run)
                    run, n_bytes = [], 0
                run.append(piece)
                n_bytes += len(piece.encode())
        if run:
            yield "".join(run)


def _learn(sentences: Iterator[str], vocab_size: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    mistakes: list[ConfigError] = []

    def until_mistake() -> Iterator[str]:
        # The library would report a mistake in the inputs as its own failure.
        try:
            yield from sentences
        except ConfigError as mistake:
            mistakes.append(mistake)

    try:
        SentencePieceTrainer.train(
            sentence_iterator=until_mistake(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            split_digits=True,
            character_coverage=0.99995,  # rarer characters are spelled in bytes
            max_sentence_length=8 * LINE_BYTES,  # bytes; longer ones would be left out without a word
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=min(os.cpu_count() or 1, 16),
            minloglevel=2,
        )
    except RuntimeError as error:
        raise (mistakes or [_in_words(str(error), vocab_size)])[0] from None
    if mistakes:
        raise mistakes[0]
    return model.getvalue()


def _in_words(error: str, vocab_size: int) -> ConfigError:
    if high := re.search(r"set it to a value <= (\d+)", error):
        return ConfigError(
            f"--vocab-size ({vocab_size:,}) is more than this text has pieces for; write at most "
            f"{int(high[1]):,}, or give more text"
        )
    if low := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return ConfigError(
            f"--vocab-size ({vocab_size:,}) is less than this text's characters need; "
            f"write at least {int(low[1]):,}"
        )
    if "sentences_.empty()" in error:
        return ConfigError("--input holds no text to learn a tokenizer from; give a file that does")
    return ConfigError(f"sentencepiece cannot learn from this text: {error}")


def _write(model: bytes, folder: Path) -> None:
    from transformers import LlamaTokenizerFast

    (folder / MODEL).write_bytes(model)
    fast = LlamaTokenizerFast(
        vocab_file=str(folder / MODEL),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        add_bos_token=False,
        add_prefix_space=False,
        legacy=False,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )
    with os_errors():
        fast.save_pretrained(str(folder))
