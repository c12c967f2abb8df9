"""`layers.jsonl` against the totals of `metrics.jsonl`, and against the codes in the checkpoints."""

import json
import math
from pathlib import Path

import pytest

from lowbit_dist import configfile
from lowbit_dist.checkpoint import Checkpoint
from lowbit_dist.record import LAYERS, METRICS, rows_of
from lowbit_dist.statistics import SAMPLE_BLOCKS

STEPS = 6
MODEL = {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 4, "kv_heads": 2}
TRAIN = {
    "steps": STEPS, "log_every": 1, "eval_every": 99, "save_every": 1, "keep_last": 99, "reproducible": True
}  # fmt: skip


def train(configuration):
    from lowbit_dist import loop

    return loop.run(configfile.from_dict(configuration))


@pytest.fixture
def run(ranks, small, tmp_path):
    """`run(world, NAME, method={...})`: rows of the run's metrics and layers, and its folder."""

    def of(world, name, **sections):
        sections["train"] = {**TRAIN, **sections.get("train", {})}
        defaults = {"model": MODEL, "optimizer": {"lr": 0.02}, "schedule": {"name": "constant"}}
        content = small(run={"name": name}, **{**defaults, **sections})
        ranks(world).run(train, content)
        folder = Path(tmp_path) / name
        return rows_of(folder / METRICS), rows_of(folder / LAYERS), folder

    return of


def shapes(folder):
    checkpoint = Checkpoint.open(folder / f"checkpoints/step-{STEPS}")
    return {name: math.prod(checkpoint.shape(name)) for name in checkpoint.names}


WIDE = {**MODEL, "hidden_size": 256, "intermediate_size": 256, "layers": 1}
METHODS = {
    "dqt": ({"name": "dqt"}, MODEL),
    "all tensors": ({"name": "dqt", "grid": "int4", "tensors": "all"}, WIDE),
    "bitnet": ({"name": "bitnet"}, MODEL),
}


@pytest.mark.parametrize(("method", "model"), METHODS.values(), ids=METHODS)
def test_the_layers_add_up_to_the_totals(run, method, model):
    metrics, layers, folder = run(1, "one", method=method, model=model)
    numels = shapes(folder)
    assert [row["step"] for row in layers] == [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert any(row["flip_rate"] > 0 for row in metrics), "the case must flip some"
    for total, row in zip(metrics, layers, strict=True):
        of_layers = row["layers"]
        n = sum(numels[name] for name in of_layers)
        for metric in ("flip_rate", "zero_fraction", "saturation"):
            mean = sum(numels[name] * layer[metric] for name, layer in of_layers.items()) / n
            assert mean == pytest.approx(total[metric], rel=1e-12), metric
        squares = sum(layer["grad_norm"] ** 2 for layer in of_layers.values())
        if method.get("tensors") == "all":
            assert math.sqrt(squares) == pytest.approx(total["grad_norm"], rel=1e-6)
        else:
            assert 0 < math.sqrt(squares) < total["grad_norm"], "embeddings and norms have gradients, too"
        assert all(0 < layer["entropy"] <= 4 for layer in of_layers.values())
        # The entropy of a mixture is at least the mean of the parts'.
        assert (
            sum(numels[k] * layer["entropy"] for k, layer in of_layers.items()) / n
            <= total["entropy"] + 1e-12
        )


def test_numbers_of_a_layer_are_those_of_its_codes(run):
    """Counted from the checkpoints of every step; with no learning rate, the first codes stay."""
    _, layers, folder = run(1, "moves")
    _, still, first = run(1, "still", optimizer={"lr": 0.0}, train={"steps": 1})
    start = Checkpoint.open(first / "checkpoints/step-1")
    assert all(layer["flip_rate"] == layer["distance"] == 0 for layer in still[0]["layers"].values())

    def levels(checkpoint, name):
        return checkpoint.tensor(name).levels().flatten()

    names = list(layers[0]["layers"])
    assert len(names) == 14
    for name in names:
        before = origin = levels(start, name)
        assert origin.numel() <= 2 * SAMPLE_BLOCKS * 256, "the sample must be a good part of the layer"
        for row in layers:
            now, layer = (
                levels(Checkpoint.open(folder / f"checkpoints/step-{row['step']}"), name),
                row["layers"][name],
            )
            assert layer["flip_rate"] == (now != before).double().mean().item()
            assert layer["zero_fraction"] == (now == 0).double().mean().item()
            shares = now.unique(return_counts=True)[1].double() / now.numel()
            assert layer["entropy"] == pytest.approx(-(shares * shares.log2()).sum().item(), rel=1e-12)
            moved = (now.int() - origin.int()).abs().double()
            if now.numel() <= SAMPLE_BLOCKS * 256:
                assert layer["distance"] == moved.mean().item()
            else:
                assert layer["distance"] == pytest.approx(moved.mean().item(), abs=0.05)
            before = now


def test_they_are_the_same_on_any_number_of_workers_and_after_a_resume(run, ranks, small):
    alone = run(1, "alone")[1]
    run(2, "resumed", train={"steps": 4})
    resumed = run(2, "resumed")[1]
    assert [row["step"] for row in resumed] == [row["step"] for row in alone]
    for one, other in zip(alone, resumed, strict=True):
        assert list(one["layers"]) == list(other["layers"])
        for name, layer in one["layers"].items():
            norm = layer.pop("grad_norm")
            assert other["layers"][name].pop("grad_norm") == pytest.approx(norm, rel=1e-6)
            assert other["layers"][name] == layer


def test_a_method_without_levels_has_no_picture_of_flips_and_no_warning_of_one(run, caplog):
    from lowbit_dist import charts

    _, layers, folder = run(1, "dense", method={"name": "dense"}, optimizer={"states": "fp32"})
    assert layers, "it has the norms of its gradients"
    assert [file.name for file in charts.of_run(folder, "dense", None)] == ["loss.png"]
    assert not caplog.records


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradient_norms_are_those_of_any_stage(run, stage):
    """`dense` has no levels, and the norms of its linear layers."""
    shared = {"method": {"name": "dense"}, "optimizer": {"states": "fp32"}}
    split = {"zero": {"stage": stage}, "train": {"reproducible": stage == 3}}
    _, layers, _ = run(2, f"stage{stage}", **shared, **split)
    _, alone, _ = run(1, f"alone{stage}", **shared)
    for one, other in zip(alone, layers, strict=True):
        assert {key for layer in other["layers"].values() for key in layer} == {"grad_norm"}
        for name, layer in one["layers"].items():
            assert other["layers"][name]["grad_norm"] == pytest.approx(layer["grad_norm"], rel=1e-3)


def test_they_are_drawn(run, lowbit, tmp_path):
    from lowbit_dist import charts

    _, layers, folder = run(1, "drawn")
    charts.layer_heat(layers, tmp_path / "heat.png")
    assert (tmp_path / "heat.png").stat().st_size > 5000
    shown = lowbit("watch", folder, "--once", "--layers").stdout
    assert "layers.1.mlp.down_proj" in shown and "flip rate of each layer" in shown
    found = json.loads(lowbit("watch", folder, "--layers", "--json").stdout)
    name = "model.layers.1.mlp.down_proj.weight"
    assert found["layers"][name] == [row["layers"][name]["flip_rate"] for row in layers]
    out = tmp_path / "compared"
    assert lowbit("compare", folder, "--out", out).returncode == 0
    assert (out / "flips-per-layer.png").stat().st_size > 5000
