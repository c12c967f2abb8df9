"""Sweeps: what a file defines, what is wrong with others, and one that is interrupted and goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowbit_dist import configfile, inputs, naming, runs
from lowbit_dist import sweep as sweeping
from lowbit_dist.cluster import checks, jobs
from lowbit_dist.config import ConfigError
from lowbit_dist.methods import METHODS
from lowbit_dist.sweep import running
from lowbit_dist.tracking import Parent, catch_up

BASE = "data: {path: data}\nrun: {name: base}\ntrain: {steps: 10}\n"
SMALL = "sweep: {name: s}\nbase: base.yaml\n"
# For a process that has joined a Ray: how many fit at once is asked of none.
ONE_AT_A_TIME = "sweep: {name: s, at_once: 1}\nbase: base.yaml\n"


@pytest.fixture
def load(tmp_path):
    def from_text(text, base=BASE):
        (tmp_path / "base.yaml").write_text(base)
        (tmp_path / "sweep.yaml").write_text(text)
        return sweeping.load(tmp_path / "sweep.yaml")

    return from_text


# ------------------------------------------------------------------ what a file defines


def test_each_label_has_a_child_for_each_seed(load):
    sweep = load(
        SMALL + "seeds: [3, 5]\nset: [train.steps=20]\nruns:\n"
        "  dense: {method: {name: dense}, optimizer.states: fp32}\n"
        "  fine: [method.grid=int8, optimizer.lr=2e-3, train.steps=30]\n"
    )
    assert sweep.folder == Path("runs/s")
    assert [child.name for child in sweep.children] == [
        "dense-seed3", "dense-seed5", "fine-seed3", "fine-seed5",
    ]  # fmt: skip
    expected = {
        "run": {"name": "fine-seed5", "seed": 5, "dir": "runs/s"},
        "data": {"path": "data"},
        "method": {"name": "dqt", "grid": "int8"},
        "optimizer": {"lr": 2e-3},
        "train": {"steps": 30},
    }
    assert sweep.children[3].config == configfile.from_dict(expected)
    dense = sweep.children[0].config
    assert (dense.method.name, dense.optimizer.states, dense.train.steps) == ("dense", "fp32", 20)


def test_a_grid_is_every_combination_of_its_values_under_each_label(load):
    grid = "grid: {optimizer.lr: [1.0e-3, 4.0e-3], method.grid: [ternary, int8]}\n"
    names = ["lr-0.001-grid-ternary", "lr-0.001-grid-int8", "lr-0.004-grid-ternary", "lr-0.004-grid-int8"]
    alone = load(SMALL + grid)
    assert [child.label for child in alone.children] == names
    lr_and_grid = [(each.config.optimizer.lr, each.config.method.grid) for each in alone.children]
    assert lr_and_grid == [(1e-3, "ternary"), (1e-3, "int8"), (4e-3, "ternary"), (4e-3, "int8")]
    both = load(SMALL + grid + "runs: {a: {precision: fp32}, b: {}}\n")
    assert [each.label for each in both.children] == [f"{label}-{name}" for label in "ab" for name in names]
    assert [each.config.precision.compute for each in both.children] == ["fp32"] * 4 + ["bf16"] * 4


@pytest.mark.parametrize(
    ("grid", "labels"),
    [
        ("method: [{name: dense}, {name: dqt, grid: int8}]", ["method-dense", "method-dqt-int8"]),
        ("train.clip_norm: [0, 0.5]", ["clip_norm-0", "clip_norm-0.5"]),
        ("train.keep_every: [null, 100]", ["keep_every-null", "keep_every-100"]),
        (
            "{schedule.name: [linear], optimizer.name: [adamw]}",
            ["schedule-name-linear-optimizer-name-adamw"],
        ),
        ("data.path: ['s3://a/b', data/c]", ["path-s3-a-b", "path-data-c"]),
    ],
)
def test_labels_of_a_grid_are_made_of_its_values(grid, labels, load):
    text = grid if grid.startswith("{") else f"{{{grid}}}"
    assert [child.label for child in load(SMALL + f"grid: {text}\n").children] == labels


def test_points_whose_words_are_too_long_for_a_name_end_in_a_digest_of_them(load):
    grid = "train.max_grad_ratio: [1000, 2000], optimizer.linear_lr_ratio: [0.5], schedule.warmup_steps: [3]"
    grid += ", schedule.min_lr_ratio: [0.25], optimizer.weight_decay: [0.125], train.clip_norm: [0.75]"
    names = [
        child.name for child in load(SMALL + f"grid: {{{grid}}}\nseeds: [9223372036854775807]\n").children
    ]
    assert len(set(names)) == 2 and all(len(name) == 74 + len("-seed9223372036854775807") for name in names)
    assert names[0].startswith("max_grad_ratio-1000-linear_lr_ratio-0.5-warmup_steps-3")


def test_each_child_may_start_from_a_run_of_its_own(load):
    runs = "runs: {tail: {run.from: long@6, run.with_states: true}, whole: {}}\n"
    tail, whole = load(SMALL + runs).children
    assert (tail.config.run.parent, tail.config.run.with_states) == ("long@6", True)
    assert whole.config.run.parent is None
    grid = load(SMALL + "grid: {run.from: [long@4, long@6]}\n")
    assert [(child.label, child.config.run.parent) for child in grid.children] == [
        ("from-long-4", "long@4"), ("from-long-6", "long@6"),
    ]  # fmt: skip


def test_a_label_may_have_seeds_and_a_grid_of_its_own(load):
    text = "grid: {optimizer.lr: [1.0e-3, 4.0e-3]}\nseeds: [0, 1]\nruns:\n  a: {seeds: [5]}\n"
    sweep = load(
        SMALL + text + "  b: {grid: {precision: [fp32]}, train.steps: 4}\n  c: {grid: {}, seeds: [0]}\n"
    )
    assert [child.name for child in sweep.children] == [
        "a-lr-0.001-seed5", "a-lr-0.004-seed5", "b-precision-fp32-seed0", "b-precision-fp32-seed1", "c-seed0",
    ]  # fmt: skip
    assert [child.config.train.steps for child in sweep.children] == [10, 10, 4, 4, 10]


def test_seeds_alone_repeat_the_base(load):
    assert [child.name for child in load(SMALL + "seeds: [0, 1]\n").children] == ["base-seed0", "base-seed1"]
    assert [child.name for child in load(SMALL).children] == ["base-seed0"]


def test_the_example_is_a_sweep_of_eight_runs():
    file = Path(__file__).parent.parent / "configs" / "sweep-methods.yaml"
    children = sweeping.load(file).children
    assert [child.name for child in children] == [
        f"{label}-seed{seed}" for label in ("dense", "bitnet", "dqt-int8", "dqt-ternary") for seed in (0, 1)
    ]


def test_the_study_has_every_method_and_searches_both_rates():
    search = sweeping.load(Path(__file__).parent.parent / "configs" / "sweeps" / "study.yaml")
    assert {child.config.method.name for child in search.children} == {*METHODS}
    assert all(child.config.train.steps * 5 == 1250 for child in search.children)
    for label in ("dense", "flip"):
        chosen = [
            child.config.optimizer for child in search.children if child.label.startswith(f"{label}-lr")
        ]
        assert len({optimizer.lr for optimizer in chosen}) == 2
        assert len({optimizer.linear_lr_ratio for optimizer in chosen}) == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "sweep.name is required in"),
        ("sweep: {name: s}", "base is required in"),
        ("sweep: {name: s}\nbase: absent.yaml", "base (absent.yaml) does not exist beside"),
        ("sweep: {name: 'a b'}\nbase: base.yaml", "sweep.name ('a b') must be at most 100 letters"),
        ("sweep: {name: s, at_onec: 2}\nbase: base.yaml", "unknown name 'at_onec'; did you mean 'at_once'?"),
        ("sweep: {name: s, at_once: 0}\nbase: base.yaml", "sweep.at_once (0) must be auto"),
        (SMALL + "sedes: [1]", "unknown name 'sedes'; did you mean 'seeds'?"),
        (SMALL + "seeds: 3", "seeds (3) must be different whole numbers from 0 up; write [0, 1]"),
        (SMALL + "seeds: [1, 1]", "seeds ([1, 1]) must be different whole numbers"),
        (SMALL + "seeds: [true]", "seeds ([True]) must be different whole numbers"),
        (SMALL + "set: {run.seed: 4}", "must not set run: a child's name, seed and folder are the sweep's"),
        (SMALL + "set: {run.from_: a}", "must not set run: a child's name, seed and folder"),
        (SMALL + "set: {run: {from: a}}", "must not set run: a child's name, seed and folder"),
        (SMALL + "set: {run: {from: x}}", "must not set run: a child's name, seed and folder"),
        (SMALL + "set: ['run . name=x']", "must not set run: a child's name, seed and folder"),
        (SMALL + "set: [train.steps]", "must be overrides; write {train.steps: 20}"),
        (SMALL + "runs: [a, b]", "runs (['a', 'b']) must be labels with overrides"),
        (SMALL + "runs: {a: 5}", "runs.a (5) must be overrides; write"),
        (SMALL + "runs: {'a b': {}}", "runs.a b ('a b') must be at most 100 letters"),
        (SMALL + "runs: {a: {train.stpes: 3}}", "a: train: unknown name 'stpes'; did you mean 'steps'?"),
        (SMALL + "runs: {a: {optimizer.lr: big}}", "a: optimizer.lr ('big') must be a number"),
        (SMALL + "runs: {a: {}, b: {train.steps: 10}}", "a and b are the same run; change one"),
        (SMALL + "grid: {optimizer.lr: 0.1}", "must give optimizer.lr a list of values; write"),
        (SMALL + "grid: {optimizer.lr: []}", "must give optimizer.lr a list of values"),
        (SMALL + "grid: {optimizer.lr: [0.1, 0.1]}", "grid has two points that are called lr-0.1; leave"),
        (SMALL + "grid: {run.seed: [0, 1]}", "must not set run: a child's name, seed"),
        (SMALL + "grid: [1]", "grid ([1]) must be fields with lists of values"),
        (SMALL + "runs: {a: {seeds: 3}}", "runs.a.seeds (3) must be different whole numbers from 0 up"),
        (SMALL + "runs: {a: {grid: {optimizer.lr: 1}}}", "must give optimizer.lr a list of values"),
        (SMALL + "grid: {optimizer.lr: []}", "a list of values; write {optimizer.lr: [0.001, 0.004]}"),
        (SMALL + "runs: {1: {}, '1': {}}", "must be labels that differ as words"),
        (SMALL + "search: {train.steps: 2}", "search must go with a grid, whose points it tries; write"),
        (SMALL + "grid: {optimizer.lr: [0.1]}\nsearch: 3", "search (3) must be overrides; write"),
        (SMALL + "grid: {optimizer.lr: [0.1]}\nsearch: {train.stpes: 3}", "unknown name 'stpes'"),
        (SMALL + "grid: {method.grid: [ternary, int9]}", "grid-int9: method.grid ('int9') must be one of"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_is_answered_in_one_line(text, words, load):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ a search


SEARCH = SMALL + "seeds: [3, 5]\nsearch: {train.steps: 2}\n"
RATES = "grid: {optimizer.lr: [1.0e-3, 2.0e-3, 4.0e-3], method.grid: [ternary, int8]}\n"


def finish(child, val_loss):
    """The folder of a child, as training leaves it."""
    child.config.run_dir.mkdir(parents=True, exist_ok=True)
    (child.config.run_dir / "config.yaml").write_text(child.config.to_yaml())
    summary = {"steps": child.config.train.steps, "val_loss": val_loss}
    (child.config.run_dir / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def searched(load, tmp_path, monkeypatch):
    """`searched(text, loss)`: the sweeps of a file, of which each run ends at `loss(child)`, if at all."""
    monkeypatch.chdir(tmp_path)

    def run(text, loss):
        load(text)
        stages = []
        for stage in sweeping.stages(tmp_path / "sweep.yaml"):
            stages.append(stage)
            for child in stage.children:
                if (val_loss := loss(child)) is not None:
                    finish(child, val_loss)
        return stages

    return run


def test_a_search_finds_each_labels_point_and_that_alone_is_trained_with_all_seeds(searched):
    def loss(child):
        best = {"a": 2e-3, "b": 4e-4}[child.label[0]]
        return abs(child.config.optimizer.lr - best) + (child.config.method.grid == "ternary")

    own = "  b: {train.clip_norm: 0, grid: {optimizer.lr: [8.0e-4, 4.0e-4, 2.0e-4]}, seeds: [4]}\n"
    text = SEARCH + RATES + "runs:\n  a: {}\n" + own + "  c: {grid: {}}\n"
    search, final = searched(text, lambda child: 9.0 if child.label == "c" else loss(child))
    assert (search.name, search.folder, final.name) == ("s-search", Path("runs/s-search"), "s")
    assert [child.name for child in search.children] == [
        *(f"a-lr-{lr}-grid-{grid}-seed3" for lr in (0.001, 0.002, 0.004) for grid in ("ternary", "int8")),
        *(f"b-lr-{lr}-seed4" for lr in ("0.0008", "0.0004", "0.0002")),
    ]
    assert {child.config.train.steps for child in search.children} == {2}
    assert [child.name for child in final.children] == [
        "a-seed3", "a-seed5", "b-seed4", "c-seed3", "c-seed5",
    ]  # fmt: skip
    a, _, b, c, _ = (child.config for child in final.children)
    assert (a.optimizer.lr, a.method.grid, a.train.steps) == (2e-3, "int8", 10)
    assert (b.optimizer.lr, b.train.clip_norm, c.optimizer.lr) == (4e-4, 0, 1e-3)
    assert final.remarks == ("a is best at lr-0.002, grid-int8", "b is best at lr-0.0004")


def test_a_search_grows_where_its_best_is_an_end_and_finished_runs_are_not_tried_again(searched):
    best = {"low": 2.5e-4, "high": 1.6e-2}
    text = SEARCH + RATES.replace(", int8", "") + "runs: {low: {}, high: {train.clip_norm: 0.5}}\n"
    stages = searched(
        text, lambda child: abs(child.config.optimizer.lr / best[child.label.partition("-")[0]] - 1)
    )
    assert [len(stage.children) for stage in stages] == [6, 8, 10, 12, 4]
    rates = [child.config.optimizer.lr for child in stages[3].children]
    assert rates == [1e-3, 2e-3, 4e-3, 5e-4, 2.5e-4, 1.25e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
    assert stages[1].remarks == (
        "low: the best optimizer.lr is an end of its grid, which gets 0.0005, too",
        "high: the best optimizer.lr is an end of its grid, which gets 0.008, too",
    )
    assert [child.config.optimizer.lr for child in stages[-1].children] == [2.5e-4] * 2 + [1.6e-2] * 2
    again = searched(text, lambda child: None)
    assert [len(stage.children) for stage in again] == [6, 8, 10, 12, 4], "what is found is in the runs"


def test_a_search_that_would_grow_for_ever_ends_and_says_so(searched):
    stages = searched(SEARCH + RATES, lambda child: 1 / child.config.optimizer.lr)
    assert [len(stage.children) for stage in stages] == [6, 8, 10, 12, 14, 2]
    assert stages[-1].remarks == (
        "it is best at lr-0.064, grid-ternary; that is still an end of the grid: write wider values",
    )


@pytest.mark.parametrize("values", ["[1.0e-3, 4.0e-3]", "[1, 2, 4]", "[0, 0.1, 0.2]"])
def test_what_has_no_next_value_does_not_grow(values, searched):
    name = "optimizer.lr" if "e" in values else "train.clip_norm"
    stages = searched(SEARCH + f"grid: {{{name}: {values}}}\n", lambda child: -child.config.train.clip_norm)
    assert len(stages) == 2


def test_a_run_without_a_loss_is_never_the_best(searched):
    def loss(child):
        return {1e-3: None, 2e-3: 3.0, 4e-3: 4.0}[child.config.optimizer.lr]

    grid = "grid: {optimizer.lr: [1.0e-3, 4.0e-3]}\nruns: {a: {}}\n"
    assert searched(SEARCH + grid, loss)[-1].children[0].config.optimizer.lr == 4e-3
    other = "grid: {optimizer.lr: [1.0e-3]}\nruns: {b: {}}\n"
    with pytest.raises(ConfigError, match=r"none of the 1 runs of b's search has a validation loss; `lowbit"):
        searched(SEARCH + other, loss)


def test_a_search_does_not_grow_beyond_what_a_field_may_have(searched):
    grid = "grid: {schedule.min_lr_ratio: [0.25, 0.5, 1.0]}\n"
    search, final = searched(SEARCH + grid, lambda child: -child.config.schedule.min_lr_ratio)
    assert len(search.children) == 3
    assert {child.config.schedule.min_lr_ratio for child in final.children} == {1.0}


def test_two_labels_that_become_one_run_are_trained_once(searched):
    runs_of_two = "runs: {tuned: {grid: {optimizer.lr: [1.0e-3, 1.0e-4]}}, default: {optimizer.lr: 1.0e-3}}\n"
    *_, final = searched(SEARCH + runs_of_two, lambda child: -child.config.optimizer.lr)
    assert [child.name for child in final.children] == ["tuned-seed3", "tuned-seed5"]
    assert final.remarks[-1] == "default is what tuned is: it is trained once, as tuned"


def test_a_search_that_is_not_complete_decides_nothing(searched, monkeypatch, lowbit, tmp_path):
    """With a run that died, the command ends after the search; what it found so far is kept."""
    searched(SEARCH + "grid: {optimizer.lr: [1.0e-3, 4.0e-3]}\n", lambda child: 3.0)
    asked, recurs = [], False

    def one_died(sweep, progress):
        asked.append(sweep.name)
        states = {child.name: "finished" for child in sweep.children} | {sweep.children[0].name: "failed"}
        why = {sweep.children[0].name: "its process died"}
        files, diverged = [tmp_path / "comparison.md"], frozenset(why if recurs else ())
        return running.SweepResult(states, why, None, {"groups": []}, files, None, diverged)

    monkeypatch.setattr(sweeping, "run", one_died)
    result = lowbit("sweep", str(tmp_path / "sweep.yaml"), "--json")
    assert result.returncode == 1 and asked == ["s-search"]
    assert json.loads(result.stdout)["children"][0]["why"] == "its process died"
    assert "s-search is not complete; the same command goes on with it" in result.stderr
    recurs = True  # it diverges: that is a result, of a point that is not the best
    assert lowbit("sweep", str(tmp_path / "sweep.yaml"), "--json").returncode == 1
    assert asked == ["s-search", "s-search", "s"]


def test_a_comparison_that_cannot_be_written_is_said_and_leaves_the_sweep_unfinished(tmp_path):
    class Said(list):
        say = list.append

    said = Said()
    (tmp_path / "comparison").touch()
    assert running._written({"groups": []}, tmp_path / "comparison", said) == []
    assert said == [f"the comparison cannot be written into {tmp_path / 'comparison'} (File exists)"]
    assert not running.SweepResult({"a": "finished"}, {}, None, {}, [], None).is_complete


def test_a_sweep_and_a_run_do_not_share_a_name(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = load(SMALL)
    Path("runs/s").mkdir(parents=True)
    Path("runs/s/config.yaml").write_text(sweep.children[0].config.to_yaml())
    with pytest.raises(ConfigError, match=r"sweep.name \(s\) is a run's: runs/s; write another name"):
        sweeping.run(sweep, None)
    shutil.rmtree("runs/s")
    Path("runs/s", naming.CHILDREN).mkdir(parents=True)
    config = configfile.from_dict({"run": {"name": "s"}, "data": {"path": "data"}})
    with pytest.raises(ConfigError, match=r"run.name \(s\) is a sweep's: runs/s; write another name"):
        checks.check_run(config)


@pytest.mark.slow  # what is new to it, the stages, is told above without training; children train below
def test_a_search_and_the_runs_at_its_best_are_one_command(small, ray, lowbit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = {"steps": 8, "batch_tokens": 256, "log_every": 2, "eval_every": 8, "save_every": 8}
    content = small(train=train, cluster={"workers": 1}, tracking={"mlflow": None})
    (tmp_path / "base.yaml").write_text(json.dumps(content))
    file = tmp_path / "sweep.yaml"
    grid = "grid: {optimizer.lr: [0.0, 1.0e-2]}\nruns: {a: {}}\n"
    file.write_text(ONE_AT_A_TIME + "search: {train.steps: 4}\n" + grid)
    done = lowbit("sweep", file, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert [(child["run"], child["state"]) for child in summary["children"]] == [("a-seed0", "finished")]
    assert summary["remarks"] == ["a is best at lr-0.01"], "a rate of 0 learns nothing"
    assert [group["lr"] for group in summary["groups"]] == [0.01]
    assert "s-search: 2 runs to do, 0 finished" in done.stderr
    assert (tmp_path / "runs" / "s-search" / "comparison" / "comparison.md").exists()
    assert [runs.read(tmp_path / "runs" / name).step for name in ("s-search/a-lr-0-seed0", "s/a-seed0")] == [
        4,
        8,
    ]


def test_no_child_starts_if_one_cannot(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(json.dumps(small(cluster={"workers": 1})))
    (tmp_path / "sweep.yaml").write_text(SMALL + "runs: {a: {}, b: {data.path: absent}}")
    with pytest.raises(ConfigError, match=r"b-seed0: data.path \(absent\) does not exist"):
        running.run(sweeping.load(tmp_path / "sweep.yaml"), Told())
    assert not (tmp_path / "runs" / "s").exists(), "nothing is left behind"


def test_children_start_from_runs_beside_their_sweep(ranks, small, tmp_path, monkeypatch):
    from test_train import train

    every = {"steps": 4, "save_every": 2, "eval_every": 4}
    ranks(1).run(train, small(run={"name": "parent", "dir": str(tmp_path / "runs")}, train=every))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(json.dumps(small(run={"name": "base", "from": "parent"})))
    text = SMALL + "runs: {last: {}, middle: {run.from: parent@2, run.with_states: true}}\n"
    (tmp_path / "sweep.yaml").write_text(text)
    last, middle = (child.config for child in sweeping.load(tmp_path / "sweep.yaml").children)
    assert (inputs.parent(last).name, last.run.with_states) == ("step-4", False)
    assert (inputs.parent(middle).name, middle.run.with_states) == ("step-2", True)


# ------------------------------------------------------------------ how many at once


@pytest.mark.parametrize(
    ("cluster", "cpus", "gpus", "n"),
    [
        ({"workers": 2}, 8, 0, 4),
        ({"workers": 2}, 7, 0, 3),
        ({"workers": 4}, 2, 0, 0),
        ({"workers": 2, "cpus_per_worker": 0.1}, 0.6, 0, 3),
        ({"workers": 2}, 64, 4, 2),
        ({"workers": 2, "gpus_per_worker": 1}, 64, 5, 2),
        ({"workers": 2, "gpus_per_worker": 0}, 8, 4, 4),
    ],
)
def test_as_many_children_run_at_once_as_find_processors(cluster, cpus, gpus, n, small):
    config = configfile.from_dict(small(cluster=cluster, train={"batch_tokens": 512}))
    assert running._how_many_at_once(config, cpus, gpus) == n


# ------------------------------------------------------------------ MLflow


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


def client(store):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{store}")


def test_a_parent_adopts_its_children_and_carries_the_comparison(store, tmp_path):
    parent = Parent(f"sqlite:///{store}", "sweeps", "methods", tmp_path)
    (tmp_path / "comparison.md").write_text("| a |")
    assert parent.finish("KILLED", [], "half of it")
    experiment = client(store).get_experiment_by_name("sweeps").experiment_id
    child = client(store).create_run(experiment)

    again = Parent(f"sqlite:///{store}", "sweeps", "methods", tmp_path)
    deadline = time.monotonic() + 30
    while client(store).get_run(parent.run_id).info.status != "RUNNING":
        assert time.monotonic() < deadline, "the sweep goes on, and its run does not say so"
        time.sleep(0.1)
    again.adopt(child.info.run_id, {"label": "dense", "seed": "1"})
    again.adopt("f" * 32, {})  # of a store that was deleted: nothing waits for it
    assert again.finish("FINISHED", [tmp_path / "comparison.md"], "all of it")
    assert again.run_id == parent.run_id
    run = client(store).get_run(parent.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "methods"
    assert run.data.tags["mlflow.note.content"] == "all of it"
    assert [each.path for each in client(store).list_artifacts(parent.run_id)] == ["comparison.md"]
    tags = client(store).get_run(child.info.run_id).data.tags
    assert tags.items() >= {"mlflow.parentRunId": parent.run_id, "label": "dense", "seed": "1"}.items()


def test_a_parent_whose_server_is_down_keeps_nobody_waiting_and_comes_later(store, tmp_path):
    begun = time.monotonic()
    parent = Parent("http://127.0.0.1:9", "sweeps", "late", tmp_path)
    parent.adopt("f" * 32, {})
    assert time.monotonic() - begun < 1
    assert not parent.finish("FINISHED", [], "")
    assert parent.run_id is None
    assert not (tmp_path / ".mlflow_run_id").exists()
    again = Parent(f"sqlite:///{store}", "sweeps", "late", tmp_path)
    assert again.finish("FINISHED", [], "")
    assert (tmp_path / ".mlflow_run_id").read_text() == again.run_id
    assert client(store).get_run(again.run_id).info.status == "FINISHED"


# ------------------------------------------------------------------ a sweep, interrupted


class Told:
    """Remembers what it is told; `at(child, row)` is called with each row."""

    def __init__(self, at=lambda child, row: None):
        self.said, self.begun, self.ended, self.at = [], [], {}, at

    def say(self, text):
        self.said.append(text)

    def begins(self, child):
        self.begun.append(child.name)

    def row(self, child, row):
        self.at(child, row)

    def ends(self, child, state, why):
        self.ended[child.name] = (state, why)


@pytest.mark.integration
def test_a_child_ends_when_its_sweep_has_gone(small, tmp_path):
    config = tmp_path / "child.yaml"
    config.write_text(json.dumps(small(cluster={"workers": 1})))
    command = [sys.executable, "-m", "lowbit_dist.sweep.child", str(config)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode in (128 + signal.SIGTERM, -signal.SIGTERM), done.stdout
    assert not (tmp_path / "small" / "summary.json").exists()


def test_a_sweep_runs_once_at_a_time(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(json.dumps(small(cluster={"workers": 1})))
    (tmp_path / "sweep.yaml").write_text(SMALL)
    sweep = sweeping.load(tmp_path / "sweep.yaml")
    sweep.folder.mkdir(parents=True)
    with running._alone(sweep), pytest.raises(ConfigError, match=r"sweep.name \(s\) is being run by another"):
        running.run(sweep, Told())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("has_begun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_interrupted_sweep_goes_on_and_a_child_that_fails_stops_no_other(
    has_begun, small, store, corpus, ray, ranks, tmp_path, monkeypatch, lowbit
):
    """Interrupted while its last child resumes, or, in a start of Ray more, while that trains."""
    from test_train import train as train_here

    monkeypatch.chdir(tmp_path)
    train = {"steps": 12, "batch_tokens": 256, "log_every": 2, "eval_every": 12, "save_every": 12}
    tracking = {"mlflow": f"sqlite:///{store}", "experiment": "sweeps"}
    base = small(train=train, cluster={"workers": 1}, tracking=tracking)
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    file = tmp_path / "sweep.yaml"
    start = "sweep: {name: s, at_once: 1}\nbase: base.yaml\nruns:\n"
    kept = "  first: {}\n  last: {method.grid: int8, train.steps: 120, train.eval_every: 120}\n"
    shutil.copytree(corpus, tmp_path / "gone")
    file.write_text(start + "  lost: {data.path: gone}\n" + kept)
    # One that has ended, and of which MLflow does not know.
    first, last = (jobs.absolute(child.config) for child in sweeping.load(file).children[1:])
    (summary,) = ranks(1).run(train_here, first.to_dict())
    if not has_begun:
        ranks(1).run(train_here, last.to_dict(), stop_at=12)

    class Interrupting(Told):
        def begins(self, child):
            super().begins(child)
            if child.label == "lost":  # it was there when the children were checked
                shutil.rmtree(tmp_path / "gone")
            elif not has_begun:
                os.kill(os.getpid(), signal.SIGTERM)

        def row(self, child, row):
            if has_begun and child.label == "last" and row["step"] == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    told = Interrupting()
    outcome = running.run(sweeping.load(file), told)
    assert told.begun == ["lost-seed0", "last-seed0"]
    assert outcome.signum == signal.SIGTERM
    assert outcome.states == {"lost-seed0": "failed", "first-seed0": "finished", "last-seed0": "stopped"}
    assert list(outcome.why) == ["lost-seed0"]
    assert "data.path (gone) does not exist" in outcome.why["lost-seed0"]
    assert [group["group"] for group in outcome.comparison["groups"]] == ["first", "last"]
    assert client(store).get_run(outcome.mlflow_run_id).info.status == "KILLED"
    folder = tmp_path / "runs" / "s"
    stopped = runs.read(folder / "last-seed0")
    assert stopped.state == "stopped"
    assert 4 <= stopped.step < 120 if has_begun else stopped.step == 12
    before = (folder / "first-seed0" / "summary.json").stat()

    file.write_text(start + kept.replace("120", "160"))  # another number of steps is another run
    with pytest.raises(ConfigError, match=r"(?s)last-seed0.*train\.steps: 120 -> 160"):
        running.run(sweeping.load(file), told)

    assert catch_up(first, summary)
    forgotten = (folder / "first-seed0" / ".mlflow_run_id").read_text()  # MLflow was down when it ended
    (folder / "first-seed0" / ".tracked").unlink()
    client(store).update_run(forgotten, status="RUNNING")
    file.write_text(start + kept)
    done = lowbit("sweep", file, "--json")
    assert done.returncode == 0, done.stderr
    assert "first-seed0 starts" not in done.stderr
    assert "last-seed0 starts" in done.stderr
    found = json.loads(done.stdout)
    assert [child["state"] for child in found["children"]] == ["finished", "finished"]
    assert [group["finished"] for group in found["groups"]] == [1, 1]
    after = (folder / "first-seed0" / "summary.json").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino), "it was not run again"
    rows = runs.read(folder / "last-seed0").rows
    assert [row["step"] for row in rows] == list(range(2, 121, 2))

    assert found["mlflow_run_id"] == outcome.mlflow_run_id
    parent = client(store).get_run(found["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    assert "| first | 1 |" in parent.data.tags["mlflow.note.content"]
    assert {each.path for each in client(store).list_artifacts(parent.info.run_id)} == {
        "sweep.yaml", "comparison.md", "comparison.csv", "loss-against-tokens.png", "loss-against-bytes.png",
        "loss-against-bytes-of-weights.png", "loss-against-bytes-with-states.png", "flips-per-layer.png",
    }  # fmt: skip
    children = client(store).search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert {(each.data.tags["label"], each.data.tags["seed"], each.info.status) for each in children} == {
        ("first", "0", "FINISHED"),
        ("last", "0", "FINISHED"),
    }
