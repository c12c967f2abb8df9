"""`lowbit watch` on folders as training writes them: what it says, and that it goes on until a run ends."""

import fcntl
import json
import os
import pty
import re
import subprocess
import sys
import time

import pytest
from terminals import Screen

from lowbit_dist import configfile, heartbeat, runs
from lowbit_dist.cli import plots, watching
from lowbit_dist.sweep.definition import Child

COMPONENTS = ("low_bit_weights", "scales", "other_weights", "gradients", "optimizer_states", "buffers")
STEPS = 40


def row(step):
    return {
        "step": step, "time": time.time(), "tokens": step * 256, "loss": 6.0 - step / 10, "lr": 1e-3,
        "grad_norm": 1.5, "tokens_per_second": 128.0, "skipped_steps": 2, "rollbacks": 0, "restarts": 3,
        "tokens_per_second_per_worker": 64.0, "mfu": 0.375, "flip_rate": 0.0125, "resident_bytes": 600,
        **{f"memory/{name}": 100 for name in COMPONENTS},
    }  # fmt: skip


def report(n_bytes):
    return {
        "components": {name: {"bytes": n_bytes} for name in COMPONENTS},
        "parameters": {"total": 400},
        "workers": 2,
    }


@pytest.fixture
def folder(small):
    """A run in mid-training: 20 of 40 steps, a checkpoint of step 10 that is 100 seconds old, two workers of
    which one is silent.
    """
    config = configfile.from_dict(small(train={"steps": STEPS}))
    run = config.run_dir
    (run / ".workers").mkdir(parents=True)
    (run / "config.yaml").write_text(config.to_yaml())
    (run / "metrics.jsonl").write_text("".join(json.dumps(row(step)) + "\n" for step in (5, 10, 15, 20)))
    (run / "latest").write_text("step-10")
    os.utime(run / "latest", (time.time() - 100,) * 2)
    (run / ".baselines.json").write_text(
        json.dumps({"plan_dense": report(400), "plan_bitnet": report(300)}) + "\n"
    )
    for rank, age in enumerate((0.0, 90.0)):
        beat = {
            "rank": rank, "pid": 1000 + rank, "host": f"machine{rank}", "phase": "step", "step": 22,
            "step_seconds": 0.5, "time": time.time() - age,
            "memory": {"low_bit_weights": 100, "gradients": 500, "transient": 300 + rank, "activations": 99},
        }  # fmt: skip
        (run / ".workers" / f"{rank}.json").write_text(json.dumps(beat))
    return run


