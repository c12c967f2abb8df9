"""Generated text: printed as it is, while it is made, of tokens that there are."""

import contextlib
import json
import os
import shutil
import sys

import pytest
import torch
from hf_folders import reconfigure, rewrite, write

import lowbit_dist
from lowbit_dist.config import ConfigError
from lowbit_dist.generate import _Streamed

PROMPT = '\tif x[:key:] == 1:\n\t\treturn "a  b"  # [bold]no[/bold] ' + "a long line " * 20 + ":smile: \\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus):
    """`folder("llama", ...)`: a small model with the corpus's tokenizer, made once."""
    made = {}

    def get(name, **changed):
        key = name, *sorted(changed.items())
        if key not in made:
            made[key] = write(tmp_path_factory.mktemp("models") / name, name, **changed)
            for file in (corpus.parent / "tokenizer").iterdir():
                (made[key] / file.name).write_bytes(file.read_bytes())
        return made[key]

    return get


@pytest.fixture
def on(monkeypatch):
    """`on(descriptor, ...)`: the exit code of `lowbit ...` whose stdout that descriptor is."""

    def run(descriptor, *arguments):
        from lowbit_dist.cli import main

        monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, arguments)])
        stdout = os.dup(1)
        os.dup2(descriptor, 1)
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        return ended.value.code

    return run


def test_the_prompt_and_the_text_are_printed_byte_for_byte(folder, lowbit, on, tmp_path):
    command = (
        "generate",
        folder("llama", max_position_embeddings=512),
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        40,
    )
    answer = json.loads(lowbit(*command, "--json").stdout)
    assert answer["prompt"] == PROMPT and answer["tokens"] > 10
    with (tmp_path / "out").open("wb") as file:
        assert on(file.fileno(), *command) == 0
    assert (tmp_path / "out").read_bytes() == (PROMPT + answer["text"]).encode()


def test_in_a_terminal_the_text_ends_its_line(folder, on):
    ours, theirs = os.openpty()
    command = "generate", folder("llama"), "--prompt", "def ", "--max-new-tokens", 2, "--temperature", 0
    assert on(theirs, *command) == 0
    printed = b""
    while not printed.endswith(b"\n"):  # a terminal gives what it has in pieces
        printed += os.read(ours, 10_000)
    os.close(ours), os.close(theirs)
    text = lowbit_dist.open(folder("llama")).generate("def ", max_new_tokens=2, temperature=0)["text"]
    expected = ("def " + text).removesuffix("\n") + "\n"
    assert printed.decode() == expected.replace("\n", "\r\n")


def test_a_reader_has_each_piece_before_the_next_is_made(folder, on, monkeypatch):
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    put, read = _Streamed.put, []

    def put_and_read(streamed, tokens):
        put(streamed, tokens)
        with contextlib.suppress(BlockingIOError):  # half a character
            read.append(os.read(reader, 10_000))

    monkeypatch.setattr(_Streamed, "put", put_and_read)
    assert on(writer, "generate", folder("llama"), "--prompt", "def ", "--max-new-tokens", 20) == 0
    os.close(writer), os.close(reader)
    assert read[0] == b"def " and len(read) > 5


