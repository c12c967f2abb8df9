"""Runs side by side: what is found in their folders, what is averaged, and what is drawn."""

import csv
import fcntl
import json
import threading
import time

import pytest

from lowbit_dist import charts, compare, configfile, runs
from lowbit_dist.cluster.attempts import RunFailed
from lowbit_dist.config import ConfigError

PARTS = ("low_bit_weights", "scales", "other_weights", "gradients", "optimizer_states", "buffers")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make(place):
    """`make("runs/a", seed=1, val_loss=4.0, ...)`: the folder of a run, as training leaves it."""

    def folder_of_run(name, *, seed=0, val_loss=None, steps=40, rows=(), bytes_each=600, **sections):
        folder = place / name
        content = {
            "run": {"name": folder.name, "dir": str(folder.parent), "seed": seed},
            "data": {"path": "data"},
            "train": {"steps": steps},
            **sections,
        }
        folder.mkdir(parents=True)
        config = configfile.from_dict(content)
        (folder / "config.yaml").write_text(config.to_yaml())
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if val_loss is not None:
            one = {"components": {part: {"bytes": 0} for part in PARTS}, "workers": 2}
            one = {**one, "parameters": {"total": 1000}}
            memory = {**one, "components": {**one["components"], "gradients": {"bytes": bytes_each}}}
            memory |= {"plan_dense": one, "plan_dense_same_states": one, "plan_bitnet": one}
            found = {"steps": steps, "val_loss": val_loss, "perplexity": 2.0**val_loss, "memory": memory}
            (folder / "summary.json").write_text(json.dumps(found))
        return folder

    return folder_of_run


def row(step, loss=5.0, **more):
    return {"step": step, "time": time.time(), "tokens": 100 * step, "loss": loss, **more}


# ------------------------------------------------------------------ what a folder holds


def test_a_runs_state_is_read_from_its_folder(make):
    finished = make("runs/finished", val_loss=4.0, rows=[row(40)])
    stopped = make("runs/stopped", rows=[row(10), row(20)])
    failed = make("runs/failed", rows=[row(30)])
    runs.note_failure(failed, RuntimeError("worker 1 died\n(SIGKILL)"))
    longer = make("runs/longer", val_loss=4.0, steps=40)
    (longer / "summary.json").write_text('{"steps": 30}')
    states = {folder.name: runs.read(folder).described() for folder in (finished, stopped, failed, longer)}
    assert states == {
        "finished": "finished at step 40 of 40",
        "stopped": "stopped at step 20 of 40",
        "failed": "failed at step 30 of 40: worker 1 died (SIGKILL)",
        "longer": "stopped at step 0 of 40",
    }
    assert not runs.failure_recurs(failed)
    runs.note_failure(failed, RunFailed("the loss cannot be used", recurs=True))
    assert runs.failure_recurs(failed)
    runs.note_failure(failed, None)
    assert runs.read(failed).state == "stopped"


def test_a_run_is_running_while_its_launcher_holds_the_lock(make):
    folder = make("runs/a", val_loss=4.0)
    with (folder / ".lock").open("w") as lock:
        assert runs.read(folder).state == "finished"
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert runs.read(folder).state == "running"
        assert runs.read(folder).summary is None, "what runs is not compared"
    assert runs.read(folder).state == "finished"


