"""What a run was trained on is known by its content: moved data resumes it, other data does not."""

import argparse
import hashlib
import json
import shutil
import textwrap
from pathlib import Path

import pytest
from hf_folders import write
from preparing import prepare_alone
from safetensors.torch import load_file
from test_train import train

from lowbit_dist import configfile, data, inputs, pretrained, runs, tokenizer
from lowbit_dist.cluster import checks
from lowbit_dist.config import ConfigError

HALFWAY = {"train": {"steps": 8, "save_every": 4, "eval_every": 8}}


@pytest.fixture
def other(corpus, tmp_path):
    """Data of other text, with the tokenizer of `corpus`."""
    source = tmp_path / "other.txt"
    source.write_text("\n".join(f"{n} squared is {n * n}" for n in range(3000)))
    prepare_alone([source], corpus / "tokenizer", tmp_path / "other", seq_len=64, val_fraction=0.1)
    return tmp_path / "other"


@pytest.fixture
def with_another_tokenizer(tmp_path):
    """Data whose tokenizer has as many pieces as that of `corpus`, and other ones."""
    sources = [argparse.__file__, textwrap.__file__]
    tokenizer.train(sources, 512, tmp_path / "words")
    prepare_alone(sources, tmp_path / "words", tmp_path / "renamed", seq_len=64, val_fraction=0.1)
    return tmp_path / "renamed"


def with_data(content, path):
    return {**content, "data": {**content["data"], "path": str(path)}}


def swapped(folder, by):
    shutil.rmtree(folder)
    shutil.copytree(by, folder)


def test_a_stopped_run_resumes_on_its_data_wherever_that_lies_and_on_no_other(
    ranks, small, corpus, other, with_another_tokenizer, tmp_path
):
    here = tmp_path / "here"
    shutil.copytree(corpus, here)
    content = with_data(small(run={"name": "run"}, **HALFWAY), here)
    expected = ranks(1).run(train, {**content, "run": {**content["run"], "name": "whole"}})[0]["digest"]
    ranks(1).run(train, content, stop_at=4)
    folder = Path(content["run"]["dir"], "run")
    before = (folder / "tokenizer" / "tokenizer.model").read_bytes()

    for by, words in ((other, "is other data"), (with_another_tokenizer, "another tokenizer")):
        swapped(here, by)
        config = configfile.from_dict(content)
        with pytest.raises(ConfigError, match=rf"data.path \(.*/here\) .*{words}.* than run run was trained"):
            checks.check(config)
        with pytest.raises(
            AssertionError, match=words
        ):  # nor does a worker, whose machine may have other files
            ranks(1).run(train, content)
        assert (folder / "tokenizer" / "tokenizer.model").read_bytes() == before

    moved = with_data(content, tmp_path / "there")
    shutil.copytree(corpus, tmp_path / "there")
    checks.check_run(configfile.from_dict(moved))
    assert ranks(1).run(train, moved)[0]["digest"] == expected


def test_the_headers_of_a_models_files_are_read_once_for_its_fingerprint(tmp_path, monkeypatch):
    """A mixture of experts has tens of thousands of tensors, each with its place in a header."""
    folder = write(tmp_path / "model", "llama")
    expected = hashlib.sha256()
    shown = pretrained.as_mapping(pretrained.configuration(folder))
    shown = {name: x for name, x in shown.items() if name[0] != "_" and name != "transformers_version"}
    expected.update(json.dumps(shown, sort_keys=True).encode())
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        expected.update(f"{name} F32 {tuple(tensor.shape)} ".encode() + tensor.numpy().tobytes()[:4096])
    read, ranges = [], pretrained._ranges
    monkeypatch.setattr(pretrained, "_ranges", lambda file: read.append(file) or ranges(file))
    assert pretrained.fingerprint(folder) == expected.hexdigest()
    assert read == [folder / "model.safetensors"]


def test_a_run_of_an_earlier_version_knows_its_tokenizer(ranks, small, other, with_another_tokenizer):
    content = small(run={"name": "run"}, **HALFWAY)
    ranks(1).run(train, content, stop_at=4)
    (Path(content["run"]["dir"], "run") / runs.INPUTS).unlink()
    for path, is_refused in ((other, False), (with_another_tokenizer, True)):
        config = configfile.from_dict(with_data(content, path))
        if is_refused:
            with pytest.raises(ConfigError, match="another tokenizer"):
                inputs.check(config, data.check(config))
        else:
            inputs.check(config, data.check(config))


def test_without_a_checkpoint_a_run_starts_anew_on_other_data(small, other):
    content = small(run={"name": "run"}, **HALFWAY)
    config = configfile.from_dict(content)
    config.run_dir.mkdir(parents=True)
    inputs.keep(config, data.check(config))
    config = configfile.from_dict(with_data(content, other))
    inputs.check(config, data.check(config))


def test_data_is_the_same_however_it_was_named_when_it_was_prepared(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy" / "manifest.json").read_text())
    renamed = manifest | {"sources": ["elsewhere"], "sources_sha256": "0" * 64}
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(renamed))
    assert data.read_manifest(tmp_path / "copy").digest == data.read_manifest(corpus).digest


def on_two_machines(content, section, field, others):
    import torch.distributed as dist

    if dist.get_rank() == 1:
        content = {**content, section: {**content[section], field: others}}
    try:
        train(content)
    except ConfigError as error:
        return str(error)


def test_workers_that_see_different_data_or_models_do_not_begin(ranks, small, other, tmp_path):
    from hf_folders import rewrite, write

    base, another = (write(tmp_path / name, "llama") for name in ("base", "another"))
    rewrite(another, lambda weights: weights["model.norm.weight"].add_(1))
    content = small(run={"name": "run"}) | {"model": {"pretrained": str(base)}}
    for section, field, path, words in (
        ("data", "path", other, "is other data"), ("model", "pretrained", another, "is another model"),
    ):  # fmt: skip
        for answer in ranks(2).run(on_two_machines, content, section, field, str(path)):
            assert answer.startswith(f"{section}.{field} ("), answer
            assert f"{words} for worker 1 than for worker 0" in answer


def test_a_pretrained_base_may_move_and_is_needed_by_no_reader(ranks, small, tmp_path):
    from hf_folders import rewrite, write

    from lowbit_dist import pretrained, trained

    base = write(tmp_path / "base", "llama")
    content = small(run={"name": "run"}, **HALFWAY)
    content["model"] = {"pretrained": str(base)}
    expected = ranks(1).run(train, {**content, "run": {**content["run"], "name": "whole"}})[0]["digest"]
    ranks(1).run(train, content, stop_at=4)
    moved = {**content, "model": {"pretrained": str(base.rename(tmp_path / "elsewhere"))}}
    checks.check_run(configfile.from_dict(moved))
    # Its folder is not there, and the run's own folder lies elsewhere, too.
    copied = shutil.copytree(Path(content["run"]["dir"], "run"), tmp_path / "copied")
    opened = trained.open(copied)
    assert opened.generate("def", max_new_tokens=3)["tokens"] == 3
    assert ranks(1).run(train, moved)[0]["digest"] == expected

    other = write(tmp_path / "other", "llama")
    assert pretrained.fingerprint(other) == pretrained.fingerprint(tmp_path / "elsewhere")
    rewrite(other, lambda weights: weights["model.norm.weight"].add_(1))
    config = configfile.from_dict({**content, "model": {"pretrained": str(other)}})
    with pytest.raises(
        ConfigError, match=r"^model.pretrained \(.*/other\) is another model than run run was"
    ):
        inputs.check(config, data.check(config))
