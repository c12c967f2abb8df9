"""A Ray cluster of several hosts on one Linux machine: each in network, process, mount, host name and IPC
namespaces of its own.

A host has its own address, name, /tmp/ray, /dev/shm and process tree; the rest of the file system is shared,
as an NFS would be.  Ending its first process is a power cut; taking its end of the cable down is a partition.
`ray start` runs under a loop, as a service manager runs it.  Needs root and iproute2.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from lowbit_dist.files import locked

CLUSTERS = 8  # at once on a machine, as when tests run side by side


def why_not():
    """Why there can be no such cluster here, if so."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "iproute2 or util-linux is not installed"
    name = f"lbprobe{os.getpid()}"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if probe.returncode:
        return f"no network namespaces here ({probe.stderr.strip()})"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


def own_number(stack):
    """A number that no other cluster here has until the stack is closed."""
    for number in range(CLUSTERS):
        with contextlib.suppress(BlockingIOError):
            stack.enter_context(locked(Path(f"/tmp/lowbit-netcluster-{number}.lock"), timeout=0))
            return number
    raise RuntimeError(f"{CLUSTERS} clusters of hosts run on this machine")


def sh(*commands):
    for command in commands:
        subprocess.run(command.split(), check=True, capture_output=True, text=True)


class NetCluster:
    """A head without processors for workers (host 0), and `hosts` others with `cpus` each.

    mbit: what each host may send, in Mbit/s; without it nothing but the processors sets the pace
    variables: what host i has in its environment besides
    """

    def __init__(self, folder, *, hosts=2, cpus=1, mbit=None, token, variables=lambda i: {}):
        self.folder, self.hosts, self.cpus, self.mbit = Path(folder), hosts, cpus, mbit
        self.variables = variables
        self.token = token
        self.processes = {}
        self._lock = contextlib.ExitStack()
        self.number = own_number(self._lock)
        here = Path(sys.executable).parent
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_memory_monitor_refresh_ms": "0",  # what else fills the memory ends no worker here
            "PATH": f"{here}:{os.environ['PATH']}",
        }
        self.address = f"http://{self.ip(0)}:8265"

    def ns(self, i):
        return f"lb{self.number}-{i}"

    @property
    def bridge(self):
        return f"lb{self.number}-br"

    def ip(self, i):
        return f"10.231.{self.number}.{i + 1}"

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        names = "".join(f"{self.ip(i)} node{i}\n" for i in range(self.hosts + 1))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        self._remove_network()
        try:
            sh(
                f"ip netns add {self.bridge}",
                f"ip -n {self.bridge} link add br0 type bridge",
                f"ip -n {self.bridge} link set br0 up",
            )
            for i in range(self.hosts + 1):
                n = self.ns(i)
                sh(
                    f"ip netns add {n}",
                    f"ip link add eth0 netns {n} type veth peer name {n}b netns {self.bridge}",
                    f"ip -n {self.bridge} link set {n}b master br0 up",
                    f"ip -n {n} addr add {self.ip(i)}/24 dev eth0",
                    f"ip -n {n} link set eth0 up",
                    f"ip -n {n} link set lo up",
                )
                if self.mbit is not None:
                    sh(f"tc -n {n} qdisc add dev eth0 root tbf rate {self.mbit}mbit burst 64k latency 400ms")
            self.start(0)
            self.wait_for(1)
            for i in range(1, self.hosts + 1):
                self.start(i)
            self.wait_for(self.hosts + 1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for i in list(self.processes):
            self.power_off(i)
        self._remove_network()
        self._lock.close()

    def _remove_network(self):
        for name in [self.bridge, *(self.ns(i) for i in range(self.hosts + 1))]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def start(self, i):
        """Power a host on."""
        own = f"--node-ip-address {self.ip(i)} --metrics-export-port 8080 --object-store-memory 100000000"
        if i == 0:
            role = "--head --port 6379 --num-cpus 0 --dashboard-host 0.0.0.0 --dashboard-port 8265"
        else:
            role = f"--address {self.ip(0)}:6379 --num-cpus {self.cpus}"
        private = self.folder / f"ray{i}"
        shutil.rmtree(private, ignore_errors=True)
        private.mkdir()
        script = (
            f"hostname node{i}; mkdir -p /tmp/ray; mount --bind {private} /tmp/ray; "
            f"mount -t tmpfs -o size=1g shm /dev/shm; mount --bind {self.folder}/hosts /etc/hosts; "
            f"while :; do ray start {role} {own} --disable-usage-stats --block; sleep 1; done"
        )
        with (self.folder / f"node{i}.log").open("a") as log:
            self.processes[i] = subprocess.Popen(
                [
                    "ip", "netns", "exec", self.ns(i), "unshare", "--mount", "--pid", "--uts", "--ipc",
                    "--fork", "--mount-proc", "--kill-child=SIGKILL", "bash", "-c", script,
                ],
                stdout=log, stderr=log, env=self.env | self.variables(i), start_new_session=True,
            )  # fmt: skip

    def power_off(self, i):
        process = self.processes.pop(i)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    def processes_of(self, words):
        """Ids of the processes, on whatever host of this cluster, whose command line has these words."""
        own = set()
        for i in range(self.hosts + 1):
            listed = subprocess.run(["ip", "netns", "pids", self.ns(i)], capture_output=True, text=True)
            own |= set(listed.stdout.split())
        found = subprocess.run(["pgrep", "-f", words], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split() if pid in own]

    def link(self, i, state):
        """Put a host's cable in ("up") or pull it ("down")."""
        sh(f"ip -n {self.bridge} link set {self.ns(i)}b {state}")

    def drain(self, node, seconds=120):
        """Announce that a host will be taken away, as a provider of preemptible machines does.

        node: Ray's id of it; the dashboard's list has hosts that died long ago, too
        """
        process = self.run(
            "ray", "drain-node", "--address", f"{self.ip(0)}:6379", "--node-id", node,
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the test takes it",
            "--deadline-remaining-seconds", str(seconds), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output

    def run(self, *command, i=0, token=True, variables=None, **kwargs):
        """A command on the network of a host, with the cluster's token or without one."""
        env = {**self.env, "RAY_API_SERVER_ADDRESS": self.address, **(variables or {})}
        if not token:
            env.pop("RAY_AUTH_TOKEN")
            env["HOME"] = str(self.folder / "nobody")
        return subprocess.Popen(
            ["ip", "netns", "exec", self.ns(i), *command], env=env, text=True, **kwargs
        )  # fmt: skip

    def lowbit(self, *arguments, i=0, token=True, variables=None, timeout=300):
        """`lowbit ...` on the network of a host: (exit code, stdout, stderr)."""
        process = self.run(
            sys.executable, "-m", "lowbit_dist", *map(str, arguments), i=i, token=token, variables=variables,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        stdout, stderr = process.communicate(timeout=timeout)
        return process.returncode, stdout, stderr

    def get(self, path, *, token=True):
        """HTTP status and text of the dashboard's answer."""
        code = (
            "import sys, urllib.request, urllib.error\n"
            "url, token = sys.argv[1], sys.stdin.readline().strip()\n"
            "headers = {'Authorization': 'Bearer ' + token} if sys.argv[2] == '1' else {}\n"
            "try:\n"
            "    r = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10)\n"
            "    print(r.status, r.read().decode())\n"
            "except urllib.error.HTTPError as error:\n"
            "    print(error.code, '')\n"
            "except OSError as error:\n"
            "    print(0, error)\n"
        )
        process = self.run(
            sys.executable, "-c", code, f"{self.address}{path}", str(int(token)),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        status, _, text = process.communicate(self.token, timeout=60)[0].partition(" ")
        return int(status), text

    def alive(self):
        """Addresses of the hosts that Ray takes for alive."""
        status, text = self.get("/nodes?view=summary")
        if status != 200:
            return set()
        summary = json.loads(text)["data"]["summary"]
        alive = (each for each in summary if each.get("raylet", {}).get("state") == "ALIVE")
        return {each["ip"] for each in alive if "ip" in each}  # it is not known at once

    def wait_for(self, n, seconds=180):
        deadline = time.monotonic() + seconds
        while len(self.alive()) < n:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{n} hosts wanted, {self.alive()} are there; see {self.folder}/node*.log")
            time.sleep(0.5)
