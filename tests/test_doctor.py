"""What `lowbit doctor` says of a machine as it is: each fault with its remedy."""

import importlib.metadata
import json
import os

import pytest

from lowbit_dist import doctor, folders, machine

SPACE = {"memory", "/dev/shm", "disk", "this folder"}


@pytest.fixture
def machine_of(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_check_says_what_was_found(lowbit, machine_of):
    report = json.loads(lowbit("doctor", "--json").stdout)
    assert report["checks"]
    for check in report["checks"]:
        assert list(check) == ["name", "status", "found", "advice"]
    assert {"CPUs", "caches", "Ray's folder", "Ray cluster"} <= {check["name"] for check in report["checks"]}


def test_what_is_missing_is_installed_with_the_extras_that_are_needed(machine_of):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    machine_of.setattr(importlib.metadata, "version", absent)
    advice = {finding.name: finding.advice for finding in doctor._packages()}
    assert advice["ray"].startswith("pip install 'ray[data,default,train]<3,>=2.")
    assert advice["deepspeed"] == "pip install 'deepspeed==0.19.8'"


def test_processors_are_those_of_the_process(machine_of):
    machine_of.setattr(os, "sched_getaffinity", lambda pid: {0})
    machine_of.setattr(os, "cpu_count", lambda: 64)
    assert doctor._processors().result.startswith("1 of 64 logical, by affinity, cpuset or quota, ")
    machine_of.setattr(os, "cpu_count", lambda: 1)
    assert doctor._processors().result.startswith("1 logical, ")


def test_memory_is_the_containers_and_kills_are_told(machine_of):
    machine_of.setattr(machine, "memory_limits", lambda: iter([(2_000_000_000, 1_000_000_000)]))
    machine_of.setattr(machine, "oom_kills", lambda: 3)
    (memory,) = [finding for finding in doctor._space() if finding.name == "memory"]
    assert memory.status == "error"
    assert memory.result == "0.9 GB free (2.0 GB in all; so far 3 processes killed for lack of it)"
    machine_of.setattr(machine, "oom_kills", lambda: 0)
    assert "killed" not in next(doctor._space()).result


def test_a_folder_for_ray_is_named_with_what_was_passed_over(machine_of):
    assert doctor._sessions() == ("Ray's folder", "ok", "/tmp", "")
    machine_of.setenv("TMPDIR", "/proc")
    status, result, advice = doctor._sessions()[1:]
    assert (status, advice) == ("warning", "set RAY_TMPDIR to another")
    assert result.startswith("/tmp, for TMPDIR (/proc) cannot be written (")
    machine_of.setenv("RAY_TMPDIR", "/proc")
    status, result, advice = doctor._sessions()[1:]
    assert status == "error"
    assert result.startswith("RAY_TMPDIR (/proc) cannot be written (")
    assert advice.startswith("set RAY_TMPDIR to a folder that can be written")


def test_caches_that_cannot_be_written_are_an_error(machine_of):
    machine_of.setenv("XDG_CACHE_HOME", "/proc")
    finding = doctor._caches()
    assert finding.status == "error"
    assert finding.result.startswith("/proc/lowbit-dist cannot be written (")
    assert finding.advice == "set HOME to a folder that can be written, or XDG_CACHE_HOME"


def test_caches_at_home_are_well(machine_of, tmp_path):
    machine_of.setattr(folders, "_provided", {})
    machine_of.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert doctor._caches() == ("caches", "ok", f"{tmp_path}/lowbit-dist", "")


@pytest.mark.parametrize(
    ("address", "words", "advice"),
    [
        ("http://head:8265", "RAY_ADDRESS (http://head:8265) is the address of Ray's dashboard", "head:6379"),
        ("127.0.0.1:1", "does not answer", "unset it to train on this machine"),
    ],
)
def test_an_address_that_is_no_ray_head_is_an_error(address, words, advice, machine_of):
    machine_of.setenv("RAY_ADDRESS", address)
    finding = doctor._ray()
    assert finding.status == "error"
    assert words in finding.result
    assert advice in finding.advice


def test_rays_own_word_for_this_machine_is_understood(machine_of):
    machine_of.setenv("RAY_ADDRESS", "local")
    assert doctor._ray().status == "ok"
