"""Prompts and responses: which tokens the loss counts, in shards, in steps of any workers, in evaluations."""

import csv
import hashlib
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import slow
from preparing import prepare_alone
from test_plain_loop import EVAL_SAMPLES, METHODS, SAMPLES, STEPS, plain_loop, train_without

from lowbit_dist import configfile, data, documents, tokenizer
from lowbit_dist.config import ConfigError, Data
from lowbit_dist.data.library import import_streaming
from lowbit_dist.documents import Document, Reading, Tally
from lowbit_dist.evaluate import evaluate, n_predicted
from lowbit_dist.trained import open as open_trained

SEQ = 64  # tokens of a sample
NAMES = {"field": "answer", "prompt_field": "prompt"}


def text(draw: random.Random, n_words: int) -> str:
    words = ["".join(draw.choices("abcdefghij", k=draw.randrange(1, 9))) for _ in range(n_words)]
    return " ".join([*words, "é\n"] if n_words else [])


def rows() -> list[dict[str, str]]:
    """300 prompts and answers of awkward lengths, among them long, empty and equal ones."""
    draw = random.Random(0)
    made = [
        {"prompt": text(draw, draw.randrange(40)), "answer": text(draw, draw.randrange(1, 30))}
        for _ in range(280)
    ]
    made += [{"prompt": text(draw, 300), "answer": text(draw, 3)} for _ in range(10)]
    return [*made, *made[:9], {"prompt": "to which there is no answer", "answer": ""}]


def lines(made: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in made)


@pytest.fixture(scope="module")
def words(corpus):
    return corpus.parent / "tokenizer"


