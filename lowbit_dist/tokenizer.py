"""Tokenizers: a model's own, of a Hugging Face folder, or one that is learned here.

`load` gives the one of a folder; all have the members of `TextTokenizer`.  What `train` learns is
sentencepiece BPE with byte fallback, LLaMA's conventions, and text that comes back unchanged.

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
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from lowbit_dist import documents, hf_tokenizer
from lowbit_dist.errors import ConfigError, why_not_writable
from lowbit_dist.files import atomic_folder, os_errors
from lowbit_dist.hf_tokenizer import FastTokenizer
from lowbit_dist.machine import processors

MODEL = "tokenizer.model"
FILES = (MODEL, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")  # that `train` writes
SAMPLE_BYTES = 64 << 20  # of text that the pieces are learned from
LINE_BYTES = 4000  # of one training sentence
RESERVED = "\u2585"  # stands for unknown characters inside sentencepiece, which leaves out sentences with it


class TextTokenizer(Protocol):
    """What is asked of a tokenizer, of sentencepiece or of Hugging Face."""

    files: Mapping[str, bytes]  # by name: what it was loaded from, and what stands beside that
    sha256: str  # by which it is known
    vocab_size: int  # more than every id
    n_pieces: int  # without the tokens that were added to it, for which its model may have no embedding
    ids: Collection[int]  # that stand for something

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class Marks(NamedTuple):
    """The ids that stand before and after each document; None: no token does."""

    begin: int | None
    end: int | None

    def around(self, ids: Sequence[int]) -> list[int]:
        """A document's ids between its marks."""
        begin, end = ([] if mark is None else [mark] for mark in self)
        return [*begin, *ids, *end]

    def in_words(self) -> str:
        begin = [] if self.begin is None else [f"token {self.begin} before each"]
        end = [] if self.end is None else [f"token {self.end} after each"]
        return ", ".join(begin + end) or "not known"  # of an older manifest


def marks(tokenizer: TextTokenizer) -> Marks:
    """What stands around documents; a token that begins a text and ends it, too, stands before it alone."""
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    return Marks(begin, None if end == begin else end)


class Tokenizer:
    """A sentencepiece model; thread-safe, and never changes.

    `beside`: the content of files that are kept with it, by name.
    """

    def __init__(self, model: bytes, name: str = MODEL, beside: Mapping[str, bytes] | None = None):
        from sentencepiece import SentencePieceProcessor

        wrong = ConfigError(f"{name} is not a sentencepiece model; write the path of a tokenizer.model")
        if not model:  # the library takes no bytes for a model of no pieces
            raise wrong
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise wrong from None
        self.files: Mapping[str, bytes] = {**(beside or {}), MODEL: model}
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.n_pieces = self.vocab_size
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


def load(
    path: str | Path, *, sha256: str | None = None, bos_id: int | None = None, eos_id: int | None = None
) -> TextTokenizer:
    """The tokenizer of a folder, see `of_files`, or of a sentencepiece model's file."""
    path = Path(path)
    path = path.parent if path.name == hf_tokenizer.FILE else path
    otherwise = f"write a folder made by `lowbit tokenizer train`, or a model's with its {hf_tokenizer.FILE}"
    try:
        if path.is_file():
            return Tokenizer(path.read_bytes(), str(path))
        places = [path / name for name in hf_tokenizer.FILES]
        files = {place.name: place.read_bytes() for place in places if place.exists()}
    except OSError as error:
        raise ConfigError(
            f"tokenizer ({error.filename}) cannot be read: {error.strerror or error}; {otherwise}"
        ) from None
    if not path.exists():
        raise ConfigError(f"tokenizer ({path}) does not exist; {otherwise}")
    if not {MODEL, hf_tokenizer.FILE} & set(files):
        raise ConfigError(f"tokenizer ({path}) has no {MODEL} and no {hf_tokenizer.FILE}; {otherwise}")
    return of_files(files, path, sha256=sha256, bos_id=bos_id, eos_id=eos_id)


def of_files(
    files: Mapping[str, bytes],
    folder: str | Path,
    *,
    sha256: str | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> TextTokenizer:
    """The tokenizer of a folder's files, by name; the folder itself is for messages.

    Of a `tokenizer.model` and a `tokenizer.json` the second one counts, which may have tokens that the first
    one lacks, unless the folder is one of `train`, or `sha256` is the hash of the first one.  `bos_id` and
    `eos_id` stand for marks that a `tokenizer.json` does not have.
    """
    is_known = MODEL in files and sha256 == hashlib.sha256(files[MODEL]).hexdigest()
    if is_known or hf_tokenizer.FILE not in files or _is_trained(files, str(folder)):
        return Tokenizer(files[MODEL], f"{folder}/{MODEL}", files)
    return FastTokenizer(files, str(folder), bos_id=bos_id, eos_id=eos_id)


def _is_trained(files: Mapping[str, bytes], folder: str) -> bool:
    """Whether `train` has written them: then a special token in a text is text, as sentencepiece has it."""
    return MODEL in files and hf_tokenizer.config_of(files, folder).get("split_special_tokens") is True


def train(
    inputs: Iterable[str | Path],
    vocab_size: int,
    out_dir: str | Path,
    *,
    reading: documents.Reading | None = None,
    tally: documents.Tally | None = None,
) -> Tokenizer:
    """Learn `vocab_size` pieces from the inputs' documents and write the tokenizer's files to `out_dir`.

    The same inputs give the same files; a folder that holds another tokenizer is not overwritten.  `reading`
    says how documents are found in the inputs; `tally` counts what of them is not learned from.
    """
    tally = documents.Tally() if tally is None else tally
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
    texts = documents.sample(documents.parts(inputs, reading, tally), SAMPLE_BYTES, tally)
    with tally.naming_skipped():
        model = _learn(_sentences(texts, tally), vocab_size)
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


def _sentences(texts: Iterable[str], tally: documents.Tally) -> Iterator[str]:
    """The texts in runs of whole lines, line ends included, of at most LINE_BYTES where the lines allow."""
    for text in _without_reserved(texts, tally):
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


def _without_reserved(texts: Iterable[str], tally: documents.Tally) -> Iterator[str]:
    """The texts between reserved characters, so that no more than these is left out."""
    for text in texts:
        first, *others = text.split(RESERVED)
        yield first
        if others:
            tally.left_out["characters U+2585, reserved by sentencepiece and spelled in bytes"] += len(others)
            yield from others


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
            num_threads=min(processors(), 16),
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
