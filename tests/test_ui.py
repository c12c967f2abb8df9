"""`lowbit ui`: MLflow's pages while they are looked at, and nothing of them afterwards."""

import functools
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from lowbit_dist.cli import ui
from lowbit_dist.tracking import stores


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The URI of a store with one experiment."""
    from mlflow.tracking import MlflowClient

    file = tmp_path_factory.mktemp("ui") / "mlflow.db"
    stores.make_database(file)
    MlflowClient(f"sqlite:///{file}").create_experiment("lowbit")
    return f"sqlite:///{file}"


def free_port():
    with socket.socket() as free:
        free.bind((ui.HOST, 0))
        return free.getsockname()[1]


def started(*arguments):
    """The process of a verb, its output to be read, that hears Ctrl-C as if it were not in the background."""
    hears = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-m", "lowbit_dist", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=hears)


@pytest.mark.integration
@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_table_of_runs_is_served_until_the_end(store, signum):
    port = free_port()
    with started("ui", "--store", store, "--port", port) as showing:
        address = showing.stdout.readline().split()[0]
        assert address == f"http://127.0.0.1:{port}/#/experiments/1/runs"
        with urllib.request.urlopen(address, timeout=60) as page:
            assert b"<html" in page.read()
        showing.send_signal(signum)
        assert showing.wait(60) == 0
    with socket.socket() as again:
        assert again.connect_ex((ui.HOST, port)) != 0


@pytest.mark.integration
def test_what_mlflow_says_is_passed_on_if_it_does_not_start(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database")
    command = [sys.executable, "-m", "lowbit_dist", "ui", "--store", f"sqlite:///{tmp_path}/mlflow.db"]
    done = subprocess.run(
        [*command, "--port", str(free_port())], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 1
    assert "MLflow's server does not start: " in done.stderr and "not a database" in done.stderr


def test_what_cannot_be_shown_is_one_line(lowbit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind((ui.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        (tmp_path / "mlflow.db").touch()
        answers = {
            ("--store", "sqlite:///gone.db"): "--store (sqlite:///gone.db) does not exist; write",
            ("--store", "https://me:secret@host"): "--store (https://host) is a server with pages of its own",
            ("--port", port): f"--port ({port}) cannot be used (Address already in use); write --port ",
        }
        for arguments, words in answers.items():
            done = lowbit("ui", *arguments)
            (line,) = done.stderr.splitlines()
            assert (done.returncode, done.stdout) == (2, "") and words in line


def test_a_summary_says_how_runs_are_seen():
    assert ui.where("1a", "sqlite:///mlflow.db") == "run 1a; see: lowbit ui"
    assert ui.where("1a", "sqlite:///other.db") == "run 1a; see: lowbit ui --store sqlite:///other.db"
    assert ui.where("1a", "http://me:secret@host:5000") == "run 1a at http://host:5000"