def test_a_run_in_training_is_told_as_json(folder, lowbit):
    done = lowbit("watch", folder, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = {
        "run": "small", "state": "running", "step": 22, "steps": STEPS, "loss": 4.0, "val_loss": None,
        "tokens": 5120, "tokens_per_second": 128.0, "tokens_per_second_per_worker": 64.0, "mfu": 0.375,
        "flip_rate": 0.0125, "restarts": 3, "skipped_steps": 2,
        "resident_bytes": 600, "peak_bytes": 1000, "seconds_left": 18 * 256 / 128.0, "resumes": 0,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert found["checkpoint"]["step"] == 10
    assert 99 < found["checkpoint"]["age_seconds"] < 130
    assert [each["host"] for each in found["workers"]] == ["machine0", "machine1"]
    assert found["workers"][1]["age_seconds"] > 80
    sums = {name: sum(parts.values()) for name, parts in found["bytes_per_parameter"].items()}
    assert sums == {
        "this run, 8-bit states": 600 * 2 / 400, "BitNet": 1800 * 2 / 400, "dense": 2400 * 2 / 400
    }  # fmt: skip


def test_it_is_drawn_once_where_nobody_watches(folder, lowbit):
    done = lowbit("watch", folder)
    assert done.returncode == 0, done.stderr
    for words in (
        "small  dqt ternary  running", "step 22/40", "55%", "0:36 left", "4.0000", "1.250%", "step 10, 1:4",
        "state memory", "600 B/worker", "peak memory", "1 kB/worker", "dense", "machine1", "1:3", "5.500",
        "step 5", "64/worker", "37.5%",
    ):  # fmt: skip
        assert words in done.stdout, f"{words!r} is missing in:\n{done.stdout}"


def test_a_run_that_has_measured_nothing_yet_is_drawn_too(folder, lowbit):
    for name in ("metrics.jsonl", "latest", ".baselines.json"):
        (folder / name).unlink()
    (folder / ".workers" / "0.json").write_text("{")  # read while it is written
    done = lowbit("watch", folder)
    assert done.returncode == 0, done.stderr
    assert "small" in done.stdout and "stopped" in done.stdout
    assert json.loads(lowbit("watch", folder, "--json").stdout)["loss"] is None


def test_what_is_no_run_is_refused_in_one_line(folder, lowbit):
    done = lowbit("watch", folder.parent / "smal")
    assert done.returncode == 2
    assert "is neither a run" in done.stderr and "did you mean" in done.stderr
    twin = folder.parent / "twin"
    twin.mkdir()
    (twin / "config.yaml").write_text((folder / "config.yaml").read_text())
    done = lowbit("watch", folder.parent)
    assert done.returncode == 2
    assert "has 2 runs; name one of them" in done.stderr


def test_in_a_terminal_it_follows_the_run_until_that_ends(folder):
    """The run is alive as long as its launcher's lock is held; meanwhile it gets further."""
    for file in (folder / ".workers").iterdir():
        file.unlink()
    near, far = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm", "LINES": "50"}

    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-c", "from lowbit_dist.cli import main; main()", "watch", str(folder)],
            stdin=subprocess.DEVNULL, stdout=far, stderr=far, env=environment,
        )  # fmt: skip
        os.close(far)
        screen = Screen(near)

        def wait_for(words):
            deadline = time.monotonic() + 90
            while words not in re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", screen.shown):
                assert time.monotonic() < deadline and process.poll() is None, screen.shown[-2000:].decode()
                time.sleep(0.1)

        wait_for(b"step 20/40")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row(35)) + "\n")
        wait_for(b"step 35/40")
    assert process.wait(timeout=30) == 0
    screen.join(timeout=10)
    assert b"stopped" in screen.shown


def test_a_curve_goes_from_the_highest_line_to_the_lowest_without_gaps():
    lines = plots.curve([(x, 100 - x) for x in range(0, 101, 20)], width=10, height=4)
    assert [len(line) for line in lines] == [10] * 4
    empty = chr(plots.BRAILLE)
    assert lines[0][0] != empty and lines[-1][-1] != empty
    assert lines[0][-1] == empty and lines[-1][0] == empty
    for column in range(10):
        assert any(line[column] != empty for line in lines), "a column without a dot"


def test_a_line_of_bars_shows_the_lowest_and_the_highest():
    bars = plots.spark([0, 1, 2, 3, 4, 5, 6, 7], 8)
    assert bars == plots.BLOCKS
    assert plots.spark([], 8) == "" and plots.spark([2.0, 2.0], 2) == "▁▁"
    assert len(plots.spark(list(range(1000)), 30)) == 30


def test_a_run_is_known_from_its_launch_on_and_starts_until_a_worker_has_made_a_step(small, lowbit):
    config = configfile.from_dict(small())
    run = config.run_dir
    run.mkdir()
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs.begin(config)
        heartbeat.note_start(run, "begin")
        assert runs.read(run).state == "starting"
        done = lowbit("watch", run)
        assert done.returncode == 0, done.stderr
        assert "small  dqt ternary  starting  step 0/" in done.stdout
        assert "starting for 0:" in done.stdout
        listed = json.loads(lowbit("runs", run.parent, "--json").stdout)["runs"]
        assert [(each["run"], each["state"]) for each in listed] == [("small", "starting")]
        assert "starting" in lowbit("runs", run.parent).stdout
        beats = heartbeat.Heartbeat(run, rank=0, start=1)
        try:
            assert runs.read(run).state == "starting"
            beats.beat("step", 1)
            beats._write()
            assert runs.read(run).state == "running"
        finally:
            beats.close()
        (run / "metrics.jsonl").write_text(json.dumps(row(1)) + "\n")
        assert runs.read(run).state == "running", "its workers have ended, and its launcher has not yet"
        heartbeat.note_start(run, "restart")
        assert runs.read(run).state == "starting", "the rows are of an earlier start"
        assert watching.snapshot(run)["restarts"] == 3, "as its rows say"
    assert runs.read(run).state == "stopped"


