"""Documents become tokens, tokens samples, samples hashed shards: `lowbit data prepare`."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit_dist import documents
from lowbit_dist.data import tokenizing
from lowbit_dist.data.manifest import FORMAT, MANIFEST, is_remote, read_manifest
from lowbit_dist.data.shards import Writer, too_few
from lowbit_dist.documents import text
from lowbit_dist.errors import ConfigError
from lowbit_dist.files import atomic_folder, atomic_write
from lowbit_dist.tokenizer import TextTokenizer, marks
from lowbit_dist.tokenizer import load as load_tokenizer

BYTES_PER_TOKEN = 8  # more than text has
MANY = 1 << 16  # documents, of which some go to val by their hash

# Told how many bytes there are to read, it gives what is told how many more have been.
Bar = Callable[[int], contextlib.AbstractContextManager[Callable[[int], object]]]


@contextlib.contextmanager
def _no_bar(n_bytes: int) -> Iterator[Callable[[int], object]]:
    yield lambda n: None


def prepare(
    inputs: Sequence[str | Path],
    tokenizer_dir: str | Path,
    out_dir: str | Path,
    *,
    seq_len: int = 256,
    workers: int | None = None,
    val_fraction: float = 0.02,
    seed: int = 0,
    field: str = "text",
    prompt_field: str | None = None,
    separator: str | None = None,
    on_bad_row: str = "fail",
    bar: Bar = _no_bar,
) -> dict[str, Any]:
    """Write the prepared folder `out_dir` and return its manifest; the same bytes for any number of workers.

    The folder appears at its name complete or not at all.  If it is there already and was made from the same
    inputs in the same way, nothing is done; if it was made otherwise, it is not touched.  `tokenizer_dir` is
    one of `lowbit tokenizer train`, or a Hugging Face model's folder.  `field`, `prompt_field`,
    `separator` and `on_bad_row` say how documents are found in the inputs: see `documents.Reading`.
    """
    if not 2 <= seq_len <= 1 << 20:
        raise ConfigError(f"--seq-len ({seq_len}) must be from 2 to {1 << 20:,}; write 256, for example")
    if not 0 < val_fraction <= 0.5:
        raise ConfigError(f"--val-fraction ({val_fraction}) must be more than 0, at most 0.5; write 0.02")
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers ({workers}) must be at least 1; write 1, or leave it out")
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"--seed ({seed}) must be at least 0 and less than 2^63; write 0")
    if is_remote(str(out_dir)):
        raise ConfigError(
            f"--out ({out_dir}) must be a folder on this machine; copy it to a bucket afterwards"
        )
    out = Path(out_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    begin, end = marks(tokenizer)
    if begin is None and end is None:
        raise ConfigError(
            f"--tokenizer ({tokenizer_dir}) has no token that begins or ends a text, so that nothing would "
            "separate documents; write a bos_token or an eos_token into its tokenizer_config.json"
        )
    tally = documents.Tally()
    reading = documents.Reading(field, separator, on_bad_row, prompt_field=prompt_field)
    ranges = documents.parts(inputs, reading, tally)
    recipe = {
        "format": FORMAT,
        "seq_len": seq_len,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "sources": [str(source) for source in inputs],
        "field": field,
        "prompt_field": prompt_field,
        "separator": separator,
        "on_bad_row": on_bad_row,
        "sources_sha256": hashlib.sha256(json.dumps([part[:6] for part in ranges]).encode()).hexdigest(),
        "val_fraction": val_fraction,
        "seed": seed,
    }
    if existing := _existing(out, recipe):
        return existing
    tokenizing.check_ray()
    longest = _longest_document(ranges, seed, seq_len, val_fraction)
    ranges = [part._replace(reading=part.reading._replace(longest=longest)) for part in ranges]
    needed = None
    with atomic_folder(out, needs=lambda: needed) as draft:
        _copy_tokenizer(tokenizer, draft / "tokenizer")
        has_prompts = prompt_field is not None
        writer = Writer(draft, tokenizer.vocab_size, seq_len, val_fraction, has_prompts=has_prompts)
        n_bytes, n_read = sum(part.size for part in ranges), 0
        with bar(n_bytes) as advance:
            for chunk in tokenizing.tokenised(ranges, tokenizer, seed, workers):
                n_read += int(chunk["size"])
                needed = round(writer.bytes_with(chunk) * n_bytes / max(1, n_read))
                writer.add(chunk)
                first = json.loads(chunk["first_skipped"])
                tally.skip(int(chunk["n_skipped"]), first and documents.BadRow(*first))
                advance(int(chunk["size"]))
        with tally.naming_skipped():
            splits = writer.finish()
        manifest = {
            **recipe,
            **splits,
            "tokenizer_files": sorted(tokenizer.files),
            "document_begin": begin,
            "document_end": end,
            "longest_document": longest,
            **tally.counts(),
        }
        if not has_prompts:  # then the folder is, byte for byte, what it was before there were prompts
            del manifest["prompt_field"]
        _write_manifest(manifest, draft)
    return manifest


def _longest_document(
    ranges: Sequence[documents.FileRange], seed: int, seq_len: int, val_fraction: float
) -> int | None:
    """In pieces of how many bytes documents are split so that both splits get samples; None if as they are.

    Of many documents some go to val by their hash, which a few of them show.  Few and large ones may leave a
    split empty, or give val far more than its share: they are split, as long text files always are.
    """
    enough = BYTES_PER_TOKEN * seq_len  # bytes that fill a sample
    limit = int(val_fraction * 2**64)
    sizes: dict[bytes, int] = {}  # of different documents
    n_documents = n_bytes = 0
    of_split, tally = [0, 0], documents.Tally()
    for document in documents.read_prompted(ranges, tally):
        if not document.response:
            continue
        data = document.text.encode()
        n_documents, n_bytes = n_documents + 1, n_bytes + len(data)
        if (place := tokenizing.place_of(data, seed)) not in sizes:
            sizes[place] = len(data)
            of_split[int.from_bytes(place, "little") < limit] += len(data)
            if min(of_split) >= enough or len(sizes) >= MANY:
                return None
    if n_bytes + 4 * n_documents < 2 * seq_len:  # each byte a token, and marks
        with tally.naming_skipped():
            raise too_few(n_documents, f"{n_bytes:,} bytes of text", seq_len)
    total, largest = sum(of_split), max(sizes.values())
    share = max(enough, val_fraction * total)
    if largest <= min(total / 2, total - share - enough, max(text.PIECE, share)):
        return None
    return min(text.PIECE, max(enough, total // 32))


def _existing(out: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of `out` when it is what `recipe` would make; None when there is nothing."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"--out ({out}) is there and is not prepared data; write the name of a new folder")
    manifest = read_manifest(out).model_dump()
    if differing := [name for name in recipe if manifest[name] != recipe[name]]:
        name = differing[0]
        what = (
            "its inputs have changed"
            if name == "sources_sha256"
            else f"{name} {manifest[name]}, not {recipe[name]}"
        )
        raise ConfigError(
            f"--out ({out}) holds data prepared otherwise ({what}); write another folder, or delete this one"
        )
    return manifest


def _copy_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    folder.mkdir()
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)


def _write_manifest(manifest: Mapping[str, Any], folder: Path) -> None:
    """Last: its presence says that everything it speaks of is there."""
    with atomic_write(folder / MANIFEST) as draft:
        draft.write_text(json.dumps(manifest, indent=1) + "\n")
