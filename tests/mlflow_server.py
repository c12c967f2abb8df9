"""A real MLflow tracking server on loopback, which can be stopped, killed and started again."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request


class Server:
    """`under`: words before its command, as ("nice", "-n", "19")."""

    def __init__(self, folder, under=()):
        self.folder, self.under = folder, under
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.uri = f"http://127.0.0.1:{free.getsockname()[1]}"

    def start(self):
        """Start it, also after it was killed, and wait until it answers."""
        self.process = subprocess.Popen(
            [
                *self.under, sys.executable, "-m", "mlflow", "server", "--workers", "1",
                "--host", "127.0.0.1", "--port", self.uri.rpartition(":")[2],
                "--backend-store-uri", f"sqlite:///{self.folder}/server.db",
                "--artifacts-destination", str(self.folder / "artifacts"),
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 240
        while True:
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise AssertionError("the server never answered")
            time.sleep(0.2)

    def signal(self, signum):
        os.killpg(self.process.pid, signum)
        if signum == signal.SIGKILL:
            self.process.wait()

    def steps(self, run_id, key="train/loss"):
        from mlflow.tracking import MlflowClient

        return [point.step for point in MlflowClient(self.uri).get_metric_history(run_id, key)]
