"""What the system gives a process: processors by affinity and quota, and the kernel's count of kills."""

import os
import subprocess
import sys

import pytest

from lowbit_dist import configfile, machine
from lowbit_dist.cluster import checks
from lowbit_dist.config import ConfigError

ON_ONE = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
from lowbit_dist.machine import processors
print(processors())
"""


@pytest.fixture
def group(tmp_path, monkeypatch):
    """`group(version, controller, {file: content}, above={...})`: the control group of this process."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "VMSTAT", tmp_path / "vmstat")
    (tmp_path / "own").write_text("")
    (tmp_path / "vmstat").write_text("pgfault 5\noom_kill 7\n")

    def write(version, controller, files, above=None):
        root = tmp_path / "cgroup" / (controller if version == 1 else "")
        (tmp_path / "own").write_text(
            f"3:{controller},x:/jobs/run\n0::/\n" if version == 1 else "0::/jobs/run\n"
        )
        for folder, contents in ((root / "jobs", above or {}), (root / "jobs/run", files)):
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in contents.items():
                (folder / name).write_text(content)

    return write


def test_affinity_counts():
    cpu = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", ON_ONE, str(cpu)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"


def quota(version, of, period=100_000):
    if version == 2:
        return {"cpu.max": f"{'max' if of is None else of} {period}\n"}
    return {"cpu.cfs_quota_us": f"{-1 if of is None else of}\n", "cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("own", "above", "expected"),
    [
        (None, None, 8),
        (150_000, None, 2),  # rounded up
        (50_000, None, 1),
        (1_600_000, None, 8),
        (None, 300_000, 3),  # of the group around it
        (400_000, 300_000, 3),
    ],
)
def test_a_quota_of_processor_time_counts(version, own, above, expected, group, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert machine.processors() == 8
    group(version, "cpu", quota(version, own), quota(version, above))
    assert machine.processors() == expected


def test_a_launch_has_the_processors_that_its_process_may_use(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = configfile.from_dict({"data": {"path": "absent"}, "cluster": {"workers": 2}})
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with pytest.raises(ConfigError, match=r"are 2 CPUs, but this machine has 1: 1 worker fits"):
            checks.check(config)
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("version", "file"), [(1, {"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"}),
                          (2, {"memory.events": "low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\n"})]
)  # fmt: skip
def test_kills_for_lack_of_memory_are_those_of_the_group_or_else_of_the_machine(version, file, group):
    assert machine.oom_kills() == 7
    group(version, "memory", {})
    assert machine.oom_kills() == 7
    group(version, "memory", file)
    assert machine.oom_kills() == 3


def test_a_system_without_any_of_these_files_has_no_limits(tmp_path, monkeypatch):
    for name in ("CGROUPS", "OWN_CGROUPS", "VMSTAT"):
        monkeypatch.setattr(machine, name, tmp_path / "absent")
    assert machine.processors() == len(os.sched_getaffinity(0))
    assert list(machine.memory_limits()) == []
    assert machine.oom_kills() == 0


def test_peak_memory_is_that_of_the_process_and_not_of_the_one_that_started_it():
    large = b"x" * 500_000_000
    ask = 'from lowbit_dist.machine import peak_memory; x = b"x" * %d; print(peak_memory())'
    of_child, of_larger = (
        int(subprocess.run([sys.executable, "-c", ask % n], capture_output=True, check=True).stdout)
        for n in (0, 100_000_000)
    )
    assert machine.peak_memory() > len(large) > 2 * of_child
    assert of_larger - of_child == pytest.approx(100e6, rel=0.1)


def test_sums_in_any_order_leave_the_order_of_others_as_it_was():
    import torch

    before = torch.get_deterministic_debug_mode()
    try:
        for mode in (0, 1, 2):  # any order, a warning of it, an error
            torch.set_deterministic_debug_mode(mode)
            with pytest.raises(KeyError), machine.in_any_order():
                assert torch.get_deterministic_debug_mode() == 0
                raise KeyError
            assert torch.get_deterministic_debug_mode() == mode
    finally:
        torch.set_deterministic_debug_mode(before)