def test_a_reader_that_has_gone_is_no_failure(folder, on, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    assert on(writer, "generate", folder("llama"), "--prompt", "def ", "--max-new-tokens", 5) == 0
    os.close(writer)
    assert capfd.readouterr().err == ""


def test_text_comes_as_it_is_made_in_whole_characters(folder):
    tokenizer = lowbit_dist.open(folder("llama")).tokenizer
    text = "naïve 日本語 🎈 def main():\n\t"
    prompt, new = tokenizer.encode("é🎈"), tokenizer.encode(text)
    assert len(new) > len(text), "the case must spell characters in bytes"
    parts = []
    streamed = _Streamed(tokenizer, "é🎈", [1, *prompt], parts.append)
    streamed.put(torch.tensor([[1, *prompt]]))
    assert parts == ["é🎈"]
    for n, token in enumerate(new, 1):
        streamed.put(torch.tensor([token]))
        whole = tokenizer.decode(new[:n]).rstrip("\ufffd")
        assert "".join(parts[1:]) == whole
    streamed.put(torch.tensor([tokenizer.eos_id]))
    streamed.end()
    assert streamed.text == text and "".join(parts[1:]) == text
    assert len(parts) > 10 and not any("\ufffd" in part for part in parts)


def test_a_text_ends_before_the_first_of_its_stops(folder):
    model = lowbit_dist.open(folder("llama"))
    network = model.network(integer=True)
    whole = model.generate("def ", max_new_tokens=40, temperature=0, network=network)
    text, parts = whole["text"], []
    assert len(text) > 30 and not whole["finished"]
    for stop in (text[10:15], text[10:11], text[9:25]):
        place = text.find(stop)
        parts.clear()
        ended = model.generate(
            "def ", max_new_tokens=40, temperature=0, network=network, stop=[stop, "never there"],
            stream=parts.append,
        )  # fmt: skip
        assert ended["text"] == "".join(parts[1:]) == text[:place]
        assert ended["finished"] and ended["tokens"] < whole["tokens"]
    almost = [text[-3:] + "x", text[20:23] + "no such"]
    assert model.generate("def ", max_new_tokens=40, temperature=0, stop=almost)["text"] == text


def test_what_may_begin_a_stop_is_held_back_until_it_does_not(folder):
    tokenizer, parts = lowbit_dist.open(folder("llama")).tokenizer, []
    streamed = _Streamed(tokenizer, "", [1], parts.append, ["ab", "bcd!"])
    streamed.put(torch.tensor([[1]]))
    said = []
    for character in "xbcdbcab":
        for token in tokenizer.encode(character):
            streamed.put(torch.tensor([token]))
        said.append("".join(parts))
    assert said == ["x", "x", "x", "x", "xbcd", "xbcd", "xbcdbc", "xbcdbc"]
    assert streamed.has_stopped


def test_half_a_character_at_the_end_is_given_as_such(folder):
    tokenizer = lowbit_dist.open(folder("llama")).tokenizer
    parts = []
    streamed = _Streamed(tokenizer, "", [1], parts.append)
    streamed.put(torch.tensor([[1]]))
    for token in [*tokenizer.encode("a"), *tokenizer.encode("🎈")[:2]]:
        streamed.put(torch.tensor([token]))
    assert streamed.text == "a"
    streamed.end()
    assert streamed.text == tokenizer.decode([*tokenizer.encode("a"), *tokenizer.encode("🎈")[:2]]) != "a"


def test_the_stream_is_the_prompt_and_the_text(folder):
    parts = []
    model = lowbit_dist.open(folder("llama"))
    answer = model.generate("def main", max_new_tokens=20, stream=parts.append)
    assert parts[0] == "def main" and "".join(parts[1:]) == answer["text"]
    assert len(parts) > 10


def test_what_a_model_says_of_sampling_is_not_asked_for(folder, tmp_path):
    path = shutil.copytree(folder("llama"), tmp_path / "model")
    reconfigure(path, repetition_penalty=9.0, no_repeat_ngram_size=1, num_beams=2)
    expected, found = (
        lowbit_dist.open(each).generate("def ", max_new_tokens=8, temperature=0)["text"]
        for each in (folder("llama"), path)
    )
    assert found == expected


def test_tokens_that_the_tokenizer_has_not_are_not_generated(tmp_path, corpus):
    """A model of 2,048 rows, of which the likeliest is always one beyond the tokenizer's 512."""
    path = write(tmp_path / "model", "llama", vocab_size=2048)

    def prefer(weights):
        weights["lm_head.weight"][512:] *= 100

    rewrite(path, prefer)
    for file in (corpus.parent / "tokenizer").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    for kind in ("sentencepiece", "fast"):
        model = lowbit_dist.open(path)
        for temperature in (0, 1):
            ids = []
            decode = model.tokenizer.decode
            model.tokenizer.decode = lambda some, decode=decode, ids=ids: (ids.extend(some), decode(some))[1]
            assert model.generate("def ", max_new_tokens=8, temperature=temperature)["tokens"] >= 1
            assert ids and max(ids) < 512
            model.tokenizer.decode = decode
        with torch.inference_mode():
            logits = model.network()(input_ids=torch.tensor([[1, 5]])).logits
        assert logits[0, -1].argmax() >= 512, f"the case must prefer what {kind} has not"
        (path / "tokenizer.model").unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_text_ends_at_the_models_last_position(name, folder):
    model = lowbit_dist.open(folder(name))
    assert model.max_positions == 128
    n = len(model.tokenizer.encode("def ")) + 1
    assert model.generate("def ", max_new_tokens=128 - n)["tokens"] <= 128 - n
    with pytest.raises(ConfigError, match=f"max_seq_len 128; write fewer, at most {128 - n}"):
        model.generate("def ", max_new_tokens=129 - n)


def test_a_prompt_that_is_not_utf8_is_refused(folder):
    with pytest.raises(ConfigError, match=r"--prompt .* must be text in UTF-8"):
        lowbit_dist.open(folder("llama")).generate(os.fsdecode(b"def \xff"))


def test_ids_between_pieces_that_stand_for_none_are_not_generated(tmp_path, corpus):
    """As in tokenizers whose added tokens begin at a round number: here the last piece is 600, not 511."""
    path = write(tmp_path / "model", "llama", vocab_size=1024)
    rewrite(path, lambda weights: weights["lm_head.weight"][511:600].mul_(100))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (path / file).write_bytes((corpus.parent / "tokenizer" / file).read_bytes())
    fast = json.loads((path / "tokenizer.json").read_text())
    vocabulary = fast["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] = 600
    (path / "tokenizer.json").write_text(json.dumps(fast))
    model = lowbit_dist.open(path)
    assert model.tokenizer.vocab_size == 601
    assert model.tokenizer.ids == {*range(511), 600}
    seen = []
    decode, model.tokenizer.decode = model.tokenizer.decode, lambda ids: seen.extend(ids) or decode(ids)
    model.generate("def ", max_new_tokens=8, temperature=0)
    assert len(seen) > 8 and set(seen) <= model.tokenizer.ids