def test_who_looks_whether_a_run_is_running_does_not_keep_it_from_starting(tmp_path):
    with (tmp_path / runs.LOCK).open("w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.1, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with runs.locked(tmp_path, "taken"), pytest.raises(ConfigError, match="taken"):
            runs.locked(tmp_path, "taken").__enter__()


def test_names_mean_runs_and_sweeps_and_each_run_counts_once(make, place):
    for name in ("runs/alone", "runs/sweep/b", "runs/sweep/a", "elsewhere/c"):
        make(name)
    (place / "runs" / "notes").mkdir()

    def found(*words):
        return [str(run.folder.relative_to(place) if run.folder.is_absolute() else run.folder)
                for run in runs.named(words)]  # fmt: skip

    assert found("alone") == ["runs/alone"]
    assert found("sweep") == ["runs/sweep/a", "runs/sweep/b"]
    assert found("sweep/b", "sweep", "runs/sweep/a") == ["runs/sweep/b", "runs/sweep/a"]
    assert found("elsewhere") == ["elsewhere/c"]
    assert found("runs") == ["runs/alone", "runs/sweep/a", "runs/sweep/b"]
    with pytest.raises(ConfigError, match=r"'sweeep' is neither a run .*did you mean 'sweep'"):
        runs.named(["sweeep"])
    with pytest.raises(ConfigError, match=r"'notes' is neither a run .*; write the name or .* alone, sweep"):
        runs.named(["notes"])


# ------------------------------------------------------------------ means


def test_means_and_spreads_are_over_the_finished_runs_of_a_group(make):
    rows = [row(20, tokens_per_second=100.0, flip_rate=0.02), row(40, tokens_per_second=300.0, flip_rate=0)]
    make("runs/s/a-seed0", val_loss=4.0, rows=rows)
    make("runs/s/a-seed1", val_loss=5.0, seed=1, rows=rows)
    make("runs/s/a-seed2", seed=2, rows=rows[:1])
    make("runs/s/b-seed0", val_loss=3.0, bytes_each=1200, method={"name": "dense"})
    best, second = compare.compare(runs.named(["s"]))["groups"]
    assert (best["group"], best["finished"], compare.count(best)) == ("b", 1, "1")
    assert best["val_loss"] == {"mean": 3.0, "spread": None, "n": 1}
    assert best["bytes_per_parameter"]["mean"] == 2.4
    assert best["tokens_per_second"] == best["flip_rate"] == {"mean": None, "spread": None, "n": 0}
    assert (second["group"], second["finished"], compare.count(second)) == ("a", 2, "2 of 3")
    assert second["val_loss"] == {"mean": 4.5, "spread": pytest.approx(0.5**0.5), "n": 2}
    assert second["perplexity"]["mean"] == 24.0
    assert second["tokens_per_second"] == {"mean": 200.0, "spread": 0.0, "n": 2}
    assert second["flip_rate"]["mean"] == 0.01
    assert [run["seed"] for run in second["runs"]] == [0, 1, 2]


def test_only_the_seed_the_name_and_places_may_differ_in_a_group(make):
    make("runs/a", val_loss=4.0, tracking={"mlflow": None})
    make("other/b", val_loss=4.0, seed=7)
    make("runs/c", val_loss=4.0, optimizer={"lr": 0.5})
    make("runs/d", val_loss=4.0, cluster={"workers": 1})
    groups = compare.compare(runs.named(["a", "other/b", "c", "d"]))["groups"]
    assert [[run["run"] for run in group["runs"]] for group in groups] == [["a", "b"], ["c"], ["d"]]


def test_runs_are_of_one_group_by_what_they_were_made_from_not_by_where_that_lies(make):
    def made_from(folder, data, **others):
        hashes = {"data": data, "tokenizer": "t", "pretrained": None, **others}
        (folder / runs.INPUTS).write_text(json.dumps(hashes))
        return folder.name

    def base(folder):
        return {"pretrained": folder}

    moved = {"data": {"path": "elsewhere", "tokenizer": "there"}}
    names = [
        made_from(make("runs/a", val_loss=4.0), "one"),
        made_from(make("runs/b", val_loss=4.0, seed=1, **moved), "one"),
        made_from(make("runs/c", val_loss=4.0), "another"),
        made_from(make("runs/d", val_loss=4.0, model=base("here")), "one", pretrained="p"),
        made_from(make("runs/e", val_loss=4.0, model=base("there")), "one", pretrained="p"),
        make("runs/f", val_loss=4.0).name,  # of an earlier version, known by its path
    ]
    tail = {"name": "g", "dir": "runs", "from": "a"}
    names.append(made_from(make("runs/g", val_loss=4.0, run=tail), "one"))
    groups = compare.compare(runs.named(names))["groups"]
    assert [[run["run"] for run in group["runs"]] for group in groups] == [
        ["a", "b"], ["c"], ["d", "e"], ["f"], ["g"],
    ]  # fmt: skip


def test_a_run_that_has_not_begun_is_of_the_group_that_says_the_same_paths(make):
    """It has not kept yet what it is made from, as one of a sweep that is stopped."""
    begun = make("runs/dense-seed0", val_loss=4.0)
    (begun / "inputs.json").write_text(json.dumps({"data": "one", "tokenizer": "t", "pretrained": None}))
    waiting = make("runs/dense-seed1", seed=1)
    for file in ("metrics.jsonl", "summary.json"):
        (waiting / file).unlink(missing_ok=True)
    (group,) = compare.compare([runs.read(begun), runs.read(waiting)])["groups"]
    assert [run["run"] for run in group["runs"]] == ["dense-seed0", "dense-seed1"]
    assert compare.count(group) == "1 of 2"


def test_groups_of_the_same_name_are_told_apart_by_their_folders(make, place):
    make("x/dqt-seed0", val_loss=4.0)
    make("y/dqt-seed0", val_loss=4.0, optimizer={"lr": 0.5})
    make("y/bits4", val_loss=4.0, optimizer={"lr": 0.25})
    groups = compare.compare(runs.named(["x", "y"]))["groups"]
    assert [group["group"] for group in groups] == ["x/dqt-seed0", "bits4", "y/dqt-seed0"]


def test_a_diverged_run_is_in_no_mean_and_that_is_said(make):
    make("runs/s/a-seed0", val_loss=4.0)
    folder = make("runs/s/a-seed1", val_loss=4.0, seed=1)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"val_loss": None}))
    (group,) = compare.compare(runs.named(["s"]))["groups"]
    assert compare.cell(group, "val_loss") == "4.0000 (of 1)"
    assert compare.cell(group, "bytes_per_parameter") == "1.200"


