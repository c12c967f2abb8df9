"""First values: each made once, by one worker for all, and none where a checkpoint has others."""

from pathlib import Path
from weakref import ref

import pytest
import torch
from cases import slow

from lowbit_dist import configfile
from lowbit_dist.record import LAYERS, rows_of
from lowbit_dist.statistics import FIRST_LEVELS


def made(configuration):
    """A run, and what this worker makes of first values: name -> elements, and the heartbeats until then."""
    from unittest.mock import patch

    from lowbit_dist import loop, model

    numels, beats, values, draw = {}, [], [], model.InitialWeights.__call__

    def drawn(self, name, shape, room):
        assert name not in numels
        assert all(value() is None for value in values), "one tensor in full precision is there already"
        value = draw(self, name, shape, room)
        numels[name] = value.numel()
        values.append(ref(value))
        return value

    def heartbeat(phase, step, memory=None):
        beats.append((phase, step))

    with patch.object(model.InitialWeights, "__call__", drawn):
        loop.run(configfile.from_dict(configuration), heartbeat=heartbeat)
    return numels, beats[: beats.index(("start", 1))] if ("start", 1) in beats else beats


def run(ranks, world, content, steps):
    content = {
        **content,
        "train": {**content["train"], "steps": steps, "log_every": 1, "save_every": 2, "eval_every": 99},
    }
    return ranks(world).run(made, content)


@pytest.fixture
def content(small):
    return small(schedule={"name": "constant"}, optimizer={"lr": 0.02})


def layers(content):
    return rows_of(Path(content["run"]["dir"]) / content["run"]["name"] / LAYERS)


@pytest.mark.parametrize("world", [2, 3])
def test_each_tensor_is_made_by_one_worker_and_none_where_a_checkpoint_is(world, ranks, content):
    content["train"]["batch_tokens"], content["cluster"] = 2 * 64 * world, {"workers": world}
    workers = run(ranks, world, content, steps=2)
    names = [name for numels, _ in workers for name in numels]
    assert len(names) == len(set(names)) == 2 * 9 + 3
    sizes = [sum(numels.values()) for numels, _ in workers]
    assert max(sizes) <= sum(sizes) / world + 512 * 256, "they differ by less than the largest tensor"
    for _, beats in workers:
        assert beats == [("start", 0)] * len(beats)
        assert len(beats) >= len(names) / world
    assert [numels for numels, _ in run(ranks, world, content, steps=4)] == [{}] * world
    assert all(
        layer["distance"] > 0 for layer in layers(content)[-1]["layers"].values() if "distance" in layer
    )


@pytest.mark.parametrize("damage", ["damaged", *slow(("gone",), ("of another model",))])
def test_first_levels_that_a_folder_lacks_are_drawn_again(damage, ranks, content):
    from safetensors.torch import save_file

    run(ranks, 2, content, steps=4)
    expected = layers(content)
    again = {**content, "run": {**content["run"], "name": "again"}}
    run(ranks, 2, again, steps=2)
    file = Path(content["run"]["dir"]) / "again" / FIRST_LEVELS
    if damage == "gone":
        file.unlink()
    elif damage == "damaged":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        save_file({"ternary/model.layers.0.mlp.up_proj.weight": torch.zeros(5, dtype=torch.int8)}, file)
    workers = run(ranks, 2, again, steps=4)
    assert sum(len(numels) for numels, _ in workers) == 2 * 9 + 3
    assert [row["layers"] for row in layers(again)] == [row["layers"] for row in expected]
    assert all(numels == {} for numels, _ in run(ranks, 2, again, steps=4)), "they are kept then"


def test_a_run_from_another_begins_with_its_levels_and_draws_none(ranks, content):
    run(ranks, 1, content, steps=2)
    child = {**content, "run": {**content["run"], "name": "child", "from": "small"}, "optimizer": {"lr": 0.0}}
    assert run(ranks, 2, child, steps=2)[0][0] == {}
    of_layers = [layer for row in layers(child) for layer in row["layers"].values()]
    assert [layer["distance"] for layer in of_layers] == [0] * 28


@pytest.mark.parametrize("shape", [(5,), (3, 5), (16, 1024), (16387, 1), (3, 16384), (128, 259), (7, 4099)])
def test_a_tensor_that_is_drawn_in_parts_has_the_numbers_of_one_call(shape, monkeypatch):
    from lowbit_dist import model
    from lowbit_dist.methods import Dense

    def drawn():
        return model.InitialWeights(torch.nn.Linear(2, 2), Dense(), 3, None)(
            "a.weight", torch.Size((*shape, 1))
        )

    in_parts = drawn()
    monkeypatch.setattr(model, "DRAWN", 2**30)
    assert torch.equal(in_parts, drawn())
