"""Documents: every format gives the same ones however it is cut, and what is not read is said."""

import csv
import errno
import gzip
import io
import json
import os
import random
import re
import sys
import tomllib
from pathlib import Path

import pytest
from preparing import prepare_alone

from lowbit_dist import data, documents, tokenizer
from lowbit_dist.config import ConfigError
from lowbit_dist.data import shards, tokenizing
from lowbit_dist.documents import Reading, Tally

SEQ = 32  # tokens of a sample


def texts() -> list[str]:
    """100 documents of awkward lengths, with what JSON and tables have to quote."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randrange(1, 9))) for _ in range(300)]
    words += ["ß漢👍", "\n", "\t", '"', ',"', "\r\n", "\\", "[", "}"]
    made = [" ".join(draw.choices(words, k=draw.randrange(1, 200))) for _ in range(96)]
    return [*made, "", "\u2028 line\x85 ends\r that JSON lines do not have", '"', "last"]


def content(name: str, made: list[str], field: str = "text") -> bytes:
    """A file of `made` in the format of its name."""
    if name.endswith(".gz"):
        return gzip.compress(content(name.removesuffix(".gz"), made, field))
    if name.endswith(".zst"):
        import zstandard

        plain = content(name.removesuffix(".zst"), made, field)
        half = plain.index(b"\n", len(plain) // 2) - 5  # two frames, the border inside a line
        return b"".join(zstandard.compress(piece) for piece in (plain[:half], plain[half:]))
    rows = [{"id": k, field: text} for k, text in enumerate(made)]
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({field: made}), file, row_group_size=17)
        return file.getvalue()
    if name.endswith((".csv", ".tsv")):
        table = io.StringIO()
        writer = csv.writer(table, delimiter="," if name.endswith(".csv") else "\t")
        writer.writerows([["id", field], *([str(row["id"]), row[field]] for row in rows)])
        return table.getvalue().encode("utf-8-sig" if "bom" in name else "utf-8")
    if "list" in name:
        return json.dumps(rows, indent=1 if "indented" in name else None).encode() + b"\n"
    if "strings" in name:
        return json.dumps(made, ensure_ascii=False).encode("utf-8-sig")
    indent = 2 if "objects" in name else None
    return "".join(json.dumps(row, indent=indent) + "\n" for row in rows).encode()


def write(folder: Path, name: str, made: list[str], field: str = "text") -> Path:
    (folder / name).write_bytes(content(name, made, field))
    return folder / name


def documents_of(path, tally: Tally | None = None, **how) -> list[str]:
    return list(documents.read(documents.parts([path], Reading(**how), tally), tally))


def refused(answer: str, inputs, **how) -> str:
    with pytest.raises(ConfigError, match=answer) as error:
        list(documents.read(documents.parts(inputs, Reading(**how))))
    assert "\n" not in str(error.value)
    return str(error.value)


# --- formats ----------------------------------------------------------------------------------------------

NAMES = [
    "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.ndjson", "A.NDJSON.GZ", "a.json", "a.json.gz", "a.json.zst",
    "list.json", "list-indented.json", "list.json.gz", "strings.json", "objects.json", "objects.json.zst",
    "a.csv", "bom.csv", "a.tsv", "a.csv.gz", "a.tsv.zst", "a.parquet",
]  # fmt: skip
ONE_PART = ("list", "strings", "objects", ".gz", ".GZ", ".zst")


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_documents_however_it_is_cut(tmp_path, monkeypatch, name):
    plain = name.lower()  # what `content` looks at
    (tmp_path / name).write_bytes(content(plain, texts()))
    monkeypatch.setattr(documents.stream, "CHUNK", 97)  # bytes: borders inside and between lines
    for size in (100, 7777, 1 << 22):
        monkeypatch.setattr(documents.text, "PART", size)
        parts = documents.parts([tmp_path / name])
        assert list(documents.read(parts)) == texts()
        alone = [list(documents.read([part])) for part in reversed(parts)]  # by different processes
        assert [text for made in reversed(alone) for text in made] == texts()
        many = size == 100 or name.endswith(".parquet")
        assert len(parts) > 5 if many and not any(mark in name for mark in ONE_PART) else len(parts) > 0


def test_one_object_and_an_empty_list_are_json_too(tmp_path):
    (tmp_path / "one.json").write_text('{\n "text": "a\\nstory"\n}')
    (tmp_path / "line.json").write_text('{"text": "a story"}')
    (tmp_path / "none.json").write_text(" [ ] ")
    assert documents_of(tmp_path / "one.json") == ["a\nstory"]
    assert documents_of(tmp_path / "line.json") == ["a story"]
    assert documents_of(tmp_path / "none.json") == []


def test_a_cell_beyond_the_librarys_limit_and_quoted_line_ends_are_read(tmp_path):
    long = "x" * 200_000 + '\n"quoted",\n'
    assert documents_of(write(tmp_path, "a.csv", [long, "b"])) == [long, "b"]


@pytest.mark.parametrize("name", ["a.jsonl", "list.json", "a.csv", "a.tsv.gz", "a.parquet"])
def test_the_field_of_the_text_can_be_named(tmp_path, name):
    file = write(tmp_path, name, ["a story", "another"], field="content")
    assert documents_of(file, field="content") == ["a story", "another"]
    said = refused("no (text in a field|column) 'text'", [file])
    assert "content" in said and "write --field NAME" in said
    refused("'body'.*content.*write --field NAME", [file], field="body")


def test_text_files_are_documents_and_long_ones_are_cut_at_line_ends(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.pyc").write_bytes(b"\0")
    (tmp_path / ".hidden").write_bytes(b"\0")
    (tmp_path / "b" / "empty.txt").write_text("")
    (tmp_path / "b" / "short.md").write_bytes("\ufeffshort\r\n  ß\n".encode())
    draw = random.Random(0)
    long = "".join("é" * draw.randrange(3000) + "\n" for _ in range(200)) + "x" * 200_000 + "\nno end of line"
    (tmp_path / "a.txt").write_text(long)
    for size in (1 << 16, 1 << 18, 1 << 22):
        monkeypatch.setattr(documents.text, "PART", size)
        *pieces, short = documents_of(tmp_path)
        assert short == "short\r\n  ß\n"
        assert "".join(pieces) == long
        assert 5 < len(pieces) < 20
        assert all(piece.endswith("\n") for piece in pieces[:-1])
    (tmp_path / "b" / "a.txt.gz").write_bytes(gzip.compress(long.encode()))
    assert documents_of(tmp_path / "b" / "a.txt.gz") == pieces


# --- separators -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["<|endoftext|>", "\n\n", "%"])
def test_a_separator_divides_a_text_file_wherever_its_parts_begin(tmp_path, monkeypatch, mark):
    draw = random.Random(0)
    made = [f"é Story {k}.\n" + "It goes on.\n" * draw.randrange(20) + "It ends." for k in range(60)]
    made[7] = ""
    file = tmp_path / "stories.txt"
    file.write_text("\ufeff" + f"\n{mark}\n".join(made) + f"\n{mark}\n")
    (tmp_path / "stories.txt.gz").write_bytes(gzip.compress(file.read_bytes()))
    expected = made if mark != "\n\n" else [text for text in made if text]
    for part, chunk in ((100, 7), (333, 50), (1 << 22, 1 << 20)):
        monkeypatch.setattr(documents.text, "PART", part)
        monkeypatch.setattr(documents.stream, "CHUNK", chunk)
        parts = documents.parts([file], Reading(separator=mark))
        assert len(parts) > 20 or part > 100
        stories = list(documents.read(parts))
        assert [text for text in stories if text] == [text for text in made if text]
        assert stories == made or mark == "\n\n"
        zipped = documents_of(tmp_path / "stories.txt.gz", separator=mark)
        assert [text for text in zipped if text] == [text for text in expected if text]
    monkeypatch.setattr(documents.text, "LONGEST", 1000)
    refused("has no separator in 1,000 bytes from byte 0 on", [file], separator="absent")


def test_options_that_have_nothing_to_work_on_are_refused(tmp_path):
    lines, text = write(tmp_path, "a.jsonl", ["a"]), tmp_path / "a.txt"
    text.write_text("words")
    refused("--separator divides text files, and --input has none", [lines], separator="--")
    refused("--field .body. names the text of JSON", [text], field="body")
    refused("--separator must not be empty", [text], separator="")
    refused("--field must not be empty", [lines], field="")
    for nothing in ([], [""], [lines, " "]):
        refused("--input is required; write stdlib", nothing)
    refused("--on-bad-row .drop. must be one of fail, skip", [lines], on_bad_row="drop")


# --- rows without text ------------------------------------------------------------------------------------

BAD_ROWS = {
    "a.jsonl": (
        b'{"text": "a"}\nplain\n{"body": "b"}\n\n{"text": "c"}\n["d"]\n{"text": null}\n',
        4,
        "line 2 is not JSON",
    ),
    "a.json": (b'[{"text": "a"}, 1, {"body": "b"},\n {"text": "c"}, null]', 3, "item 2 is not a JSON object"),
    "quote.csv": (
        b'id,text\n1,a\n2,"b\n3,swallowed\n4,"d"\n5,c\n', 3,
        "line 3 is not CSV (',' expected after '\"' in its line 3)",
    ),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "c"}\n{"text": "d', 1, "line 3 is not JSON"),
    "a.csv": (b'id,text\n1,a\n2,b,b\n3\n\n4,"c"\n5,"d"d\n', 3, "line 3 has 3 cells, its header 2"),
    "bytes.csv": (b'id,text\n\xff,a\n2,\xff\n3,c\n4,d\0', 2, "line 3 is not UTF-8 text at character 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_without_text_is_refused_or_skipped_and_counted(tmp_path, monkeypatch, name):
    content, n_bad, first = BAD_ROWS[name]
    (tmp_path / name).write_bytes(content)
    refused(f"{name} {re.escape(first)}.*--on-bad-row skip", [tmp_path / name])
    for size in (5, 1 << 22):
        monkeypatch.setattr(documents.text, "PART", size)
        tally = Tally()
        assert documents_of(tmp_path / name, tally, on_bad_row="skip") == ["a", "c"]
        assert tally.skipped_rows == n_bad
        assert tally.first_skipped.startswith(f"{tmp_path / name} {first}")


BAD_EVERYWHERE = {"a.jsonl": b'{"text": "a"}\nbad\n' * 50, "a.csv": b"text,n\n" + b"a,1\nbad\n" * 50}


@pytest.mark.parametrize("name", BAD_EVERYWHERE)
def test_lines_before_a_skipped_row_are_counted_once_and_by_who_names_it(tmp_path, monkeypatch, name):
    """Not at each bad row, nor in each part: of a large file that takes hours."""
    (tmp_path / name).write_bytes(BAD_EVERYWHERE[name])
    counted, before = [], documents.part.lines_before
    monkeypatch.setattr(documents.part, "lines_before", lambda *at: counted.append(at) or before(*at))
    monkeypatch.setattr(documents.text, "PART", 100)
    parts, tally = documents.parts([tmp_path / name], Reading(on_bad_row="skip")), Tally()
    assert len(parts) > 2
    assert list(documents.read(parts[1:], tally))
    assert tally.skipped_rows > 10 and counted == []
    lines = BAD_EVERYWHERE[name].splitlines(keepends=True)
    first = next(
        k for k, line in enumerate(lines) if line == b"bad\n" and len(b"".join(lines[:k])) >= parts[1].start
    )
    assert f"{name} line {first + 1} " in tally.first_skipped and first > 5
    assert len(counted) == 1


def test_a_number_of_any_length_beside_the_text_is_no_mistake(tmp_path):
    """Python converts no more than 4,300 digits."""
    row = '{"text": "a", "n": ' + "1" * 5000 + "}"
    for name, content in (("a.jsonl", row), ("a.json", f"[{row},\n{row}]")):
        (tmp_path / name).write_text(content)
        assert set(documents_of(tmp_path / name)) == {"a"}
    (tmp_path / "n.json").write_text("[" + "1" * 5000 + "]")
    refused("item 1 is not a JSON object but a number", [tmp_path / "n.json"])


def test_rows_of_parquet_are_skipped_one_by_one(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a", None, "c"], "list": [["a"], [], []], "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    tally = Tally()
    assert documents_of(tmp_path / "a.parquet", tally, on_bad_row="skip") == ["a", "c"]
    assert (tally.skipped_rows, "row 2 has no text" in tally.first_skipped) == (1, True)
    refused(
        "column 'list' is list<.*not text; its columns are text, list, id",
        [tmp_path / "a.parquet"],
        field="list",
    )
    refused("column 'id' is int64, not text", [tmp_path / "a.parquet"], field="id")


# --- folders ----------------------------------------------------------------------------------------------


def test_linked_folders_are_followed_once_and_what_is_left_out_is_counted(tmp_path):
    corpus, store = tmp_path / "corpus", tmp_path / "store"
    for folder in (corpus / "en", corpus / "__pycache__", corpus / ".git", store / "deep"):
        folder.mkdir(parents=True)
    write(corpus / "en", "a.jsonl", ["one two three"])
    write(store, "b.jsonl", ["four five six"])
    write(store / "deep", "c.jsonl", ["seven"])
    (corpus / "en" / "empty.txt").write_text("")
    os.mkfifo(corpus / "en" / "pipe")
    tally = Tally()
    assert documents_of(corpus, tally) == ["one two three"]
    assert tally.left_out == {
        "hidden names": 1, "__pycache__": 1, "empty files": 1, "pipes, sockets and devices": 1
    }  # fmt: skip
    (corpus / "fr").symlink_to(Path("..", "store"))
    (corpus / "again").symlink_to(store)  # the first of two links to a folder is read
    (corpus / "en" / "up").symlink_to(corpus)
    (store / "loop").symlink_to(Path("."))
    (corpus / "aa.jsonl").symlink_to(Path("en", "a.jsonl"))  # what is really there comes before
    (corpus / "z").symlink_to(store / "deep" / "c.jsonl")
    tally = Tally()
    assert documents_of(corpus, tally) == ["four five six", "seven", "one two three"]
    assert tally.left_out["links to what is read already"] == 5
    names = [Path(part.path).relative_to(corpus).as_posix() for part in documents.parts([corpus])]
    assert names == ["again/b.jsonl", "again/deep/c.jsonl", "en/a.jsonl"]
    refused("read twice", [corpus, store])
    refused("read twice", [corpus / "aa.jsonl", corpus / "en" / "a.jsonl"])
    (corpus / "gone.txt").symlink_to("nowhere")
    refused(rf"cannot be read at {corpus}/gone.txt: {os.strerror(errno.ENOENT)}", [corpus])


def test_a_pattern_says_what_it_leaves_out(tmp_path):
    (tmp_path / "folder").mkdir()
    write(tmp_path, "a.jsonl", ["a"])
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    (tmp_path / "c.txt").write_text("")
    tally = Tally()
    assert documents_of(tmp_path / "*", tally) == ["a"]
    assert tally.left_out == {
        "folders that a pattern names": 1, "links to what is read already": 1, "empty files": 1
    }  # fmt: skip
    refused("names no file with text", [tmp_path / "c*"])


# --- few and large documents ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    tokenizer.train([write(folder, "a.jsonl", texts())], 400, folder / "tokenizer")
    return folder / "tokenizer"


def large(n_documents: int, n_words: int) -> list[str]:
    draw = random.Random(0)
    made = ["".join(draw.choices("abcdefghijklmnop", k=k % 7 + 2)) for k in range(300)]
    return [" ".join(draw.choices(made, k=n_words)) for _ in range(n_documents)]


@pytest.mark.parametrize(("n_documents", "n_words"), [(3, 20_000), (1, 20_000), (1, 300), (2, 2000)])
def test_few_large_documents_are_split_and_give_both_train_and_val(
    tmp_path, monkeypatch, words, n_documents, n_words
):
    """With more tokens than are held, and with fewer."""
    monkeypatch.setattr(shards, "HELD_TOKENS", 50_000)
    made = large(n_documents, n_words)
    file = write(tmp_path, "books.jsonl", made)
    manifest = prepare_alone([file], words, tmp_path / "out", seq_len=SEQ)
    train, val = (manifest["splits"][name] for name in ("train", "val"))
    assert 0 < val["bytes"] < 0.4 * train["bytes"]
    assert train["bytes"] + val["bytes"] == sum(map(len, made))
    assert train["documents"] + val["documents"] > max(3, n_documents)
    assert manifest["longest_document"] < len(made[0])
    assert data.read_manifest(tmp_path / "out").longest_document == manifest["longest_document"]


def test_documents_that_are_many_or_alike_enough_are_not_split(tmp_path, words):
    for k, made in enumerate((large(3, 2000), large(400, 40))):
        folder = tmp_path / str(k)
        folder.mkdir()
        manifest = prepare_alone([write(folder, "a.jsonl", made)], words, folder / "out", seq_len=SEQ)
        assert manifest["longest_document"] is None
        assert sum(split["documents"] for split in manifest["splits"].values()) == len(made)
        assert min(split["samples"] for split in manifest["splits"].values()) > 0


def test_too_little_text_is_refused_before_the_work(tmp_path, monkeypatch, words):
    def must_not_run(*_):
        raise AssertionError("the work was begun")

    monkeypatch.setattr(tokenizing, "tokenised", must_not_run)
    (tmp_path / "a.jsonl").write_text('{"text": "a few words"}\n{"body": "b"}\n')
    answer = "1 documents with 11 bytes of text, too few .* .1 rows were skipped, the first: .*a.jsonl line 2"
    with pytest.raises(ConfigError, match=answer):
        data.prepare([tmp_path / "a.jsonl"], words, tmp_path / "out", seq_len=SEQ, on_bad_row="skip")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["é" * 500, "aé 漢" * 100 + "\n" + "👍" * 100, "short", "\n" * 70])
def test_a_document_is_split_at_line_ends_and_blanks_and_never_inside_a_character(text):
    for longest in (16, 17, 30, 5000):
        pieces = list(documents.text.split(text, longest))
        assert "".join(pieces) == text
        assert all(0 < len(piece.encode()) <= longest for piece in pieces)
        assert len(pieces) == 1 or len(text.encode()) > longest
    assert list(documents.text.split("a\nb c\nd ef", 8)) == ["a\nb c\n", "d ef"]
    assert list(documents.text.split("a b c d ef", 8)) == ["a b c d ", "ef"]


# --- the recipe -------------------------------------------------------------------------------------------


def test_how_documents_were_found_is_part_of_the_recipe_and_older_manifests_are_read(tmp_path, words, lowbit):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / ".hidden").write_text("hidden")
    file = write(tmp_path / "corpus", "a.jsonl", [*texts(), *large(3, 300)])
    with file.open("a") as lines:
        lines.write('{"body": "b"}\n')
    out, how = tmp_path / "out", {"seq_len": SEQ, "on_bad_row": "skip"}
    manifest = prepare_alone([tmp_path / "corpus"], words, out, **how)
    said = data.read_manifest(out)
    assert (said.field, said.separator, said.on_bad_row, said.skipped_rows) == ("text", None, "skip", 1)
    assert f"{file} line {len(texts()) + 4} has no text" in said.first_skipped_row
    assert said.left_out == {"hidden names": 1}
    assert said == data.Manifest.model_validate(manifest)
    assert prepare_alone([tmp_path / "corpus"], words, out, **how) == said.model_dump()
    # What is prepared already is only said again.
    again = lowbit(
        "data", "prepare", "--input", tmp_path / "corpus", "--tokenizer", words, "--out", out,
        "--seq-len", SEQ, "--on-bad-row", "skip",
    )  # fmt: skip
    shown = " ".join(again.stdout.split())
    assert "skipped rows 1, the first: " in shown and "left out hidden names (1)" in shown, again.stderr
    with pytest.raises(ConfigError, match=r"prepared otherwise .on_bad_row skip, not fail"):
        file.write_bytes(file.read_bytes().replace(b'"body"', b'"text"'))
        prepare_alone([tmp_path / "corpus"], words, out, seq_len=SEQ)
    new = {
        "field",
        "separator",
        "on_bad_row",
        "longest_document",
        "skipped_rows",
        "first_skipped_row",
        "left_out",
    }
    older = {name: value for name, value in manifest.items() if name not in new}
    (out / "manifest.json").write_text(json.dumps(older))
    assert data.read_manifest(out) == data.Manifest.model_validate(older | {
        "field": "text", "separator": None, "on_bad_row": "fail", "longest_document": None, "skipped_rows": 0,
        "first_skipped_row": None, "left_out": {}, "prompt_field": None,
    })  # fmt: skip


def test_a_separator_reaches_the_workers(tmp_path, words):
    made = large(30, 60)
    (tmp_path / "a.txt").write_text("<end>".join(made))
    manifest = prepare_alone([tmp_path / "a.txt"], words, tmp_path / "out", seq_len=SEQ, separator="<end>")
    assert sum(split["documents"] for split in manifest["splits"].values()) == 30
    assert (manifest["separator"], manifest["longest_document"]) == ("<end>", None)


# --- other sources ----------------------------------------------------------------------------------------


def test_the_standard_library_is_a_corpus():
    parts = documents.parts(["stdlib"])
    names = [part.path for part in parts]
    assert parts == documents.parts(["stdlib"])
    assert any(name.endswith("/json/decoder.py") for name in names)
    for unwanted in ("/test/", "site-packages", "_sysconfigdata"):
        assert not [name for name in names if unwanted in name]
    found = list(documents.read(parts))
    assert 5e6 < sum(len(text.encode()) for text in found) < 5e7
    assert sum(len(text) for text in documents.sample(parts, 1 << 20)) == pytest.approx(1 << 20, rel=0.2)


def test_a_sample_of_a_corpus_that_fits_is_all_of_it_and_of_others_a_share_of_each_part(tmp_path):
    """A large file first, then many small ones."""
    large = [f"{k:02} " * 300 for k in range(100)]
    write(tmp_path, "a.json", large)
    write(tmp_path, "list.json", large)
    for k in range(200):
        (tmp_path / f"small-{k:03}.txt").write_text(f"text {k}\n")
    parts = documents.parts([tmp_path])
    size = sum(part.size for part in parts)
    assert list(documents.sample(parts, size)) == list(documents.read(parts))
    halves = list(documents.sample(parts[:2], size // 2))
    assert len(halves) == pytest.approx(100, abs=4)
    assert len({*halves}) == pytest.approx(50, abs=4), "half of each file"


class Rows:
    """What `datasets.load_dataset` gives, as far as it is documented and read here."""

    column_names = ("text", "id")
    dataset_size = 1000

    def __init__(self, fingerprint: str):
        self._fingerprint = fingerprint

    def __len__(self):
        return 25

    def select_columns(self, names):
        assert names == ["text"], "no other column is decoded"
        return self

    def __getitem__(self, rows):
        return {"text": [f"row {k}" if k != 7 else None for k in range(25)][rows], "id": [*range(25)][rows]}


def test_a_dataset_of_hugging_face_is_read_by_rows_and_known_by_its_fingerprint(monkeypatch):
    """Without the library; what is called is its documented interface."""
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    dataset, loaded = Rows("0123456789abcdef"), []

    class Library:
        @staticmethod
        def load_dataset(name, configuration, split):
            assert (name, configuration, split) == ("owner/name", "en", "train[:5%]")
            loaded.append(dataset)
            return dataset

    refused(r"pip install 'lowbit-dist\[hf\]'", ["hf:owner/name"])
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert any(need.startswith("datasets") for need in project["optional-dependencies"]["hf"])
    monkeypatch.setitem(sys.modules, "datasets", Library)
    monkeypatch.setattr(documents.tables, "ROWS", 10)
    given = "hf:owner/name:en:train[:5%]"
    parts, tally = documents.parts([given], Reading(on_bad_row="skip")), Tally()
    assert len(parts) == 3
    assert list(documents.read(parts, tally)) == [f"row {k}" for k in range(25) if k != 7]
    assert len(loaded) == 2, "for the parts, and once for all that are read"
    assert (tally.skipped_rows, "row 8 has no text" in tally.first_skipped) == (1, True)
    refused("row 8 has no text .*it is null", [given])
    refused("no column 'body'; its columns are text, id; write --field NAME", [given], field="body")
    stamps = {part.stamp for part in parts}
    assert len(stamps) == 1 and 0 < min(stamps) < 2**63
    dataset = Rows("fedcba9876543210")
    assert documents.parts([given])[0].stamp not in stamps
    documents.tables._hf_columns.cache_clear()  # as in another process
    with pytest.raises(ConfigError, match="has changed while it was read"):
        list(documents.read(parts))


def cut(name: str, n_bytes: int) -> bytes:
    return content(name, texts())[:n_bytes]


BAD_INPUTS = {
    "empty file": ("a.txt", b"", "is empty"),
    "binary": ("a.txt", b"text\0", "byte 4 is zero"),
    "not UTF-8": ("a.txt", b"text \xe9t\xe9", "byte 5 is not UTF-8"),
    "not UTF-8 far in": ("a.txt", b"x\n" * 40_000 + b"\xff", "byte 80,000 is not UTF-8"),
    "gzip as text": ("a.txt", gzip.compress(b"text"), "leave the file out|leave it out"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\nplain\n', r"line 2 is not JSON"),
    "cut JSON": ("a.jsonl", b'{"text": "a"}\n{"text": "b', r"line 2 is not JSON"),
    "no object": ("a.jsonl", b'["text"]\n', "line 1 is not a JSON object"),
    "no text": ("a.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', "line 3 has no text .*body"),
    "text is a number": ("a.jsonl", b'{"text": 1}\n', "line 1 has no text"),
    "text is null": ("a.jsonl", b'{"text": null}\n', "line 1 has no text"),
    "bytes in JSON": ("a.jsonl", b'{"text": "\xe9"}\n', "line 1 is not UTF-8 text at its byte 10"),
    "half a surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogate"),
    "nested JSON": ("a.jsonl", b"[" * 100_000, "line 1 "),
    "no gzip": ("a.jsonl.gz", b'{"text": "a"}\n', "damaged"),
    "cut gzip": ("a.jsonl.gz", cut("a.jsonl.gz", 5000), "ends in the middle"),
    "no zstd": ("a.jsonl.zst", b'{"text": "a"}\n', "damaged"),
    "cut zstd": ("a.jsonl.zst", cut("a.jsonl.zst", 5000), "ends in the middle"),
    "cut list": (
        "a.json",
        content("list.json", texts())[:5000],
        r"item \d+ ends with the file, in its middle",
    ),
    "list without a comma": ("a.json", b'[{"text": "a"} {"text": "b"}]', "item 1 is followed by '{', not by"),
    "list with a mistake": (
        "a.json",
        b'[{"text": "a"}, {"text": b}' + b" " * 100 + b"]",
        "item 2 is not JSON",
    ),
    "two lists": ("a.json", b'["a"]\n["b"]\n', "more text behind the end of its list"),
    "nested list": ("a.json", b"[" * 100_000, "item 1 is JSON nested too deeply"),
    "bytes in a list": ("a.json", b'["a", "\xe9"]', "byte 7 is not UTF-8"),
    "list of numbers": ("a.json", b"[12, 34]", "item 1 is not a JSON object but a number"),
    "list for text": (
        "a.jsonl",
        b'{"text": ["a", "b"]}',
        r"line 1 has no text .*it is a list, its fields are text",
    ),
    "table without a header": ("a.csv", b"1,a\n2,b\n", "no column 'text'; its columns are 1, a"),
    "two columns": ("a.csv", b"text,text\na,b\n", "2 columns 'text'"),
    "open quote": ("a.csv", b'text\na\n"b\nc\n' + b"d\n" * 10, "last row, which has 12 lines, does not end"),
    "two bytes a character": ("a.csv", "text\na\n".encode("utf-16"), "its header is not (UTF-8 text|CSV)"),
    "cut table": ("a.csv.gz", content("a.csv.gz", texts())[:3000], "ends in the middle"),
    "no Parquet": ("a.parquet", b"PAR1 text", "not a Parquet file"),
    "cut Parquet": ("a.parquet", cut("a.parquet", 5000), "not a Parquet file"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_input_that_is_wrong_is_named_with_its_place(tmp_path, case):
    name, content, answer = BAD_INPUTS[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=answer) as error:
        list(documents.read(documents.parts([tmp_path / name])))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_further_inputs_that_are_wrong(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "body.parquet")
    refused("no column 'text'; its columns are body", [tmp_path / "body.parquet"])
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a"] * 5 + [None]}), tmp_path / "null.parquet", row_group_size=2
    )
    refused("row 6 has no text", [tmp_path / "null.parquet"])
    damaged = write(tmp_path, "damaged.parquet", texts())
    content = bytearray(damaged.read_bytes())
    content[1000:2000] = bytes(1000)
    damaged.write_bytes(content)
    refused("damaged", [damaged])
    (tmp_path / "folder").mkdir()
    refused("no file with text", [tmp_path / "folder"])
    (tmp_path / "folder" / "a.txt").write_text("text")
    refused("read twice", [tmp_path / "folder", tmp_path / "folder" / "a.txt"])
    assert list(documents.read(documents.parts([tmp_path / "folder" / "*.txt"]))) == ["text"]
    os.mkfifo(tmp_path / "pipe")
    refused("must be a file or a folder", [tmp_path / "pipe"])
    if os.geteuid():  # root may read everything
        (tmp_path / "folder" / "a.txt").chmod(0)
        refused("cannot be read", [tmp_path / "folder" / "a.txt"])


# --- the command line -------------------------------------------------------------------------------------


def test_the_command_line_passes_the_options_on_and_says_what_was_left_out(tmp_path, lowbit):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / ".hidden").write_text("hidden")
    (tmp_path / "corpus" / "a.txt").write_text("\n\n".join(texts()))
    file = write(tmp_path / "corpus", "a.jsonl", texts(), field="body")
    file.write_bytes(b"bad\n" + file.read_bytes())
    learn = (
        "tokenizer",
        "train",
        "--input",
        tmp_path / "corpus",
        "--vocab-size",
        320,
        "--out",
        tmp_path / "out",
    )
    how = ("--field", "body", "--separator", r"\n\n", "--on-bad-row", "skip")
    done = lowbit(*learn, *how, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["skipped_rows"], answer["left_out"]) == (1, {"hidden names": 1})
    assert "a.jsonl line 1 is not JSON" in answer["first_skipped_row"]
    said = " ".join(lowbit(*learn, *how).stdout.split())
    assert "skipped rows 1, the first: " in said and "left out hidden names (1)" in said
    failed = lowbit(*learn, "--field", "body")
    assert (failed.returncode, "a.jsonl line 1 is not JSON" in failed.stderr) == (2, True)
    done = lowbit("data", "prepare", *learn[2:4], "--tokenizer", tmp_path / "out", "--out", tmp_path / "data",
                  "--on-bad-row", "drop")  # fmt: skip
    assert (done.returncode, "--on-bad-row (drop) must be one of fail, skip" in done.stderr) == (2, True)
