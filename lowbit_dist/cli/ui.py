"""`lowbit ui`: MLflow's pages of the runs, served to this machine alone."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from typing import IO, Annotated

import typer

from lowbit_dist.cli import console
from lowbit_dist.errors import ConfigError
from lowbit_dist.execution import Tracking

HOST = "127.0.0.1"
START_TIMEOUT, STOP_TIMEOUT = 180.0, 10.0  # seconds
DEFAULT_STORE = str(Tracking().mlflow)


def ui(
    store: Annotated[
        str, typer.Option(metavar="URI", help="Show the runs of this store, a run's tracking.mlflow.")
    ] = DEFAULT_STORE,
    port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="Serve them at this port.")] = 5000,
) -> None:
    """Show runs in a browser, on MLflow's pages, until Ctrl-C; nobody but this machine sees them.

    Example: lowbit ui --port 5001
    """
    with console.answering(False, "starting MLflow") as answer, console.until_interrupted():
        uri = _checked(store, port)
        with tempfile.TemporaryFile() as output, _server(uri, port, output) as server:
            page = _runs_table(server, f"http://{HOST}:{port}", output)
            answer(
                {}, lambda terminal: terminal.print(f"{page}  (Ctrl-C ends it)", markup=False, soft_wrap=True)
            )
            server.wait()


def where(run_id: str | None, store: str) -> str:
    """An MLflow run, and how a person comes to see it."""
    from lowbit_dist.tracking import without_password

    shown = without_password(store)
    if store.startswith(("http://", "https://")):
        return f"run {run_id} at {shown}"
    return f"run {run_id}; see: lowbit ui" + ("" if store == DEFAULT_STORE else f" --store {shown}")


def _checked(store: str, port: int) -> str:
    from lowbit_dist.tracking import stores

    uri, shown = stores.resolve(store), stores.without_password(store)
    if uri.startswith(("http://", "https://")):
        raise ConfigError(f"--store ({shown}) is a server with pages of its own; open them in a browser")
    if uri.startswith("sqlite:") and not stores.sqlite_file(uri).is_file():
        raise ConfigError(
            f"--store ({shown}) does not exist; write the tracking.mlflow of a run, or train one first"
        )
    with socket.socket() as wanted, socket.socket() as free:
        wanted.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind((HOST, 0))
        try:
            wanted.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"--port ({port}) cannot be used ({error.strerror}); write --port {free.getsockname()[1]}, "
                "for example"
            ) from None
    return uri


@contextlib.contextmanager
def _server(uri: str, port: int, output: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """MLflow's server, which ends with this process."""
    options = ["--host", HOST, "--port", str(port), "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "server", *options]
    # Of the store in the environment, since it may hold a password; without its runner of jobs.
    settings = {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    server = subprocess.Popen(
        command, env=os.environ | settings, stdout=output, stderr=output, start_new_session=True
    )
    try:
        yield server
    finally:
        for signum in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, signum)
                server.wait(STOP_TIMEOUT)


def _runs_table(server: "subprocess.Popen[bytes]", address: str, output: IO[bytes]) -> str:
    """The page with the table of runs, once the server answers; of several experiments, their list."""
    question = urllib.request.Request(
        f"{address}/api/2.0/mlflow/experiments/search",
        data=json.dumps({"max_results": 100}).encode(),
        headers={"Content-Type": "application/json"},
    )
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # no proxy knows this machine
    deadline = time.monotonic() + START_TIMEOUT
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), ask(question, timeout=10) as reply:
            experiments = json.load(reply).get("experiments", [])
            # MLflow makes one itself, of number 0, in which nothing trains.
            ours = [one["experiment_id"] for one in experiments if one["experiment_id"] != "0"]
            return f"{address}/#/experiments" + (f"/{ours[0]}/runs" if len(ours) == 1 else "")
        time.sleep(0.2)
    output.seek(0)
    said = output.read().decode(errors="replace").strip().splitlines()
    errors = [line for line in said if re.search(r"(Error|Exception)\b", line)]
    raise RuntimeError(f"MLflow's server does not start: {(errors or said or ['it said nothing'])[-1]}")
