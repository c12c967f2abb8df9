"""Folders of Ray sessions under /tmp: those of launchers that are gone are removed, and no others."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lowbit_dist.cluster import driver

GONE = 99_999_999  # more than a process's number can be
REMOVE = "import os; from lowbit_dist.cluster import driver; driver.remove_left_sessions(os.getpid())"


@pytest.fixture
def sessions():
    """The folder of a living launcher, and that of one that is gone."""
    made = [
        Path(tempfile.mkdtemp(prefix=driver.session_folder(pid), dir="/tmp")) for pid in (os.getpid(), GONE)
    ]
    yield made
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


def test_what_a_dead_launcher_left_is_removed_and_nothing_else(sessions):
    living, left = sessions
    subprocess.run([sys.executable, "-c", REMOVE], check=True)
    assert living.exists()
    assert not left.exists()


def test_a_container_that_shares_tmp_leaves_the_sessions_of_others(sessions):
    """There, no launcher of this place has a process."""
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("no process of its own numbering can be made here")
    subprocess.run([*apart, sys.executable, "-c", REMOVE], check=True)
    assert all(folder.exists() for folder in sessions)
