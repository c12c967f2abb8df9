"""What ends a launch: signals, a terminal that closes, and what is saved before."""

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import termios
import time

import psutil
import pytest
from test_cluster import left_behind, mlflow_run, rows, shell, train

from lowbit_dist import configfile, heartbeat, runs
from lowbit_dist.cluster import driver, session
from lowbit_dist.sweep import running


def test_a_signal_is_noted_and_the_next_one_ends_but_a_terminal_may_hang_up_twice():
    former = [signal.getsignal(signum) for signum in session.STOPPING]
    with session.signals_stop() as signals:
        signals.are_noted = True
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == signal.SIGHUP
        with pytest.raises(session.Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.signum == signal.SIGTERM
        signals.are_noted = False
        os.kill(os.getpid(), signal.SIGHUP)  # while the end is being told to MLflow
    assert [signal.getsignal(signum) for signum in session.STOPPING] == former


def test_a_hang_up_that_is_ignored_stays_so():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` has it
    try:
        with session.signals_stop() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def in_terminal(command, **options):
    """The command, leader of a terminal's processes, and the terminal's other end."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        **options,
    )
    os.close(theirs)
    return process, ours


ON_TERMINAL = """
import sys, time
from pathlib import Path
from lowbit_dist.cluster import session
from lowbit_dist.cluster.following import Unbroken
class Told:
    def say(self, text): print(text, flush=True)
    row = say
with session.signals_stop() as signals:
    signals.are_noted = True
    print("ready", flush=True)
    told = Unbroken(Told())
    while signals.received is None:
        told.say("before")  # the terminal goes first, its signal comes later
        time.sleep(0.01)
    print("after", flush=True)
    print("after", file=sys.stderr, flush=True)
    Path(sys.argv[1]).write_text(str(signals.received))
"""


def test_a_terminal_that_closes_is_a_signal_and_what_is_then_said_no_error(tmp_path):
    process, terminal = in_terminal([sys.executable, "-c", ON_TERMINAL, str(tmp_path / "received")])
    while b"before" not in os.read(terminal, 1 << 16):
        pass
    os.close(terminal)
    assert process.wait(60) == 0
    assert (tmp_path / "received").read_text() == str(int(signal.SIGHUP))


def test_before_a_step_there_is_nothing_to_save(small):
    config = configfile.from_dict(small())
    config.run_dir.mkdir()
    assert not heartbeat.has_stepped(config.run_dir, 3)
    beats = heartbeat.Heartbeat(config.run_dir, rank=0, start=3)
    try:
        beats.beat("start", 1)
        beats._write()
        assert not heartbeat.has_stepped(config.run_dir, 3)
        beats.beat("step", 2)
        beats._write()
        assert heartbeat.has_stepped(config.run_dir, 3)
        assert not heartbeat.has_stepped(config.run_dir, 4)
    finally:
        beats.close()


def test_a_driver_that_is_starting_is_ended_at_once(small):
    config = configfile.from_dict(small())
    config.run_dir.mkdir()
    starting = driver.Driver(config, train, set())
    starting.fit(heartbeat.FIRST)
    began = time.monotonic()
    starting.close()
    assert time.monotonic() - began < 10
    assert not psutil.pid_exists(starting._process.pid)


@pytest.mark.parametrize("signum", session.STOPPING)
def test_a_child_of_a_sweep_that_a_signal_ends_was_stopped(signum):
    for code in (128 + signum, -signum):
        assert running._ended(None, None, code) == ("stopped", "stopped by a signal")


@pytest.mark.integration
def test_a_signal_during_a_start_ends_it_soon(small, tmp_path):
    process = shell(small(run={"name": "early"}), tmp_path)
    while "starting Ray on this machine" not in (line := process.stderr.readline()):
        assert line, "it ended before Ray was started"
    time.sleep(1)
    assert runs.read(tmp_path / "early").state == "starting", "it is known before Ray is there"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == 143
    assert "stopped by SIGTERM" in stderr.splitlines()[-1]
    assert "with a checkpoint" not in stderr
    assert left_behind(process.pid) == []
    assert runs.read(tmp_path / "early").state == "stopped"


@pytest.mark.slow
@pytest.mark.integration
def test_a_user_without_a_name_and_a_home_trains_until_the_terminal_closes(small, tmp_path):
    stranger = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    if shutil.which("unshare") is None or subprocess.run([*stranger, "true"], capture_output=True).returncode:
        pytest.skip("no user can be made here")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    content = small(
        run={"name": "stranger", "dir": str(tmp_path)},
        cluster={"workers": 1},
        tracking={"mlflow": store},
        train={"steps": 5000, "save_every": 5000, "eval_every": 5000, "log_every": 1},
    )
    folder, file = tmp_path / "stranger", tmp_path / "stranger.yaml"
    file.write_text(json.dumps(content))
    told = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in told}
    cpu = str(min(os.sched_getaffinity(0)))
    command = [sys.executable, "-c", "from lowbit_dist.cli import main; main()", "train", str(file)]
    process, terminal = in_terminal(
        ["taskset", "-c", cpu, *stranger, *command], env=environment | {"TMPDIR": "/proc"}, cwd=tmp_path
    )
    said = b""
    try:
        deadline = time.monotonic() + 300
        while len(rows(folder)) < 3:
            assert process.poll() is None and time.monotonic() < deadline, said.decode()
            if select.select([terminal], [], [], 0.2)[0]:
                said += os.read(terminal, 1 << 16)
    finally:
        os.close(terminal)
        code = process.wait(120)
        shutil.rmtree("/tmp/lowbit-12345", ignore_errors=True)
    assert b"TMPDIR (/proc) cannot be written" in b" ".join(said.split())
    assert code == 129
    done = rows(folder)[-1]
    assert (folder / "latest").read_text() == f"step-{done}"
    assert mlflow_run(store, folder) == ("KILLED", list(range(1, done + 1)))
    assert left_behind(process.pid) == []
