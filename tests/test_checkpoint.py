"""Checkpoints: their size, their integrity, and how they are found."""

import json
import shutil

import pytest
import torch
from test_train import train

from lowbit_dist import checkpoint
from lowbit_dist.checkpoint import Checkpoint, writing
from lowbit_dist.config import ConfigError
from lowbit_dist.packed import PackedTensor


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where the run of the tests below is kept, once the first of them has made it."""
    return tmp_path_factory.mktemp("trained") / "small"


@pytest.fixture
def run(trained, ranks, small, tmp_path):
    """The folder of a finished run of two workers with checkpoints at steps 2, 4 and 6."""
    folder = tmp_path / "small"
    if trained.exists():
        return shutil.copytree(trained, folder)
    ranks(2).run(train, small(train={"steps": 6, "save_every": 2, "keep_last": 3, "eval_every": 6}))
    shutil.copytree(folder, trained)
    return folder


def test_a_checkpoint_holds_codes_scales_states_and_other_weights_and_hardly_more(run):
    opened = Checkpoint.open(checkpoint.latest(run))
    low_bit = [name for name in opened.names if opened.grid(name)]
    n_low_bit = sum(torch.Size(opened.shape(name)).numel() for name in low_bit)
    n_other = sum(torch.Size(opened.shape(name)).numel() for name in opened.names if not opened.grid(name))
    sizes = opened.components()
    assert sizes["low_bit_weights"] == n_low_bit // 4
    assert sizes["scales"] == 2 * len(low_bit)
    assert sizes["other_weights"] == 4 * n_other
    assert sizes["optimizer_states"] == 2 * (n_low_bit + n_other) + 8 * (n_low_bit + n_other) // 256
    on_disk = sum(file.stat().st_size for file in opened.path.iterdir())
    assert sizes["overhead"] + sum(v for k, v in sizes.items() if k != "overhead") == on_disk
    assert sizes["overhead"] < 0.02 * on_disk


def test_a_checkpoint_gives_back_whole_tensors(run):
    opened = Checkpoint.open(checkpoint.latest(run))
    assert opened.step == 6
    tensor = opened.tensor("model.layers.1.mlp.down_proj.weight")
    assert isinstance(tensor, PackedTensor)
    assert tensor.shape == (256, 512)
    assert set(tensor.levels().unique().tolist()) == {-1, 0, 1}
    assert torch.equal(tensor.scale, tensor.scale.half().float())
    assert opened.tensor("model.norm.weight").shape == (256,)
    assert opened.config.run.name == "small"


def test_only_the_last_checkpoints_are_kept_and_latest_names_the_newest(ranks, small, tmp_path):
    ranks(2).run(train, small(train={"steps": 6, "save_every": 2, "keep_last": 2, "eval_every": 6}))
    folder = tmp_path / "small"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-4", "step-6"]
    assert (folder / "latest").read_text() == "step-6"


def test_a_damaged_checkpoint_behind_which_a_run_went_back_pushes_out_no_other(ranks, small, tmp_path):
    content = small(train={"steps": 6, "save_every": 2, "keep_last": 2, "eval_every": 6})
    ranks(1).run(train, content, stop_at=4)
    folder = tmp_path / "small"
    (folder / "checkpoints" / "step-4" / "shard-00000.safetensors").write_bytes(b"")
    more_often = {**content, "train": {**content["train"], "save_every": 1, "keep_last": 1}}
    ranks(1).run(train, more_often, stop_at=3)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-3", "step-4"]
    assert checkpoint.latest(folder).name == "step-3"


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_file_is_detected_and_the_checkpoint_before_is_used(damage, run, caplog):
    newest = checkpoint.latest(run)
    assert newest.name == "step-6"
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        if damage == "flip":
            file.write_bytes(
                whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
            )
        elif damage == "truncate":
            file.write_bytes(whole[:-1])
        else:
            file.unlink()
        caplog.clear()
        found = checkpoint.latest(run)
        file.write_bytes(whole)
        assert found.name == "step-4", file.name
        assert "DAMAGED CHECKPOINT" in caplog.text
    assert checkpoint.latest(run).name == "step-6"


def refusal_of(configuration):
    try:
        train(configuration)
    except ConfigError as error:
        return str(error)
    raise AssertionError("the run was started over")


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(run, ranks, small):
    for folder in (run / "checkpoints").iterdir():
        (folder / "shard-00001.safetensors").write_bytes(b"")
    answers = ranks(2).run(refusal_of, small(train={"steps": 8, "save_every": 2, "eval_every": 8}))
    assert answers[0] == answers[1]
    assert "has no checkpoint that is not damaged" in answers[0]
    assert len(list((run / "checkpoints").iterdir())) == 3


def test_any_changed_byte_of_the_list_of_hashes_is_noticed(run):
    newest = checkpoint.latest(run)
    file = newest / checkpoint.SUMS
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert Checkpoint.open(newest).verify(), place
    file.write_bytes(whole)
    assert Checkpoint.open(newest).verify() == []


def test_a_partial_save_is_never_taken_for_a_checkpoint(run):
    partial = run / "checkpoints" / ".step-8.partial"
    partial.mkdir()
    (partial / "shard-00000.safetensors").write_bytes(b"half")
    assert checkpoint.latest(run).name == "step-6"
    checkpoint.clear_partial(run)
    assert not partial.exists()


def test_a_checkpoint_whose_successor_has_no_name_yet_comes_back(run):
    """A kill between the two renames of a step that is written again."""
    newest = checkpoint.latest(run)
    newest.rename(newest.with_name(f".{newest.name}.replaced"))
    (newest.parent / f".{newest.name}.partial").mkdir()
    checkpoint.clear_partial(run)
    assert checkpoint.latest(run) == newest and not list(newest.parent.glob(".step-*"))
    shutil.copytree(newest, newest.with_name(f".{newest.name}.replaced"))
    checkpoint.clear_partial(run)
    assert not list(newest.parent.glob(".step-*")), "its successor is there"


WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def die_at(number, torn):
    """SIGKILL this process before its `number`-th change of files; `torn`: in the middle of a shard."""
    import os
    import signal
    import sys

    seen = 0

    def count(*_):
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event in WRITES or (event == "open" and arguments[1] not in (None, "r", "rb")):
            count()

    sys.addaudithook(hook)
    sync, save_file = os.fsync, writing.save_file

    def counted_sync(descriptor):
        count()
        sync(descriptor)

    def torn_save(tensors, path):
        save_file(tensors, path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = counted_sync
    if torn:
        writing.save_file = torn_save


def saves_with_deaths(configuration):
    """(events before death, checkpoint found, its digest is that of its step) for a death at each event."""
    import os
    import shutil

    from lowbit_dist import configfile, model, ops
    from lowbit_dist.checkpoint import Position, Saver
    from lowbit_dist.checkpoint.writing import WorkerFile
    from lowbit_dist.zero import Engine

    config = configfile.from_dict(configuration)
    built = model.build(config.model, 512, config.method, torch.float32)
    initial = model.InitialWeights(built, config.method, 0, None)
    engine = Engine(config, built, initial, model.low_bit_names(built, config.method))
    saver = Saver(config, rank=0, world=1, facts={"vocab_size": 512, "tokenizer_sha256": ""})
    folder = config.run_dir / "checkpoints"
    digests = {}
    for step in (2, 4):
        with engine.step(ops.Now(lr=0.1, weight_decay=0.0, step=step, seed=0)) as passes:
            for _ in range(engine.micro_batches):
                passes.backward(torch.arange(step, step + 2 * 64).view(2, 64))
        position = Position(step=step, samples=step, tokens=step)
        saver.save(engine.shards, position)
        saver.wait()
        digests[step] = Checkpoint.open(folder / f"step-{step}").digest()
    engine.close()
    part = WorkerFile.copied(engine.shards, 0)
    found = []
    for replaces in (False, True):
        for number in range(1000):
            if not replaces:
                shutil.rmtree(folder / "step-4")
            child = os.fork()
            if child == 0:
                die_at(number, torn=number == 0)
                saver._write(part, position)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            newest = checkpoint.latest(config.run_dir)
            opened = Checkpoint.open(newest)
            # What bears its final name is whole, and right.
            is_whole = all(Checkpoint.open(path).verify() == [] for path in folder.glob("step-*"))
            is_right = is_whole and opened.digest() == digests[opened.step]
            found.append((replaces, number, newest.name, is_right))
            checkpoint.clear_partial(config.run_dir)
            saver._write(part, position)
            assert checkpoint.latest(config.run_dir).name == "step-4"
            assert {each.name for each in folder.iterdir()} == {"step-2", "step-4"}
            if os.WIFEXITED(status):
                break
    return digests[2] != digests[4], found


def test_a_save_that_dies_at_any_moment_leaves_the_checkpoint_before_or_its_own(ranks, small):
    differ, found = ranks(1).run(saves_with_deaths, small(model={"layers": 1}))[0]
    assert differ
    assert all(is_right for *_, is_right in found)
    for replaces in (False, True):
        names = [name for each, _, name, _ in found if each == replaces]
        assert len(names) > 10, "the save must die many times"
        assert names[0] == names[1] == ("step-4" if replaces else "step-2")
        assert names[-1] == "step-4"
    fresh = [name for replaces, _, name, _ in found if not replaces]
    assert fresh == sorted(fresh), "once it is published it stays"


def to_format_1(path):
    """What version 0.1 wrote: AdamW's m and v beside the codes, and no `scale_every`."""
    from safetensors.torch import load_file, save_file

    from lowbit_dist.checkpoint.layout import sha256, sums_text

    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["format"] = 1
    for tensor in manifest["tensors"].values():
        tensor.pop("scale_every", None)
    for file, info in manifest["files"].items():
        held = load_file(path / file)
        old = {}
        for key, value in held.items():
            name, _, kind = key.partition("/")
            slot, _, scale = kind.removeprefix("slots/").partition("/")
            old[f"{name}/{slot}_{scale}" if scale else f"{name}/{slot}"] = value
        assert any(key.endswith("/v_scale") for key in old) and not any("slots" in key for key in old)
        save_file(old, path / file)
        info["bytes"] = (path / file).stat().st_size
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    sums = {file: sha256(path / file) for file in (*manifest["files"], checkpoint.MANIFEST)}
    (path / checkpoint.SUMS).write_text(sums_text(sums))