@pytest.mark.parametrize("name", ["a", "quickstart", "n" * 100])
def test_a_run_is_watched_in_eighty_columns(name, folder, small):
    from io import StringIO

    from rich.console import Console

    file = StringIO()
    seen = watching.snapshot(folder) | {"run": name, "resumes": 2}
    Console(width=80, file=file).print(watching.picture(seen, 80))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for words in ("step 22/40", "━" * 5, "600 B/worker", "1 kB/worker", "step 10, 1:4", "resumes"):
        assert words in text
    if len(name) < 20:
        assert text.splitlines()[0].startswith(f"{name}  dqt ternary  running  step 22/40 ━━━")
        assert text.splitlines()[0].endswith("left")


@pytest.mark.parametrize(("height", "bars"), [(24, False), (60, True)])
def test_a_run_is_watched_in_the_height_of_a_terminal(height, bars, folder):
    """All but the memory's bars stands on the smallest usual one, the workers above all."""
    from io import StringIO

    from rich.console import Console

    file = StringIO()
    terminal = Console(width=80, height=height, file=file)
    terminal.print(watching._fitting(watching.snapshot(folder), terminal))
    text = file.getvalue()
    assert len(text.splitlines()) <= height
    assert "last sign" in text and "learning rate" in text and "step 22/40" in text
    assert ("bytes per parameter" in text) == bars


def test_a_log_gets_a_line_in_ten_seconds_and_all_that_matters(small, capsys, monkeypatch):
    """Steps of 3 seconds: the first, every fourth, and whatever is no ordinary row."""
    from lowbit_dist.cli import progress

    seconds = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds)
    lines = progress.LogLines(configfile.from_dict(small(train={"steps": STEPS})))
    news = {14: {"val_loss": 3.5}, 19: {"skipped_steps": 3}, 20: {"skipped_steps": 3}}
    for step in (*range(1, 21), STEPS):
        lines.row(row(step) | news.get(step, {}))
        seconds += 3.0
    printed = capsys.readouterr().err.splitlines()
    steps = [int(re.match(r"lowbit: step (\d+)/40  ", line)[1]) for line in printed]
    assert steps == [1, 5, 9, 13, 14, 18, 19, STEPS]
    assert printed[4] == (
        "lowbit: step 14/40  loss 4.600  val 3.500  128 tokens/s  0:52 left  64/worker  "
        "MFU 37.5%  flips 1.25%  state 600 B/worker  2 skipped  3 restarts"
    )


def test_a_sweeps_log_has_of_each_run_the_lines_of_a_run_alone(small, capsys, monkeypatch):
    from lowbit_dist.cli import comparing, console, progress

    seconds = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds)
    data = small(train={"steps": STEPS})
    told = comparing.SweepLogLines(console.Waiting(None))
    children = [
        Child(label=name, config=configfile.from_dict(data | {"run": {"name": name}})) for name in ("a", "b")
    ]
    for child in children:
        told.begins(child)
    for step in range(1, 9):
        for child in children:
            told.row(child, row(step))
        seconds += 3.0
    printed = capsys.readouterr().err
    for child in children:
        steps = re.findall(rf"^lowbit: {child.name}: step (\d+)/40  loss ", printed, flags=re.M)
        assert [*map(int, steps)] == [1, 5]