def test_a_run_that_diverged_with_a_finite_loss_is_in_no_mean_either(make):
    make("runs/s/a-seed0", val_loss=4.0)
    make("runs/s/a-seed1", val_loss=67.0, seed=1, rows=[row(40, val_loss=67.0, diverged=True)])
    (group,) = compare.compare(runs.named(["s"]))["groups"]
    assert compare.cell(group, "val_loss") == "4.0000 (of 1)" and compare.count(group) == "2, 1 diverged"


def test_a_seed_counts_once_in_a_group(make):
    for name, seed, val_loss in (("good-seed0", 0, 4.0), ("good-seed1", 1, 5.0), ("other-seed0", 0, 4.0)):
        make(f"runs/s/{name}", seed=seed, val_loss=val_loss)
    comparison = compare.compare(runs.named(["s"]))
    (group,) = comparison["groups"]
    assert (group["val_loss"]["n"], group["val_loss"]["spread"]) == (2, pytest.approx(0.5**0.5))
    assert compare.not_well(comparison) == ["other-seed0: seed 0 counts once, as runs/s/good-seed0"]


def test_what_is_not_finished_is_not_in_the_mean_curve(make):
    make("runs/s/a-seed0", val_loss=4.0, rows=[row(step) for step in (10, 20, 40)])
    make("runs/s/a-seed1", seed=1, rows=[row(10)])
    (group,) = compare.compare(runs.named(["s"]))["groups"]
    assert [len(curve) for curve in compare._curves(group)] == [3]


def test_a_run_that_cannot_be_read_is_named(make):
    (make("runs/s/a-seed0") / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"runs/s/a-seed0/config.yaml: data.path is required"):
        runs.named(["s"])


