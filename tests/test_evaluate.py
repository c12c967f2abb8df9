"""A checkpoint in one process: the loss of the training loop, weights through another grid, and text."""

import json
import math
import shutil
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from lowbit_dist import documents, tokenizer
from lowbit_dist.checkpoint import Checkpoint
from lowbit_dist.config import ConfigError
from lowbit_dist.evaluate import evaluate
from lowbit_dist.generate import generate
from lowbit_dist.grid import GRIDS
from lowbit_dist.methods import DQT
from lowbit_dist.ops import cpu
from lowbit_dist.packed import PackedTensor
from lowbit_dist.trained import of_checkpoint

RUNS = {
    "dqt": {"method": {"name": "dqt", "grid": "int3"}},
    "row": {"method": {"name": "dqt", "grid": "int8", "granularity": "row", "sub_norms": True}},
    "ternary forward": {"method": {"name": "dqt", "grid": "int8", "forward": "ternary"}},
    "bitnet": {"method": {"name": "bitnet"}, "optimizer": {"states": "fp32"}},
    "tied": {"method": {"name": "dense"}, "model": {"tie_embeddings": True}, "optimizer": {"states": "fp32"}},
}


@pytest.fixture(scope="module")
def trained(few_steps):
    """name -> (trained model, summary) of a few steps with each of RUNS."""

    def get(name):
        summary = few_steps(**RUNS[name])
        return of_checkpoint(Checkpoint.open(summary["checkpoint"])), summary

    return get


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_is_that_of_the_training_loop(name, trained, corpus):
    model, summary = trained(name)
    found = evaluate(model, str(corpus))
    assert found["loss"] == pytest.approx(summary["val_loss"], abs=1e-5)
    assert found["perplexity"] == pytest.approx(summary["perplexity"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(summary["bits_per_byte"], rel=1e-5)
    assert (found["step"], found["samples"], found["tokens"]) == (4, summary["val_samples"], 6 * 64)


@pytest.mark.skipif(not cpu.available(), reason="there is no C compiler")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU decodes weights")
def test_integers_are_multiplied_where_they_are_asked_for(trained, corpus):
    model, _ = trained("dqt")
    own, integer = (evaluate(model, str(corpus), integer=asked) for asked in (False, True))
    assert (own["products"], integer["products"]) == ("floats", "integers")
    assert 0 < abs(own["loss"] - integer["loss"]) < 1e-3


def test_integers_that_no_layer_multiplies_are_refused(trained, corpus):
    model, _ = trained("tied")
    with pytest.raises(ConfigError, match="--integer needs layers that round their inputs to 8 bits"):
        evaluate(model, str(corpus), integer=True)


@pytest.mark.parametrize("size", [1, 4, 6, 100])
def test_every_sample_counts_whatever_the_micro_batch(size, trained, corpus):
    model, summary = trained("dqt")
    found = evaluate(replace(model, samples=replace(model.samples, micro_batch=size)), str(corpus))
    assert found["samples"] == 6
    assert found["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)


def test_more_samples_are_read_when_asked_for(trained, corpus):
    model, summary = trained("dqt")
    found = evaluate(model, str(corpus), n_samples=10)
    assert found["samples"] == 10
    assert found["loss"] != summary["val_loss"]


def test_the_low_bit_grid_itself_changes_nothing_and_a_coarser_one_does(trained, corpus):
    model, summary = trained("row")
    assert model.method.grid == "int8"
    plain = model.network().state_dict()
    for scale in ("rms", "absmean"):
        through = model.network(forward=GRIDS["ternary"], scale=scale).state_dict()
        method = DQT(grid="ternary", granularity="row", scale=scale)
        for name, weight in plain.items():
            expected = weight
            if isinstance(model.tensor(name), PackedTensor):
                expected = method.quantize(weight).dequantize(torch.float32)
                assert not torch.equal(expected, weight), "the case must change low-bit weights"
            assert torch.equal(through[name], expected), name
    options = ({}, {"forward": "int8"}, {"forward": "ternary"}, {"forward": "ternary", "scale": "absmean"})
    found = [evaluate(model, str(corpus), **given) for given in options]
    own, same, by_rms, by_mean = (each["loss"] for each in found)
    assert own == same and len({own, by_rms, by_mean}) == 3
    assert [each["forward_scale"] for each in found] == [None, None, "rms", "absmean"]
    assert own == pytest.approx(summary["val_loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["dqt", "bitnet"])
def test_a_model_through_its_own_grid_is_itself(name, trained, corpus):
    """Of levels that are ternary already a mean would be less than the scale, by the share that is 0."""
    model, _ = trained(name)
    own = model.method.forward_grid.name
    found, plain = (evaluate(model, str(corpus), forward=grid) for grid in (own, None))
    assert found == plain and plain["forward_scale"] is None
    with pytest.raises(ConfigError, match=r"--forward-scale \(rms\) must go with --forward, a grid to which"):
        evaluate(model, str(corpus), forward=own, scale="rms")


def test_codes_that_the_forward_pass_saw_on_another_grid_can_be_taken_as_they_are(trained, corpus):
    model, _ = trained("ternary forward")
    through = {
        grid: model.network(forward=grid and GRIDS[grid]).state_dict() for grid in ("int8", "ternary", None)
    }
    for name in model.names:
        stored = model.tensor(name)
        if isinstance(stored, PackedTensor):
            assert torch.equal(through["int8"][name], stored.dequantize(torch.float32))
            assert not torch.equal(through["int8"][name], through[None][name])
        assert torch.equal(through["ternary"][name], through[None][name])
    assert evaluate(model, str(corpus), forward="int8")["forward_scale"] is None


def test_a_method_that_knows_no_scale_is_asked_without_one(trained):
    """As the page of methods had it first: `through(weight, grid)`."""
    model, _ = trained("row")
    ternary, name = GRIDS["ternary"], "model.layers.0.mlp.up_proj.weight"

    def through(self, weight, grid):
        return PackedTensor.quantize(weight, torch.tensor([0.5]), grid)

    with patch.object(DQT, "through", through):
        found = model.network(forward=ternary).get_parameter(name)
    assert set(found.unique().tolist()) <= {-0.5, 0.0, 0.5}


def test_text_is_cut_into_samples_of_the_runs_length(trained, tmp_path):
    model, _ = trained("dqt")
    text = "def main():\n    return 1\n" * 40
    (tmp_path / "text.py").write_text(text)
    n = len(model.tokenizer.encode(text)) + 2
    found = evaluate(model, str(tmp_path / "text.py"))
    assert n % 64 > 1, "the case must have a short last sample"
    assert (found["samples"], found["tokens"]) == (n // 64 + 1, n)
    whole = evaluate(model, str(tmp_path / "text.py"), n_samples=n // 64)
    assert (whole["samples"], whole["tokens"]) == (n // 64, n // 64 * 64)
    one = evaluate(replace(model, samples=replace(model.samples, micro_batch=1)), str(tmp_path / "text.py"))
    assert one["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2) * n / len(text))

    (tmp_path / "short.txt").write_text("a few words")
    short = evaluate(model, str(tmp_path / "short.txt"))
    assert (short["samples"], short["tokens"]) == (1, len(model.tokenizer.encode("a few words")) + 2)


def test_text_is_read_as_data_prepare_reads_it(trained, tmp_path, corpus, lowbit):
    model, _ = trained("dqt")
    texts = ["def main():\n    return 1\n" * n + "main()" for n in (3, 5, 8)]
    rows = [json.dumps({"body": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join([rows[0], "bad", *rows[1:]]))
    (tmp_path / "a.txt").write_text("<end>".join(texts))
    folder = tmp_path / "texts"
    folder.mkdir()
    for k, text in enumerate(texts):
        (folder / f"{k}.txt").write_text(text)
    run, lines = model.path.parent.parent, tmp_path / "a.jsonl"

    def scored(*arguments):
        done = lowbit("eval", run, "--data", *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def complaint(*arguments):
        done = lowbit("eval", run, "--data", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        return line

    expected = evaluate(model, str(folder))
    skipped = scored(lines, "--field", "body", "--on-bad-row", "skip")
    divided = scored(tmp_path / "a.txt", "--separator", "<end>")
    for key in ("loss", "bits_per_byte", "samples", "tokens"):
        assert skipped[key] == divided[key] == expected[key]
    assert (skipped["skipped_rows"], skipped["left_out"]) == (1, {})
    assert "a.jsonl line 2 is not JSON" in skipped["first_skipped_row"]
    said = lowbit("eval", run, "--data", lines, "--field", "body", "--on-bad-row", "skip").stdout
    assert "skipped rows 1, the first: " in " ".join(said.split())
    assert scored(corpus)["skipped_rows"] == 0

    assert "line 2 is not JSON" in complaint(lines, "--field", "body")
    assert "no text in a field 'text' (its fields are body); write --field NAME" in complaint(lines)
    assert "(4 rows were skipped, the first: " in complaint(lines, "--on-bad-row", "skip")
    assert "--data has none; leave it out" in complaint(lines, "--separator", "x", "--field", "body")
    for option in (("--field", "body"), ("--separator", "x"), ("--on-bad-row", "skip")):
        assert f"--data ({corpus}) is prepared data" in complaint(corpus, *option)


def test_no_more_text_is_read_than_the_samples_need(trained, tmp_path):
    model, _ = trained("dqt")
    text = "def main():\n    return 1\n" * 40
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + "{}\n" * 3)
    with pytest.raises(ConfigError, match="line 2 has no text"):
        evaluate(model, str(tmp_path / "a.jsonl"))
    taken = documents.Tally()
    how = documents.Reading(on_bad_row="skip")
    first = evaluate(model, str(tmp_path / "a.jsonl"), n_samples=2, reading=how, tally=taken)
    assert (first["samples"], taken.skipped_rows) == (2, 0)


@pytest.mark.parametrize(
    "text", ["import os, sys", "def main():\n    return 1\n" * 40], ids=["one sample", "a short last one"]
)
def test_the_loss_of_text_is_the_mean_negative_log_probability_of_its_tokens(text, trained, tmp_path):
    """Of every token but the first of a sample, whatever its length: a short sample counts for less."""
    model, _ = trained("dqt")
    (tmp_path / "text.txt").write_text(text)
    ids = torch.tensor([model.tokenizer.bos_id, *model.tokenizer.encode(text), model.tokenizer.eos_id])
    network, logs = model.network(), []
    for sample in ids.split(64):
        with torch.inference_mode():
            log_probabilities = network(input_ids=sample[None]).logits[0].double().log_softmax(-1)
        logs.append(log_probabilities[:-1].gather(1, sample[1:, None]))
    expected = -torch.cat(logs).mean().item()
    by_samples = -torch.stack([log_probabilities.mean() for log_probabilities in logs]).mean().item()
    assert len(logs) == 1 or abs(by_samples - expected) > 1e-4, "the case must weigh"
    assert evaluate(model, str(tmp_path / "text.txt"))["loss"] == pytest.approx(expected, abs=1e-5)


def test_what_does_not_belong_to_the_run_is_refused(trained, corpus, tmp_path):
    model, _ = trained("dqt")
    with pytest.raises(ConfigError, match=r"--forward \(int5\) must be one of ternary"):
        evaluate(model, str(corpus), forward="int5")
    with pytest.raises(ConfigError, match=r"--data.*absent"):
        evaluate(model, str(tmp_path / "absent"))
    run = tmp_path / "run"
    shutil.copytree(model.path.parent.parent, run)
    moved = Checkpoint.open(run / "checkpoints" / model.path.name)
    assert of_checkpoint(moved).tokenizer.sha256 == model.tokenizer.sha256
    source = tmp_path / "text.txt"
    source.write_text("other words for another tokenizer " * 50)
    shutil.rmtree(run / "tokenizer")
    tokenizer.train([source], 275, run / "tokenizer")
    with pytest.raises(ConfigError, match="is not the tokenizer of"):
        evaluate(of_checkpoint(moved), str(corpus))


def test_data_of_another_tokenizer_is_refused(trained, corpus, tmp_path):
    model, _ = trained("dqt")
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(ConfigError, match="was prepared with another tokenizer"):
        evaluate(model, str(other))


def test_text_is_sampled_reproducibly_and_with_the_cache_as_without(trained):
    model, _ = trained("dqt")
    first = generate(model, "def ", max_new_tokens=12, seed=1)
    assert generate(model, "def ", max_new_tokens=12, seed=1)["text"] == first["text"]
    assert generate(model, "def ", max_new_tokens=12, seed=2)["text"] != first["text"]
    assert 1 <= first["tokens"] <= 12

    # Without chance: the likeliest token again and again, each time from the whole text.
    network = model.network()
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("import ")]
    begin = len(ids)
    with torch.inference_mode():
        while len(ids) < begin + 12 and ids[-1] != model.tokenizer.eos_id:
            ids.append(int(network(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    greedy = generate(model, "import ", max_new_tokens=12, temperature=0)
    assert greedy["text"] == model.tokenizer.decode(
        [each for each in ids[begin:] if each != model.tokenizer.eos_id]
    )


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens (0)"),
        ({"temperature": -1.0}, "--temperature (-1.0)"),
        ({"temperature": float("nan")}, "--temperature (nan)"),
        ({"temperature": 1e-40}, "--temperature (1e-40) must be 0, or"),
        ({"top_k": -1}, "--top-k (-1)"),
        ({"top_p": 0.0}, "--top-p (0.0)"),
        ({"max_new_tokens": 5000}, "max_seq_len 2048"),
    ],
)
def test_wrong_sampling_options_are_refused(option, words, trained):
    with pytest.raises(ConfigError) as error:
        generate(trained("dqt")[0], "def ", **option)
    assert words in str(error.value)