@pytest.fixture(scope="module")
def prompted(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompted")
    (folder / "rows.jsonl").write_text(lines(rows()))
    prepare_alone([folder / "rows.jsonl"], words, folder / "data", seq_len=SEQ, val_fraction=0.1, **NAMES)
    return folder / "data"


def in_order(path: Path, split: str) -> data.Batches:
    batches = data.Batches(Data(path=str(path), seq_len=SEQ), split, 0)
    batches.order = data.Order(batches.order.sizes, None)
    return batches


# --- shards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_answers_and_the_marks_behind_them_are_counted(split, prompted, words):
    code = tokenizer.load(words)
    stream, is_counted, answers = [], [], []
    for prompt, answer in (row.values() for row in rows()):
        place = hashlib.blake2b((prompt + answer).encode(), digest_size=8, key=bytes(8)).digest()
        is_val = int.from_bytes(place, "little") < 0.1 * 2**64
        if answer and is_val == (split == "val"):
            given, learned = [1, *code.encode(prompt)], [*code.encode(answer), 2]
            stream += given + learned
            is_counted += [False] * len(given) + [True] * len(learned)
            answers.append(answer)
    n = len(stream) // SEQ * SEQ
    tokens, mask = torch.tensor(stream[:n]).view(-1, SEQ), torch.tensor(is_counted[:n]).view(-1, SEQ)
    teaches = mask[:, 1:].any(1)
    assert split == "val" or not teaches.all(), "the case must have samples of prompts alone"
    tokens, mask = tokens[teaches], mask[teaches]

    batches = in_order(prompted, split)
    assert torch.equal(batches.micro_batch(0, batches.n_samples), tokens)
    assert torch.equal(batches.labels(0, batches.n_samples), tokens.where(mask, data.IGNORED))
    said = data.read_manifest(prompted).splits[split]
    assert (said.samples, said.tokens) == (len(tokens), tokens.numel())
    assert (said.dropped_tokens, said.counted_tokens) == (len(stream) - tokens.numel(), sum(is_counted))
    assert (said.documents, said.bytes) == (len(answers), sum(len(answer.encode()) for answer in answers))
    assert said.bytes_per_token == said.bytes / sum(is_counted)
    assert said.counted_share == sum(is_counted) / len(stream)


def test_labels_are_those_of_the_samples_that_the_order_names(prompted):
    whole = in_order(prompted, "train")
    tokens, labels = whole.micro_batch(0, whole.n_samples), whole.labels(0, whole.n_samples)
    batches = data.Batches(Data(path=str(prompted), seq_len=SEQ), "train", 5)
    for first in (0, 13, batches.n_samples - 3, 2 * batches.n_samples + 7):
        chosen = torch.from_numpy(batches.order.indices(first, 7))
        assert torch.equal(batches.micro_batch(first, 7), tokens[chosen])
        assert torch.equal(batches.labels(first, 7), labels[chosen])


def test_the_unigram_entropy_is_that_of_what_is_counted(prompted, words):
    sides = {split: in_order(prompted, split) for split in ("train", "val")}
    counts = {}
    for split, batches in sides.items():
        labels = batches.labels(0, batches.n_samples)
        counts[split] = np.bincount(labels[labels != data.IGNORED], minlength=512)
    chance = (counts["train"] + 1) / (counts["train"] + 1).sum()
    entropy = -(counts["val"] * np.log(chance)).sum() / counts["val"].sum()
    assert data.read_manifest(prompted).unigram_entropy == pytest.approx(entropy, rel=1e-12)


STOCK = """
import sys, numpy, streaming
folder, cache, out = sys.argv[1:]
dataset = streaming.StreamingDataset(remote=folder, local=cache, batch_size=1)
samples = [dataset[k] for k in range(dataset.num_samples)]
numpy.savez(out, **{name: numpy.stack([sample[name] for sample in samples]) for name in samples[0]})
"""


def test_stock_streaming_reads_tokens_and_what_is_counted(prompted, tmp_path):
    out = tmp_path / "out.npz"
    subprocess.run([sys.executable, "-c", STOCK, prompted / "val", tmp_path / "cache", out], check=True)
    columns = np.load(out)
    assert sorted(columns) == ["is_counted", "tokens"]
    batches = in_order(prompted, "val")
    labels = np.where(columns["is_counted"], columns["tokens"].astype(np.int64), data.IGNORED)
    assert np.array_equal(labels, batches.labels(0, batches.n_samples))


def test_data_without_prompts_are_byte_for_byte_one_column_of_tokens(corpus, tmp_path):
    """What Streaming's own writer makes of them; their manifest does not speak of prompts."""
    import_streaming()
    from streaming import MDSWriter

    manifest = json.loads((corpus / "manifest.json").read_text())
    assert "prompt_field" not in manifest and "counted_tokens" not in manifest["splits"]["train"]
    batches = in_order(corpus, "val")
    how = {"compression": "zstd", "hashes": ["sha256", "xxh64"], "size_limit": 1 << 24}
    with MDSWriter(columns={"tokens": f"ndarray:uint16:{SEQ}"}, out=str(tmp_path / "val"), **how) as writer:
        for sample in batches.micro_batch(0, batches.n_samples).numpy().astype(np.uint16):
            writer.write({"tokens": sample})
    for file in (tmp_path / "val").iterdir():
        assert file.read_bytes() == (corpus / "val" / file.name).read_bytes(), file.name
    assert batches.labels(0, 3) is None
    assert data.read_manifest(corpus).splits["val"].counted_share == 1


def test_the_prompts_field_is_part_of_the_recipe(prompted, words):
    given, how = [prompted.parent / "rows.jsonl"], {"seq_len": SEQ, "val_fraction": 0.1}
    again = data.prepare(given, words, prompted, **how, **NAMES)
    assert again == data.read_manifest(prompted).model_dump()
    with pytest.raises(ConfigError, match=r"prepared otherwise .prompt_field prompt, not None"):
        data.prepare(given, words, prompted, **how, field="answer")


# --- documents --------------------------------------------------------------------------------------------


class Rows:
    """What `datasets.load_dataset` gives, as far as it is documented and read here."""

    column_names = ("prompt", "answer")
    dataset_size = 1000
    _fingerprint = "0123456789abcdef"

    def __len__(self):
        return len(rows())

    def select_columns(self, names):
        assert names == ["prompt", "answer"]
        return self

    def __getitem__(self, chosen):
        return {name: [row[name] for row in rows()][chosen] for name in self.column_names}


def write(folder: Path, name: str, made: list[dict[str, str]]) -> Path:
    file = folder / name
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), file, row_group_size=70)
    elif name.endswith(".csv"):
        table = io.StringIO()
        writer = csv.DictWriter(table, ["answer", "prompt"])
        writer.writeheader()
        writer.writerows(made)
        file.write_bytes(table.getvalue().encode())
    else:
        file.write_text(json.dumps(made) if name.endswith(".json") else lines(made))
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "hf:owner/name"])
def test_prompts_are_read_from_every_format_with_fields(name, tmp_path, monkeypatch):
    monkeypatch.setattr(documents.tables, "_hf_dataset", lambda given: Rows())
    given = name if name.startswith("hf:") else write(tmp_path, name, rows())
    parts = documents.parts([given], Reading(**NAMES))
    assert list(documents.read_prompted(parts)) == [Document(row["answer"], row["prompt"]) for row in rows()]
    assert list(documents.read(parts)) == [row["prompt"] + row["answer"] for row in rows()]


