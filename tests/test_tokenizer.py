"""The tokenizer: text comes back unchanged, Hugging Face gives the same ids, mistakes are one line."""

import io
import json
import random
import sysconfig
from pathlib import Path

import pytest

from lowbit_dist import documents, tokenizer
from lowbit_dist.config import ConfigError

STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer") / "out"
    tokenizer.train([STDLIB / "json", STDLIB / "email", STDLIB / "asyncio"], 1000, out)
    return out


@pytest.fixture(scope="module")
def words(folder):
    return tokenizer.load(folder)


def lines() -> list[str]:
    """Some thousands: code, and random mixtures of what tokenizers stumble over."""
    draw = random.Random(0)
    alphabet = [
        *"abc  \t\n\r0123é ß漢字👍\u200d\x7f\x00\xa0\u3000.,\"'(){}_",
        "👩‍👩‍👧", "<s>", "</s>", "<unk>", "<0x0A>", "    ", "\n\n", "def ", "self.", "İ", "\ufeff",
    ]  # fmt: skip
    code = [
        line
        for file in sorted((STDLIB / "html").glob("*.py")) + sorted((STDLIB / "email").glob("*.py"))
        for line in file.read_text().splitlines(keepends=True)
    ]
    mixed = ["".join(draw.choices(alphabet, k=draw.randrange(60))) for _ in range(3000)]
    return code + mixed + [(STDLIB / "ast.py").read_text()]


def test_every_text_comes_back_unchanged(words):
    assert len(lines()) > 5000
    for line in lines():
        assert words.decode(words.encode(line)) == line


def test_hugging_face_gives_the_same_ids_and_text(folder, words):
    from transformers import AutoTokenizer, LlamaTokenizerFast

    for theirs in (LlamaTokenizerFast.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)):
        assert theirs.is_fast
        assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
        for line in lines():
            ids = theirs.encode(line, add_special_tokens=False)
            assert ids == words.encode(line), repr(line)
            assert theirs.decode(ids) == line


def test_ids_are_those_of_llama_and_digits_stand_alone(folder, words):
    assert (words.bos_id, words.eos_id, words.vocab_size) == (1, 2, 1000)
    pieces = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert [pieces[name] for name in ("<unk>", "<s>", "</s>", "<0x00>", "<0xFF>")] == [0, 1, 2, 3, 258]
    assert not [
        piece for piece in pieces if any(c.isdigit() for c in piece) and len(piece) > 1 and "<0x" not in piece
    ]
    assert "▁▁▁▁" in pieces, "indentation must be one token"
    assert words.encode("<s></s>")[:1] != [1], "marks written in a text are text"


def test_the_same_text_gives_the_same_files_and_another_text_does_not_overwrite_them(folder, tmp_path):
    inputs = [STDLIB / "json", STDLIB / "email", STDLIB / "asyncio"]
    tokenizer.train(inputs, 1000, tmp_path / "again")
    for name in tokenizer.FILES:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert tokenizer.train(inputs, 1000, folder).sha256 == tokenizer.load(folder).sha256
    with pytest.raises(ConfigError, match="not empty"):
        tokenizer.train(inputs, 999, folder)
    assert tokenizer.load(folder).vocab_size == 1000
    assert not [left for left in folder.parent.iterdir() if left != folder], "drafts are cleared"


def test_long_lines_are_learned_from_too(tmp_path):
    (tmp_path / "one-line.txt").write_text("x" * 9000 + " abracadabra" * 5000)
    words = tokenizer.train([tmp_path / "one-line.txt"], 280, tmp_path / "out")
    assert len(words.encode(" abracadabra")) <= 2


def test_text_around_a_reserved_character_is_learned_from_and_the_character_is_counted(tmp_path):
    """sentencepiece leaves out each sentence with U+2585, here all that hold the word."""
    bars = "".join(map(chr, range(0x2581, 0x2589)))
    (tmp_path / "log.txt").write_text("plain words\n" * 50 + f"abracadabra {bars[4]} abracadabra\n" * 100)
    tally = documents.Tally()
    words = tokenizer.train([tmp_path / "log.txt"], 284, tmp_path / "out", tally=tally)
    assert len(words.encode("abracadabra")) == 1
    assert tally.left_out == {"characters U+2585, reserved by sentencepiece and spelled in bytes": 100}
    assert words.decode(words.encode(bars[1:])) == bars[1:]


@pytest.mark.parametrize(
    ("text", "vocab_size", "answer"),
    [
        ("hello world\n" * 3, 4000, "write at most 2"),
        ("".join(map(chr, range(0x4E00, 0x4E80))), 300, "write at least 3"),
        ("hello", 0, "from 260"),
        ("hello", -1, "from 260"),
        ("hello", 2.5, "from 260"),
        ("hello", True, "from 260"),
        ("", 300, "empty"),
    ],
)
def test_a_vocabulary_that_does_not_fit_the_text_is_refused_in_one_line(tmp_path, text, vocab_size, answer):
    (tmp_path / "text.txt").write_text(text)
    with pytest.raises(ConfigError, match=answer) as error:
        tokenizer.train([tmp_path / "text.txt"], vocab_size, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_the_middle_of_the_inputs_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("plain words of text " * 100)
    (tmp_path / "b.txt").write_bytes(b"binary\0")
    with pytest.raises(ConfigError, match=r"^/[^ ]*/b\.txt: byte 6 is zero"):
        tokenizer.train([tmp_path], 280, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_space_that_llama_puts_in_front_is_taken_away_and_no_other():
    """Of a model of LLaMA's, whose pieces of a text's beginning are those of a word behind a space."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter((STDLIB / "json" / "decoder.py").read_text().splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    llama = tokenizer.Tokenizer(model.getvalue())
    assert (llama.bos_id, llama.eos_id) == (1, 2)
    for text in ("", " ", "  ", "a", " a", "  a ", "\n a", "漢", " 漢", "def main():\n    a"):
        ids = llama.encode(text)
        assert llama.encode(f" {text}") != ids
        assert llama.decode(ids) == text
        assert llama.decode(tokenizer.marks(llama).around(ids)) == text


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 100, b"{}", None])
def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    for path in (tmp_path, tmp_path / "tokenizer.model", tmp_path / "nowhere"):
        with pytest.raises(
            ConfigError, match=r"is not a sentencepiece model|has no tok|does not exist"
        ) as error:
            tokenizer.load(path)
        assert "\n" not in str(error.value)
