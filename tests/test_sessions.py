"""Folders of Ray sessions: those whose process was killed are removed, and no others."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SESSION = """
import os, sys, time
from lowbit_dist import folders
with folders.session_folder(77) as folder:
    (folder / "session").mkdir()
    print(folder, flush=True)
    time.sleep(60)
"""
REMOVE = "from lowbit_dist import folders; folders.remove_left_sessions()"


@pytest.fixture
def place(monkeypatch):
    """Where sessions are made in this test."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def session(place):
    """`session()`: the process of a living session and its folder."""
    started = []

    def start():
        process = subprocess.Popen([sys.executable, "-c", SESSION], stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, Path(process.stdout.readline().strip())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_what_a_killed_process_left_is_removed_and_nothing_else(place, session):
    killed, left = session()
    _, living = session()
    assert [left.name, living.name] == ["lowbit-ray-77", "lowbit-ray-77-1"]
    other = place / "lowbit-ray-1-fffff-abcdefgh"  # of who has no lock, no one knows whether it lives
    other.mkdir()
    subprocess.run([sys.executable, "-c", REMOVE], check=True)
    assert left.exists() and living.exists()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    subprocess.run([sys.executable, "-c", REMOVE], check=True)
    assert not left.exists()
    assert living.exists() and other.exists()


def test_a_session_that_ends_leaves_nothing(place, session):
    process, folder = session()
    process.send_signal(signal.SIGINT)
    process.wait()
    assert not folder.exists()
    assert os.listdir(place) == []


def test_a_container_that_shares_tmp_leaves_the_sessions_of_others(session):
    """There, no process of this place has a number."""
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("no process of its own numbering can be made here")
    _, living = session()
    subprocess.run([*apart, sys.executable, "-c", REMOVE], check=True)
    assert living.exists()
