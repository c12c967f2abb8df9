"""A model's own tokenizer: transformers' ids, text that comes back, and a run that carries it."""

import json
import random
import shutil
import unicodedata

import hf_tokenizers
import pytest
import torch
from hf_tokenizers import KINDS, TEXTS
from preparing import prepare_alone
from test_train import train

import lowbit_dist
from lowbit_dist import configfile, data, tokenizer
from lowbit_dist.config import ConfigError, Data
from lowbit_dist.data import tokenizing
from lowbit_dist.generate import _Streamed
from lowbit_dist.hf_tokenizer import FastTokenizer

SEQ = 64
MARKS = {
    "llama3": (0, 1), "qwen": (None, 0), "smollm": (0, None), "llama2": (1, 2), "gemma": (2, 1),
    "unigram": (1, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> its folder, made once; not to be changed."""
    root = tmp_path_factory.mktemp("tokenizers")
    return lambda kind: root / kind if (root / kind).exists() else hf_tokenizers.write(root / kind, kind)


@pytest.fixture
def copied(folders, tmp_path):
    """kind -> a folder of its own."""
    return lambda kind: shutil.copytree(folders(kind), tmp_path / "own")


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """100 documents, of which one has a special token of two of KINDS in its text."""
    file = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    texts = ["".join(TEXTS[k::100]) for k in range(100)]
    texts[7] += "<|endoftext|> and on"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def strings(n: int) -> list[str]:
    """Random mixtures of what tokenizers stumble over."""
    draw = random.Random(0)
    alphabet = [
        *"abc  \t\n\r0123é ß漢字👍\u200d\x7f\x00\xa0\u3000.,\"'(){}_",
        *hf_tokenizers.WORDS.split(), "e\u0301", "<s>", "</s>", "<unk>", "<0x0A>", "    ", "\n\n", " 's",
        "<|endoftext|>", "<|im_start|>", "<|end_of_text|>", "<|eot_id|>", "İ", "\ufeff",
    ]  # fmt: skip
    return ["".join(draw.choices(alphabet, k=draw.randrange(40))) for _ in range(n)]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_those_of_auto_tokenizer(kind, folders):
    from transformers import AutoTokenizer

    ours, theirs = tokenizer.load(folders(kind)), AutoTokenizer.from_pretrained(folders(kind))
    texts = strings(4000)
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.vocab_size, ours.n_pieces) == (len(theirs), theirs.vocab_size)
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "unigram"]
)  # which has unknown characters
def test_text_comes_back_and_a_leading_space_is_neither_lost_nor_added(kind, folders):
    loaded = tokenizer.load(folders(kind))
    special = [token.content for token in loaded._fast.added_tokens_decoder.values()]
    texts = [text for text in strings(3000) if not any(token in text for token in special)]
    if kind == "qwen":  # normalises
        texts = [text for text in texts if unicodedata.is_normalized("NFC", text)]
    assert len(texts) > 500
    for text in ["", " ", "  ", "a", " a", "  a ", "\n a", *texts]:
        assert loaded.decode(loaded.encode(text)) == text, repr(text)
    # After the mark of a beginning, too; and in the middle of a text nothing is taken away.
    around = tokenizer.marks(loaded).around(loaded.encode(" def"))
    assert loaded.decode(around) == " def"


@pytest.mark.parametrize("kind", KINDS)
def test_documents_stand_between_the_marks_that_a_tokenizer_has(kind, folders, documents, tmp_path):
    from transformers import AutoTokenizer

    manifest = prepare_alone([documents], folders(kind), tmp_path / "data", seq_len=SEQ, val_fraction=0.1)
    begin, end = MARKS[kind]
    assert (manifest["document_begin"], manifest["document_end"]) == (begin, end)
    assert manifest["longest_document"] is None, "the case must have documents that are not split"
    theirs = AutoTokenizer.from_pretrained(folders(kind))
    streams = {"train": [], "val": []}
    for line in documents.read_text().splitlines():
        text = json.loads(line)["text"]
        place = int.from_bytes(tokenizing.place_of(text.encode(), 0), "little")
        ids = theirs.encode(text, add_special_tokens=False)
        ids = [*([] if begin is None else [begin]), *ids, *([] if end is None else [end])]
        streams["val" if place < int(0.1 * 2**64) else "train"] += ids
    source = Data(path=str(tmp_path / "data"), seq_len=SEQ, cache=tmp_path / "cache")
    for split, stream in streams.items():
        batches = data.Batches(source, split, 0)
        batches.order = data.Order(batches.order.sizes, None)
        found = batches.micro_batch(0, batches.n_samples).flatten().tolist()
        assert found == stream[: len(found)]
        assert 0 <= len(stream) - len(found) < SEQ
    config = configfile.from_dict(
        {"data": {"path": str(tmp_path / "data"), "seq_len": SEQ}, "train": {"batch_tokens": 16 * SEQ}}
    )
    assert data.check(config).marks == MARKS[kind]


def test_what_separates_documents_is_said(folders, documents, lowbit, tmp_path, monkeypatch):
    for kind, words in (
        ("llama3", "token 0 before each, token 1 after each"),
        ("qwen", "token 0 after each"),
    ):
        prepare_alone([documents], folders(kind), tmp_path / kind, seq_len=SEQ)
        monkeypatch.setattr(tokenizing, "tokenised", None)  # it is there already, and only said again
        done = lowbit(
            "data", "prepare", "--input", documents, "--tokenizer", folders(kind), "--out", tmp_path / kind,
            "--seq-len", SEQ,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
        monkeypatch.undo()


def test_a_tokenizer_that_marks_no_document_is_refused(copied, documents, tmp_path):
    folder = copied("llama3")
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").unlink()
    assert tokenizer.load(folder).bos_id is None
    with pytest.raises(
        ConfigError, match=r"--tokenizer \(.*\) has no token that begins or ends a text"
    ) as error:
        prepare_alone([documents], folder, tmp_path / "data", seq_len=SEQ)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


def test_the_prepared_folder_carries_the_tokenizer_and_knows_it(copied, documents, tmp_path):
    folder, out = copied("qwen"), tmp_path / "data"
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "config.json").write_text("{}")  # the model's is no part of it
    prepare_alone([documents], folder, out, seq_len=SEQ)
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    assert {file.name for file in (out / "tokenizer").iterdir()} == names
    for name in names:
        assert (out / "tokenizer" / name).read_bytes() == (folder / name).read_bytes()
    manifest = data.read_manifest(out)
    assert manifest.tokenizer_sha256 == tokenizer.load(folder).sha256
    for run, path in (("here", str(out)), ("remote", f"file://{out}")):
        (tmp_path / run).mkdir()
        (tmp_path / run / "tokenizer.model").write_bytes(b"of data that was there before")
        data.copy_tokenizer(Data(path=path, seq_len=SEQ), manifest, tmp_path / run, is_new=True)
        assert {file.name for file in (tmp_path / run).iterdir()} == names
        assert tokenizer.load(tmp_path / run).sha256 == manifest.tokenizer_sha256

    config = configfile.from_dict(
        {"data": {"path": str(out), "seq_len": SEQ}, "train": {"batch_tokens": 16 * SEQ}}
    )
    data.check(config)
    file = out / "tokenizer" / "tokenizer_config.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | {"eos_token": "<|im_end|>"}))
    with pytest.raises(ConfigError, match=r"its tokenizer/ is not the one its shards were written with"):
        data.check(config)
    file.unlink()
    with pytest.raises(ConfigError, match=r"lacks tokenizer/tokenizer_config\.json"):
        data.check(config)
    file.write_text(whole)
    data.check(config)


def test_another_end_of_texts_is_another_tokenizer(copied):
    """Of one tokenizer.json, as a base model and the one that converses have it."""
    folder = copied("qwen")
    base = tokenizer.load(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|im_end|>"}))
    converses = tokenizer.load(folder)
    assert (base.eos_id, converses.eos_id) == (0, 2)
    assert base.sha256 != converses.sha256
    assert tokenizer.of_files(base.files, "elsewhere").sha256 == base.sha256


def test_a_model_says_what_begins_a_text_where_its_tokenizer_says_nothing(copied):
    folder = copied("qwen")
    loaded = tokenizer.load(folder, bos_id=5, eos_id=6)
    assert (loaded.bos_id, loaded.eos_id) == (None, 0), "it says that no token begins a text"
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    loaded = tokenizer.load(folder, bos_id=5, eos_id=6)
    assert (loaded.bos_id, loaded.eos_id) == (5, 6)


def test_nothing_outside_the_folder_is_read_and_nothing_in_it_is_executed(copied):
    folder = copied("llama3")
    expected = tokenizer.load(folder).encode("the model")
    file = folder / "tokenizer_config.json"
    (folder / "theirs.py").write_text("raise SystemExit('executed')\n")
    strange = {
        "tokenizer_file": "/nowhere/tokenizer.json",
        "vocab_file": "/nowhere/vocab.json",
        "tokenizer_class": "Theirs",
        "auto_map": {"AutoTokenizer": ["theirs.Theirs", "theirs.TheirsFast"]},
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | strange))
    assert tokenizer.load(folder).encode("the model") == expected
    assert tokenizer.load(folder / "tokenizer.json").encode("the model") == expected


def test_a_run_keeps_nothing_of_another_tokenizer(corpus, folders, documents, tmp_path):
    """Of a start that ended before its first checkpoint, on data that was then prepared anew."""
    prepare_alone([documents], folders("qwen"), tmp_path / "qwen", seq_len=SEQ)
    for path in (corpus, tmp_path / "qwen", corpus):
        manifest = data.read_manifest(path)
        data.copy_tokenizer(Data(path=str(path), seq_len=SEQ), manifest, tmp_path / "kept", is_new=True)
        kept = tokenizer.load(tmp_path / "kept", sha256=manifest.tokenizer_sha256)
        assert kept.sha256 == manifest.tokenizer_sha256
        assert {file.name for file in (tmp_path / "kept").iterdir()} == set(manifest.tokenizer_files)


def test_a_run_that_is_resumed_keeps_what_its_user_put_beside_its_tokenizer(corpus, tmp_path):
    manifest, own = data.read_manifest(corpus), tmp_path / "kept" / "chat_template.jinja"
    own.parent.mkdir()
    own.write_text("{{ messages }}")
    data.copy_tokenizer(Data(path=str(corpus), seq_len=SEQ), manifest, own.parent, is_new=False)
    assert own.read_text() == "{{ messages }}"
    kept = tokenizer.load(own.parent, sha256=manifest.tokenizer_sha256)
    assert kept.sha256 == manifest.tokenizer_sha256


STREAMED = [kind for kind in KINDS if kind != "unigram"]  # which has unknown characters


@pytest.mark.parametrize("kind", STREAMED)
def test_text_is_streamed_as_it_is_behind_a_prompt_whose_end_is_spelled_in_bytes(kind, folders):
    loaded, parts = tokenizer.load(folders(kind)), []
    before, text = "the 🎈🎈", "🎈🎈 日本 naïve\n"
    prompt = loaded.encode(before)
    ids = loaded.encode(before + text)
    assert ids[: len(prompt)] == prompt and len(ids) > len(prompt) + 8, "the case must be spelled in bytes"
    streamed = _Streamed(loaded, before, prompt, parts.append)
    streamed.put(torch.tensor([prompt]))
    for token in ids[len(prompt) :]:
        streamed.put(torch.tensor([token]))
    streamed.end()
    assert streamed.text == "".join(parts[1:]) == text
    assert len(parts) > 5


@pytest.mark.parametrize("kind", STREAMED)
def test_half_a_character_behind_a_whole_one_spoils_it_not(kind, folders):
    loaded, parts = tokenizer.load(folders(kind)), []
    prompt, ids = loaded.encode("the 🎈"), loaded.encode("the 🎈🎈🎈")
    assert ids[: len(prompt)] == prompt
    streamed = _Streamed(loaded, "the 🎈", prompt, parts.append)
    streamed.put(torch.tensor([prompt]))
    for token in ids[len(prompt) : -1]:
        streamed.put(torch.tensor([token]))
    streamed.end()
    assert parts[1] == "🎈" and streamed.text.rstrip("\ufffd") == "🎈"
    assert 1 <= streamed.text.count("\ufffd") <= 3


@pytest.mark.parametrize("content", ["[]", "{", "\x00"])
def test_a_damaged_configuration_is_named(content, copied):
    folder = copied("qwen")
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"own: its tokenizer_config\.json is damaged"):
        tokenizer.load(folder)


def test_of_two_models_in_a_folder_that_of_the_model_counts(corpus, tmp_path):
    """sentencepiece's lacks tokens that were added since; older data is still known by it."""
    trained = shutil.copytree(corpus.parent / "tokenizer", tmp_path / "both")
    own = tokenizer.load(trained)
    assert isinstance(own, tokenizer.Tokenizer), "what `tokenizer train` wrote stays sentencepiece"
    file = trained / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["split_special_tokens"]
    file.write_text(json.dumps(config))
    both = tokenizer.load(trained)
    assert isinstance(both, FastTokenizer)
    assert both.encode("a </s> b") != own.encode("a </s> b"), "a special token in a text is one"
    assert both.encode("def main():\n") == own.encode("def main():\n")
    assert tokenizer.load(trained, sha256=own.sha256).sha256 == own.sha256


def test_a_run_evaluates_and_generates_with_the_tokenizer_in_its_folder(
    ranks, small, folders, documents, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "data"
    prepare_alone([documents], folders("qwen"), source, seq_len=SEQ, val_fraction=0.1)
    content = small(run={"name": "qwen"}, data={"path": str(source), "seq_len": SEQ})
    summary = ranks(1).run(train, content)[0]
    shutil.copytree(tmp_path / "qwen", tmp_path / "moved" / "qwen")
    shutil.rmtree(source / "tokenizer")
    for runs in (tmp_path, tmp_path / "moved"):
        trained = lowbit_dist.open("qwen", runs)
        assert trained.tokenizer.encode("the model") == tokenizer.load(folders("qwen")).encode("the model")
        assert trained.evaluate(str(source))["loss"] == pytest.approx(summary["val_loss"], abs=1e-5)
        text = trained.generate("the model", max_new_tokens=8, temperature=0)
        assert 1 <= text["tokens"] <= 8
    with pytest.raises(ConfigError, match=r"--prompt \(\) has no tokens"):
        trained.generate("")