def test_a_checkpoint_of_format_1_resumes_exactly(ranks, small, tmp_path):
    configuration = small(train={"steps": 6, "save_every": 3, "eval_every": 6}, method={"granularity": "row"})
    expected = ranks(2).run(train, {**configuration, "run": {**configuration["run"], "name": "whole"}})[0]
    ranks(2).run(train, configuration, stop_at=3)
    to_format_1(tmp_path / "small" / "checkpoints" / "step-3")
    old = Checkpoint.open(tmp_path / "small" / "checkpoints" / "step-3")
    assert old.verify() == [] and old.tensor("model.layers.0.mlp.up_proj.weight").scale_every == 256
    assert ranks(2).run(train, configuration)[0]["digest"] == expected["digest"]
    assert json.loads((tmp_path / "small/checkpoints/step-6/manifest.json").read_text())["format"] == 2


def test_a_checkpoint_of_another_granularity_is_refused(run):
    opened = Checkpoint.open(checkpoint.latest(run))
    name = "model.layers.1.mlp.down_proj.weight"
    whole = opened.tensor(name)
    from lowbit_dist.zero import Shard

    shards = [
        Shard(n, opened.shape(n), 0, 0, [], grid=opened.grid(n), scale_every=128 if n == name else 10**9)
        for n in opened.names
    ]
    with pytest.raises(ConfigError, match="has a scale for each") as refused:
        opened.check_fits([shard for shard in shards if shard.name == name])
    assert f"{whole.numel:,} weights there, for each 128 here" in str(refused.value)


