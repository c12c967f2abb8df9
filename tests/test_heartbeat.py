"""Signs of life: what a worker writes, and what its watch concludes from it."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from lowbit_dist import configfile, heartbeat
from lowbit_dist.cluster import watchdog


@pytest.fixture
def beating(tmp_path):
    (tmp_path / heartbeat.STARTS).write_text("{}\n")
    made = heartbeat.Heartbeat(tmp_path, rank=0, start=1, node="abc")
    yield made
    made.close()


def file_of(tmp_path, rank=0):
    return tmp_path / heartbeat.FOLDER / f"{rank}.json"


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_heartbeat_tells_where_the_loop_is_and_that_the_process_runs(tmp_path, beating):
    first = heartbeat.read(tmp_path)[0]
    assert (first["rank"], first["pid"], first["node"], first["start"]) == (0, os.getpid(), "abc", 1)
    assert (first["phase"], first["beats"], first["step_seconds"]) == ("start", 0, None)
    for step in (1, 2, 3):
        beating.beat("step", step)
        beating.beat("step", step)
    wait_for(lambda: heartbeat.read(tmp_path)[0]["beats"] == 6)
    now = heartbeat.read(tmp_path)[0]
    assert (now["phase"], now["step"]) == ("step", 3)
    assert now["step_seconds"] < 1
    assert now["time"] > first["time"]
    assert file_of(tmp_path).stat().st_size == heartbeat.FILE_BYTES
    beating.close()
    assert heartbeat.read(tmp_path) == []


def test_a_heartbeat_that_cannot_be_written_is_warned_of(tmp_path, caplog):
    (tmp_path / heartbeat.FOLDER).touch()
    heartbeat.Heartbeat(tmp_path, rank=0, start=1).close()
    assert ".workers/0.json cannot be written: nobody will notice if this worker hangs" in caplog.text


def test_heartbeats_of_other_starts_and_torn_files_are_left_out(tmp_path, beating):
    assert len(heartbeat.read(tmp_path, 1)) == 1
    assert heartbeat.read(tmp_path, 2) == []
    file_of(tmp_path, 1).write_text("{")
    assert len(heartbeat.read(tmp_path)) == 1


def test_a_worker_that_was_given_up_ends_itself(tmp_path):
    """As one whose machine was cut off does when it sees the run's folder again."""
    (tmp_path / heartbeat.STARTS).write_text("{}\n")
    code = (
        "import sys, time; from pathlib import Path; from lowbit_dist.heartbeat import Heartbeat;"
        "Heartbeat(Path(sys.argv[1]), rank=0, start=1); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path])
    wait_for(lambda: heartbeat.read(tmp_path))
    time.sleep(2 * heartbeat.EVERY)
    assert process.poll() is None
    with (tmp_path / heartbeat.STARTS).open("a") as file:
        file.write("{}\n")
    assert process.wait(10) == 1


class Clock:
    """Stands for the time that passes; what is watched are files."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: self.now, strftime=time.strftime)
        monkeypatch.setattr(watchdog, "time", clock)


@pytest.fixture
def watched(tmp_path, monkeypatch, small):
    """`look(seconds, *heartbeats)`: what the watch says when the workers' files read so, `seconds` later."""
    clock = Clock(monkeypatch)
    config = configfile.from_dict(small(cluster={"hang_timeout": 30}))
    (config.run_dir / heartbeat.FOLDER).mkdir(parents=True)
    monkeypatch.setattr(watchdog, "stacks_of", lambda found, and_kill: [])
    monkeypatch.setattr(watchdog.Watchdog, "_run", lambda self: None)
    looker = watchdog.Watchdog(config, 1, None, 0, lambda failure: None)

    def look(seconds, *heartbeats):
        clock.now += seconds
        for rank, (phase, beats, alive) in enumerate(heartbeats):
            content = {
                "rank": rank, "pid": 1, "host": "h", "node": "n", "start": 1, "phase": phase, "step": 7,
                "beats": beats, "step_seconds": 0.5, "time": alive,
            }  # fmt: skip
            (config.run_dir / heartbeat.FOLDER / f"{rank}.json").write_text(json.dumps(content))
        failure = looker._hang()
        return failure and failure.text

    return look


def test_a_process_that_does_not_run_is_told_from_a_loop_that_is_stuck(watched):
    assert watched(0, ("step", 5, 1.0), ("step", 5, 1.0)) is None
    assert watched(29, ("step", 5, 30.0), ("step", 5, 1.0)) is None
    text = watched(2, ("step", 5, 32.0), ("step", 5, 1.0))
    assert "worker 1 (process 1 on h) does not run: no progress after step 7 for 31 s" in text


def test_the_worker_that_is_behind_is_the_one_that_is_named(watched):
    assert watched(0, ("step", 9, 1.0), ("eval", 8, 1.0)) is None
    assert watched(20, ("step", 9, 21.0), ("eval", 8, 21.0)) is None
    assert "worker 1 (process 1 on h) is stuck in eval" in watched(11, ("step", 9, 32.0), ("eval", 8, 32.0))


def test_progress_of_any_kind_and_slow_phases_are_no_hang(watched):
    for i in range(10):
        assert watched(25, ("step", i, i), ("step", i, i)) is None
    for beats, phase in enumerate(heartbeat.SLOW, start=50):
        assert watched(0, (phase, beats, -1), ("step", beats, -1)) is None
        for i in range(23):
            assert watched(25, (phase, beats, i), ("step", beats, i)) is None
        assert "is stuck in" in watched(40, (phase, beats, 99), ("step", beats, 99))


def test_without_a_wish_the_limit_follows_the_median_step(small):
    config = configfile.from_dict(small())
    assert watchdog.hang_limit(config, [{"step_seconds": None}, {"step_seconds": 0.5}]) == 60
    assert watchdog.hang_limit(config, [{"step_seconds": 4.0}, {"step_seconds": 10.0}]) == 200


def test_restarts_after_a_failure_and_resumes_after_a_stop_are_counted_apart(tmp_path):
    assert heartbeat.newest_start(tmp_path) == heartbeat.Start(0, 0, 0)
    counts = []
    for reason in ("begin", "restart", "resume", "restart", "resume", "resume"):
        now = heartbeat.note_start(tmp_path, reason)
        assert now == heartbeat.newest_start(tmp_path)
        assert now.number == heartbeat.count_starts(tmp_path)
        counts.append((now.restarts, now.resumes))
    assert counts == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (2, 3)]
    assert abs(now.time - time.time()) < 60


def test_of_starts_that_do_not_say_why_all_but_the_first_are_restarts(tmp_path):
    """As earlier versions wrote them, and as a crash tears them."""
    (tmp_path / heartbeat.STARTS).write_text('{"time": 1.0}\n{"time": 2.0}\n{"ti\n')
    assert heartbeat.newest_start(tmp_path) == heartbeat.Start(number=3, restarts=2, resumes=0)
    assert heartbeat.note_start(tmp_path, "resume")[:3] == (4, 2, 1)


def test_a_start_has_stepped_once_a_worker_of_its_own_has(tmp_path, beating):
    assert not heartbeat.has_stepped(tmp_path, 1)
    beating.beat("step", 1)
    wait_for(lambda: heartbeat.has_stepped(tmp_path, 1))
    assert not heartbeat.has_stepped(tmp_path, 2)
