"""Locks between processes, folders that appear at once, and whether something listens at an address."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lowbit_dist.errors import ConfigError
from lowbit_dist.files import atomic_folder, locked
from lowbit_dist.network import why_no_answer

HOLDER = """
import sys, time
from pathlib import Path
from lowbit_dist.files import locked
with locked(Path(sys.argv[1])):
    print(flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder():
    """`holder(path)`: a process that holds the lock of `path`."""
    started = []

    def hold(path):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_lock_is_waited_for_and_ends_with_its_process(holder, tmp_path):
    file = tmp_path / "lock"
    process = holder(file)
    with pytest.raises(BlockingIOError), locked(file, timeout=0):
        pass
    began = time.monotonic()
    with pytest.raises(ConfigError, match="mine"), locked(file, timeout=0.2, complaint=ConfigError("mine")):
        pass
    assert 0.2 <= time.monotonic() - began < 5
    for timeout in (None, 30):
        threading.Timer(0.2, process.send_signal, (signal.SIGKILL,)).start()
        with locked(file, timeout=timeout):
            assert process.wait(10) == -signal.SIGKILL
        process = holder(file)


def test_who_looks_makes_no_file_and_does_not_disturb_others_who_look(holder, tmp_path):
    file = tmp_path / "lock"
    with pytest.raises(FileNotFoundError), locked(file, shared=True, timeout=0):
        pass
    assert not file.exists()
    file.touch()
    look = {"shared": True, "timeout": 0}
    with locked(file, **look), locked(file, **look), pytest.raises(BlockingIOError), locked(file, timeout=0):
        pass
    holder(file)
    with pytest.raises(BlockingIOError), locked(file, shared=True, timeout=0):
        pass


def test_a_file_system_without_locks_is_an_error_unless_the_lock_is_wanted_only_if_possible(
    tmp_path, monkeypatch
):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="No locks"), locked(tmp_path / "lock", timeout=1):
        pass
    with locked(tmp_path / "lock", timeout=1, if_possible=True) as descriptor:
        os.fstat(descriptor)
    with pytest.raises(FileNotFoundError), locked(tmp_path / "nowhere" / "lock", if_possible=True):
        pass


def test_a_folder_appears_complete_or_not_at_all(holder, tmp_path):
    out, draft = tmp_path / "in" / "out", tmp_path / "in" / ".out.partial"
    with pytest.raises(KeyError), atomic_folder(out) as folder:
        (folder / "half").touch()
        raise KeyError
    assert os.listdir(tmp_path) == [], "folders that were made for it are gone, too"
    out.parent.mkdir()
    with pytest.raises(KeyError), atomic_folder(out / "and" / "deeper"):
        raise KeyError
    assert os.listdir(tmp_path / "in") == []
    draft.mkdir()
    (draft / "left").mkdir()
    process = holder(draft)
    with pytest.raises(ConfigError, match="being written by another process"), atomic_folder(out):
        pass
    assert (draft / "left").exists()
    process.kill()
    process.wait()
    with atomic_folder(out) as folder:
        (folder / "file").write_text("all")
        assert not out.exists()
    assert [path.name for path in out.parent.rglob("*")] == ["out", "file"]


def test_a_folder_that_another_process_finishes_before_its_lock_is_ours_is_left_to_it(tmp_path, monkeypatch):
    draft, out = tmp_path / ".out.partial", tmp_path / "out"

    def finished(*_):
        (draft / "file").write_text("all")
        draft.rename(out)

    monkeypatch.setattr(fcntl, "flock", finished)
    with pytest.raises(ConfigError, match="being written by another process"), atomic_folder(out):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_a_folder_is_replaced_when_the_new_one_is_whole_and_only_if_that_is_asked_for(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def write(text, **options):
        with atomic_folder(out, **options) as folder:
            (folder / text).write_text(text)

    write("first")
    with pytest.raises(OSError):
        write("second")
    write("second", replaces=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "second"]

    rename = Path.rename

    def failing(path, target):
        if path.name == ".out.partial":
            raise OSError("the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        write("third", replaces=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "second"]


def test_what_a_link_leads_to_is_written_and_no_folder_takes_a_mounts_place(tmp_path):
    (tmp_path / "real").mkdir()
    for name, target in (("link", "real"), ("new", "later"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
    for name, target in (("link", "real"), ("new", "later")):
        with atomic_folder(tmp_path / name) as folder:
            (folder / name).write_text(name)
        assert (tmp_path / name).is_symlink() and (tmp_path / target / name).read_text() == name
    for path, words in ((tmp_path / "loop", "is a link to itself"), (Path("/proc"), "a disk is mounted")):
        with pytest.raises(ConfigError, match=words), atomic_folder(path):
            pass
    (tmp_path / ".out.partial").symlink_to("real")
    with pytest.raises(ConfigError, match=r"\.out\.partial is a link"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "real" / "link").exists(), "it was cleared"
    names = {"real", "later", "link", "new", "loop", ".out.partial"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_an_address_answers_or_it_is_said_why_not():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"http://127.0.0.1:{port}/path", f"ray://127.0.0.1:{port}"):
            assert why_no_answer(address, port=1, timeout=5) is None
        assert why_no_answer("127.0.0.1", port=port, timeout=5) is None
    assert "refused" in why_no_answer("127.0.0.1", port=port, timeout=5)
    assert "Port" in why_no_answer("127.0.0.1:70000", port=port, timeout=5)
    assert "IPv6" in why_no_answer("http://[::1", port=port, timeout=5)