def test_a_checkpoint_of_another_model_or_grid_is_refused(run, ranks, small):
    for changes in ({"method": {"grid": "int4"}}, {"model": {"layers": 1}}):
        message = ranks(2).run(refusal, small(**changes))
        assert message[0] is not None and "is a checkpoint of another model" in message[0], message


def refusal(configuration):
    try:
        train(configuration)
    except ConfigError as error:
        return str(error)
    return None


def test_resolve_takes_a_name_a_run_folder_or_a_checkpoint(run, tmp_path):
    newest = run / "checkpoints" / "step-6"
    assert checkpoint.resolve("small", tmp_path) == newest
    assert checkpoint.resolve(run) == newest
    assert checkpoint.resolve(run / "checkpoints" / "step-4").name == "step-4"
    with pytest.raises(ConfigError, match="neither a run"):
        checkpoint.resolve("unknown", tmp_path)


def test_the_manifest_says_where_the_run_stands(run):
    manifest = json.loads((checkpoint.latest(run) / checkpoint.MANIFEST).read_text())
    assert manifest["step"] == 6
    assert manifest["samples"] == 6 * 4
    assert manifest["tokens"] == 6 * 4 * 64
    assert set(manifest["files"]) == {"shard-00000.safetensors", "shard-00001.safetensors"}