def test_a_perplexity_beyond_a_million_is_written_as_such(make):
    for name, val_loss in (("below", 19.9), ("at", 20.0), ("a", 30.0), ("b", 31.0)):
        make(f"runs/{name}", val_loss=val_loss, seed=int(val_loss), optimizer={"lr": val_loss // 10 / 10})
    groups = [compare.compare(runs.named(names))["groups"][0] for names in (["below"], ["at"], ["a", "b"])]
    cells = [compare.cell(group, "perplexity") for group in groups]
    assert cells == ["978356.00", "1.05e+06", "1.61e+09 ± 7.59e+08"]


# ------------------------------------------------------------------ what is written


def test_the_page_and_the_pictures_are_written(make, lowbit, place):
    for seed in (0, 1):
        curve = [
            row(step, loss=6 - step / 10 + seed / 5, zero_fraction=0.5 - step / 100)
            for step in (10, 20, 30, 40)
        ]
        folder = make(f"runs/s/a-seed{seed}", val_loss=4.0 + seed, seed=seed, rows=curve,
                      optimizer={"lr": 0.004, "linear_lr_ratio": 0.25})  # fmt: skip
        summary = json.loads((folder / "summary.json").read_text()) | {"bits_per_byte": 2.0 + seed}
        summary["memory"] |= {"bytes_per_linear_weight": 0.25, "bytes_per_linear_weight_with_states": 2.25}
        (folder / "summary.json").write_text(json.dumps(summary))
    make("runs/s/b-seed0", method={"name": "dense"}, rows=[row(10, loss=5.5)])
    done = lowbit("compare", "s", "--json")
    assert done.returncode == 0, done.stderr
    folder = place / "runs" / "s" / "comparison"
    names = ["comparison.md", "comparison.csv", "loss-against-tokens.png", "loss-against-bytes.png",
             "loss-against-bytes-of-weights.png", "loss-against-bytes-with-states.png"]  # fmt: skip
    assert [place / each for each in json.loads(done.stdout)["files"]] == [folder / each for each in names]
    assert (folder / "comparison.md").read_text() == (
        "|  | runs | lr (of linear layers) | validation loss | perplexity | bits/byte | bytes/weight "
        "| with states | bytes/parameter | zeros |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| a | 2 | 0.004 (0.001) | 4.5000 ± 0.7071 | 24.00 ± 11.31 | 2.5000 ± 0.7071 | 0.250 "
        "| 2.250 | 1.200 | 10.0% |\n"
        "| b | 0 of 1 | 0.001 | - | - | - | - | - | - | - |\n"
        "\n"
        "Mean ± sample standard deviation over finished runs; none is written where all of them agree.\n"
        "* b-seed0: stopped at step 10 of 40\n"
        "\n![loss against tokens](loss-against-tokens.png)\n"
        "\n![loss against bytes](loss-against-bytes.png)\n"
        "\n![loss against bytes of weights](loss-against-bytes-of-weights.png)\n"
        "\n![loss against bytes with states](loss-against-bytes-with-states.png)\n"
    )
    first, second = csv.DictReader((folder / "comparison.csv").open())
    assert (first["group"], first["val_loss"], first["val_loss_n"]) == ("a", "4.5", "2")
    assert (first["lr"], first["linear_lr"]) == ("0.004", "0.001")
    assert (second["method"], second["val_loss"], second["finished"]) == ("dense", "", "0")
    assert (second["lr"], second["linear_lr"]) == ("0.001", "0.001")
    for name in names[2:]:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert [str(run.folder) for run in runs.named(["s"])] == [
        f"runs/s/{name}" for name in ("a-seed0", "a-seed1", "b-seed0")
    ], "the comparison is no run"


def test_the_table_in_a_terminal_names_what_is_not_finished(make, lowbit, place):
    make("runs/a", val_loss=4.0, rows=[row(40)])
    make("runs/b", seed=1, rows=[row(10)])
    done = lowbit("compare", "a", "b", "--out", place / "out")
    assert done.returncode == 0, done.stderr
    assert "a 1 of 2 0.001 4.0000 16.00 1.200" in " ".join(done.stdout.split())
    assert "b: stopped at step 10 of 40" in done.stdout
    assert (place / "out" / "loss-against-tokens.png").exists()


def test_a_mean_curve_has_the_points_that_all_runs_have():
    curves = [[(1, 5.0), (2, 4.0), (3, 3.0)], [(1, 7.0), (2, 5.0)]]
    assert charts._mean_curve(curves) == [(1, 6.0), (2, 4.5)]
    assert charts._mean_curve([[(1, 5.0)], [(2, 4.0)]]) == [(1, 5.0)]


def test_each_of_many_groups_has_a_look_of_its_own():
    for look in (charts._look, lambda number: charts._look(number)[::2]):  # of curves; of points
        assert len({look(number) for number in range(28)}) == 28


def test_a_folders_runs_are_listed(make, lowbit, place):
    make("runs/alone", val_loss=4.0, rows=[row(40, loss=4.5, val_loss=4.0)])
    make("runs/s/a-seed3", seed=3, method={"name": "dense"}, rows=[row(10)])
    make("runs/tail", run={"name": "tail", "dir": "runs", "from": "alone@40"})
    broken = place / "runs" / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("nothing: {}")
    done = lowbit("runs", "--json")
    assert done.returncode == 0, done.stderr
    alone, other, child, tail = json.loads(done.stdout)["runs"]
    assert (alone["from"], tail["from"]) == (None, "alone@40")
    assert {key: alone[key] for key in ("run", "state", "step", "steps", "loss", "val_loss", "method")} == {
        "run": "alone", "state": "finished", "step": 40, "steps": 40, "loss": 4.5, "val_loss": 4.0,
        "method": "dqt ternary",
    }  # fmt: skip
    assert 0 <= alone["age_seconds"] < 60
    assert (other["run"], other["state"]) == ("broken", "unreadable")
    assert (child["run"], child["state"], child["seed"], child["method"]) == (
        "s/a-seed3",
        "stopped",
        3,
        "dense",
    )
    table = lowbit("runs").stdout
    for words in ("s/a-seed3", "10/40", "unknown name 'nothing'", "tail (from alone@40)"):
        assert words in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["compare", "absent"],
            "'absent' is neither a run (in runs/), a run's folder nor a sweep; write the name",
        ),
        (["compare"], "RUN"),
        (["compare", "a", "--out", "runs/a/config.yaml"], "cannot be written (File exists)"),
        (["runs", "absent"], "absent is no folder"),
    ],
)
def test_wrong_use_is_one_line(arguments, words, make, lowbit):
    make("runs/a")
    done = lowbit(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert words in line