def test_text_beside_prompts_is_learned_as_it_is_without_them(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    given = [tmp_path / "a.txt", write(tmp_path, "a.jsonl", rows()[:1])]
    first, second = documents.read_prompted(documents.parts(given, Reading(**NAMES)))
    assert first == Document("a text", None)
    assert second.prompt is not None


BAD = {
    '{"answer": "a"}': "has no text in a field 'prompt' (its fields are answer); write --prompt-field NAME,",
    '{"prompt": 3, "answer": "a"}': "has no text in a field 'prompt' (it is a number, its fields are",
    '{"prompt": "p"}': "has no text in a field 'answer' (its fields are prompt); write --field NAME,",
    '"both in one"': 'is not a JSON object but text; write {"prompt": "...", "answer": "..."}',
}


def test_a_row_without_its_prompt_fails_or_is_skipped_and_counted(tmp_path):
    file = tmp_path / "a.jsonl"
    for bad, mistake in BAD.items():
        file.write_text(lines(rows()[:1]) + bad + "\n")
        with pytest.raises(ConfigError) as error:
            documents.parts([file], Reading(**NAMES))
        assert f"{file} line 2 {mistake}" in str(error.value) and "\n" not in str(error.value)
    file.write_text("".join(f"{bad}\n" for bad in BAD) + lines(rows()[:1]))
    tally = Tally()
    parts = documents.parts([file], Reading(**NAMES, on_bad_row="skip"))
    assert len(list(documents.read_prompted(parts, tally))) == 1
    assert tally.skipped_rows == len(BAD)


@pytest.mark.parametrize(
    ("name", "content", "reading", "mistake"),
    [
        ("a.csv", "answer\na\n", {}, "no column 'prompt'; its columns are answer; write --prompt-field NAME"),
        ("a.csv", "prompt\np\n", {}, "no column 'answer'; its columns are prompt; write --field NAME"),
        ("a.txt", "text", {"field": "text"}, r"--prompt-field \(prompt\) names the prompt of JSON, tables"),
        ("a.jsonl", "{}", {"field": "prompt"}, r"--prompt-field \(prompt\) must name another field"),
        ("a.jsonl", "{}", {"prompt_field": ""}, r"--prompt-field \(\) must name another field"),
    ],
)
def test_a_wrong_name_of_the_prompt_is_one_line(name, content, reading, mistake, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=mistake) as error:
        documents.parts([tmp_path / name], Reading(**NAMES | reading))
    assert "\n" not in str(error.value)


def test_a_column_of_prompts_that_are_no_text_is_refused(tmp_path):
    file = write(tmp_path, "a.parquet", [{"prompt": 1, "answer": "a"}])
    with pytest.raises(ConfigError, match=r"column 'prompt' is int64, not text.* write --prompt-field NAME"):
        documents.parts([file], Reading(**NAMES))


def test_a_document_that_is_split_keeps_its_prompt_apart(tmp_path):
    row = {"prompt": "é ask " * 100, "answer": "漢 say " * 70}
    parts = documents.parts([write(tmp_path, "a.jsonl", [row])], Reading(**NAMES))
    with_both = 0
    for longest in (16, 100, 601, 5000):
        cut = [part._replace(reading=part.reading._replace(longest=longest)) for part in parts]
        pieces = list(documents.read_prompted(cut))
        assert "".join(piece.prompt for piece in pieces) == row["prompt"]
        assert "".join(piece.response for piece in pieces) == row["answer"]
        assert all(0 < len(piece.text.encode()) <= longest for piece in pieces)
        with_both += sum(bool(piece.prompt and piece.response) for piece in pieces)
    assert with_both > 1, "the case must have pieces that begin in the prompt and end in the answer"


def test_few_and_large_documents_are_split_and_counted_right(words, tmp_path):
    draw, code = random.Random(0), tokenizer.load(words)
    made = [{"prompt": text(draw, 2000), "answer": text(draw, 2000)} for _ in range(2)]
    file = write(tmp_path, "a.jsonl", made)
    manifest = prepare_alone([file], words, tmp_path / "out", seq_len=SEQ, **NAMES)
    reading = Reading(**NAMES, longest=manifest["longest_document"])
    pieces = list(documents.read_prompted(documents.parts([file], reading)))
    answers = [piece.response for piece in pieces if piece.response]
    assert manifest["empty_documents"] == len(pieces) - len(answers) > 0
    splits = manifest["splits"].values()
    assert sum(split["documents"] for split in splits) == len(answers) > 2
    assert sum(split["counted_tokens"] for split in splits) == sum(len(code.encode(a)) + 1 for a in answers)


def test_what_is_counted_and_left_out_is_shown(prompted, words, lowbit):
    """The folder is there already: what it was made from and what is in it is said again."""
    arguments = ["--input", prompted.parent / "rows.jsonl", "--tokenizer", words, "--out", prompted]
    names = ["--prompt-field", "prompt", "--field", "answer", "--seq-len", SEQ, "--val-fraction", 0.1]
    shown = lowbit("data", "prepare", *arguments, *names)
    assert shown.returncode == 0, shown.stderr
    said = data.read_manifest(prompted)
    n = sum(split.dropped_tokens // SEQ for split in said.splits.values())
    assert f"{said.splits['train'].counted_share:.1%} of train" in shown.stdout
    assert f"{n} samples, left out" in shown.stdout
    assert "1, left out" in shown.stdout  # the empty answer


# --- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "zero"), [("dense", {"stage": 2}), ("dqt int8", {}), *slow(("dense", {}))]
)
def test_each_step_is_that_of_a_plain_loop_over_the_tokens_that_count(method, zero, ranks, small, prompted):
    section, tolerance = METHODS[method]
    exact, summaries, measured = not zero, [], []
    for world in (1, 2):
        content = small(
            run={"name": f"on-{world}"}, method=section, optimizer={"lr": 2e-3, "states": "fp32"}, zero=zero,
            data={"path": str(prompted)},
            train={
                "steps": STEPS, "batch_tokens": SAMPLES * SEQ, "micro_batch": 1, "log_every": 1,
                "eval_every": STEPS, "eval_samples": EVAL_SAMPLES, "save_every": STEPS, "reproducible": exact,
            },
        )  # fmt: skip
        summaries.append(ranks(world).run(train_without, content, ())[0])
        metrics = Path(content["run"]["dir"], f"on-{world}", "metrics.jsonl").read_text().splitlines()
        measured.append([row["loss"] for row in map(json.loads, metrics) if "loss" in row])
    losses, val_loss, _ = plain_loop(configfile.from_dict(content))
    for losses_of_run, summary in zip(measured, summaries, strict=True):
        assert losses_of_run == pytest.approx(losses, rel=tolerance)
        assert summary["val_loss"] == pytest.approx(val_loss, rel=tolerance)
    if exact:
        assert measured[0] == measured[1]
        assert summaries[0]["digest"] == summaries[1]["digest"]
        assert summaries[0]["val_loss"] == summaries[1]["val_loss"]

    batches = data.Batches(Data(path=str(prompted), seq_len=SEQ), "train", 0)
    numbers = [n_predicted(batches.labels(k, 1)) for k in range(SAMPLES)]
    assert max(numbers) > 2 * min(numbers), "the case must have micro-batches of different weights"

    scored = evaluate(open_trained(summaries[0]["checkpoint"]), str(prompted))
    labels = in_order(prompted, "val").labels(0, EVAL_SAMPLES)
    assert scored["loss"] == pytest.approx(summaries[0]["val_loss"], rel=1e-5)
    assert scored["bits_per_byte"] == pytest.approx(summaries[0]["bits_per_byte"], rel=1e-5)
    assert (scored["samples"], scored["tokens"]) == (EVAL_SAMPLES, int((labels != data.IGNORED).sum()))
