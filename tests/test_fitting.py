"""What cannot fit is refused before it starts: memory, disk, and what each refusal proposes instead."""

import io
import os
import shlex
import shutil
import subprocess
from collections import namedtuple
from time import process_time

import psutil
import pytest
import torch
from cases import standing
from test_train import train

import lowbit_dist.machine
from lowbit_dist import checkpoint, configfile, memory
from lowbit_dist.checkpoint import Checkpoint, space
from lowbit_dist.cluster import checks
from lowbit_dist.config import ConfigError
from lowbit_dist.memory import fitting, machine

VOCAB = 32_000
GB = 10**9


def load(content, overrides=()):
    """As from a file and the words behind it."""
    import yaml

    with io.StringIO(yaml.safe_dump(content)) as file:
        data = yaml.safe_load(file)
    for override in overrides:
        configfile._apply_override(data, override)
    return configfile.from_dict(data)


def content_of(**sections):
    return {"data": {"path": "none", "seq_len": 256}, **sections}


def refusal(check, *arguments):
    with pytest.raises(ConfigError) as error:
        check(*arguments)
    text = str(error.value)
    assert "\n" not in text
    return text


# ------------------------------------------------------------------ memory

DENSE = {"name": "dense"}
MODEL = {"hidden_size": 2048, "intermediate_size": 5632, "layers": 20, "heads": 16, "kv_heads": 16}
REFUSED = {
    "states": (
        content_of(model={"preset": "1b"}, optimizer={"states": "fp32"}, train={"micro_batch": 1}),
        26,
        "optimizer_states",
        ["optimizer.states"],
    ),
    "activations": (
        content_of(model={"preset": "130m"}, train={"micro_batch": 32, "batch_tokens": 32 * 512}),
        9,
        "activations",
        ["train.activation_checkpointing"],
    ),
    "micro-batch": (
        content_of(
            model={"preset": "130m"},
            train={"micro_batch": 256, "batch_tokens": 256 * 512, "activation_checkpointing": True},
        ),
        10,
        "transient",
        ["train.micro_batch"],
    ),
    "whole weights": (
        content_of(
            model={"preset": "320m"},
            method=DENSE,
            zero={"stage": 0},
            train={"micro_batch": 2, "batch_tokens": 1024},
        ),
        13,
        "other_weights",
        ["zero.stage"],
    ),
    "latent weights": (
        content_of(model={"preset": "1b"}, method=DENSE, train={"micro_batch": 1}, cluster={"workers": 1}),
        18,
        "other_weights",
        ["method.name"],
    ),
    "processes": (
        content_of(train={"micro_batch": 1}, cluster={"workers": 8}),
        5,
        "process",
        ["cluster.workers"],
    ),
    "several": (
        content_of(
            model={"preset": "320m"},
            method=DENSE,
            zero={"stage": 0},
            optimizer={"states": "fp32"},
            train={"batch_tokens": 4096},
        ),
        8,
        "optimizer_states",
        None,
    ),
    "latent weights with options": (
        content_of(
            model={"preset": "1b"},
            method={"name": "trilm", "slices": 2},
            train={"micro_batch": 1},
            cluster={"workers": 1},
        ),
        18,
        "other_weights",
        ["method"],
    ),
    "several, of which one is never right": (  # Adafactor's states are not kept in 8 bits
        content_of(
            model={"preset": "320m"},
            method=DENSE,
            zero={"stage": 0},
            optimizer={"name": "adafactor"},
            train={"batch_tokens": 4096},
        ),
        7,
        "other_weights",
        None,
    ),
    "a preset": (content_of(model={"preset": "7b"}), 24, "gradients", ["model.preset"]),
    "sizes": (content_of(model=MODEL | {"max_seq_len": 512}), 5, "gradients", ["model"]),
}


LATER = {
    "several",
    "several, of which one is never right",
    "sizes",
    "activations",
    "whole weights",
    "latent weights with options",
}  # others say the same of their kinds


@pytest.mark.parametrize(
    "case", standing({name: (case,) for name, case in REFUSED.items()}, *sorted(REFUSED.keys() - LATER))
)
def test_a_run_that_cannot_fit_is_refused_with_what_to_cut_and_what_fits(case):
    content, available, part, changed = case
    budget = memory.MemoryBudget("this machine", int(available * GB))
    text = refusal(memory.check_memory, load(content), VOCAB, budget)
    assert f"the largest part is {part} with " in text
    assert f"this machine has {available:g} GB free" in text
    words = shlex.split(text.rpartition("write ")[2].partition(", which needs")[0])
    names = [word.partition("=")[0] for word in words]
    assert len(names) > 1 if changed is None else names == changed
    # What is proposed is accepted, pasted behind the same file.
    memory.check_memory(load(content, words), VOCAB, budget)


def test_what_is_needed_is_the_peak_the_process_and_a_copy_of_the_checkpoint():
    config = load(content_of())
    plan = memory.plan(config, VOCAB, 2)
    found = memory.fits_here(config, VOCAB)
    copy = checkpoint.checkpoint_bytes(config, VOCAB) // 2
    assert found["needed_bytes_per_worker"] == plan["peak_bytes_per_worker"] + copy + fitting.PROCESS


def test_a_run_just_fits_into_what_it_needs():
    config = load(content_of(model={"preset": "130m"}))
    needed = fitting.fit(config, VOCAB, memory.MemoryBudget("here", 100 * GB)).needed
    memory.check_memory(config, VOCAB, memory.MemoryBudget("here", 2 * needed))
    refusal(memory.check_memory, config, VOCAB, memory.MemoryBudget("here", 2 * needed - 2))
    # On GPUs each worker has its own.
    budget = memory.MemoryBudget("a GPU", needed + fitting.CUDA_CONTEXT, on_gpu=True)
    memory.check_memory(config, VOCAB, budget)
    text = refusal(memory.check_memory, config, VOCAB, budget._replace(bytes=GB))
    assert "on each worker's GPU, but a GPU has 1 GB for it" in text


def test_more_machines_or_more_gpus_are_a_way_to_fit():
    content = content_of(model={"preset": "7b"}, train={"batch_tokens": 256 * 64, "micro_batch": 1})
    config = load(content)
    for budget in (
        memory.MemoryBudget("each of the 8 machines", 20 * GB, machines=8, most_workers=8),
        memory.MemoryBudget("a GPU of this machine", 20 * GB, on_gpu=True, most_workers=8),
    ):
        text = refusal(memory.check_memory, config, VOCAB, budget)
        assert "write cluster.workers=4, which needs" in text
        memory.check_memory(load(content, ["cluster.workers=4"]), VOCAB, budget)
    crowded = memory.MemoryBudget("each of the 2 machines", 20 * GB, machines=2)
    assert crowded.per_worker(4) == crowded.per_worker(3) == 10 * GB


def test_nothing_is_proposed_where_nothing_fits():
    text = refusal(
        memory.check_memory, load(content_of()), VOCAB, memory.MemoryBudget("this machine", GB // 2)
    )
    assert text.endswith("free memory, or train on more machines")
    assert "the largest part is process with " in text


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("preset", ["tiny", pytest.param("1b", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [{"name": "dqt"}, {"name": "bitnet"}])
def test_what_is_let_through_without_a_simulation_fits(method, preset, checkpointing):
    for micro_batch, stage in ((1, None), (8, 0)):
        content = content_of(
            model={"preset": preset},
            method=method,
            train={
                "micro_batch": micro_batch,
                "batch_tokens": 256 * micro_batch,
                "activation_checkpointing": checkpointing,
            },
            optimizer={"states": "fp32"},
            zero={} if method["name"] == "dqt" else {"stage": stage},
            cluster={"workers": 1},
        )
        config = load(content)
        needed = fitting.fit(config, VOCAB, memory.MemoryBudget("here", 10**15)).needed
        assert not fitting._is_small(config, VOCAB, memory.MemoryBudget("here", needed))
        assert fitting._is_small(config, VOCAB, memory.MemoryBudget("here", 10**15))


def test_seventy_billion_parameters_are_refused_within_ten_seconds():
    config = load(content_of(model={"preset": "70b"}))
    start = process_time()
    text = refusal(memory.check_memory, config, VOCAB, memory.MemoryBudget("this machine", 24 * GB))
    assert process_time() - start < 10
    assert "need at least" in text
    assert "write model.preset=1b, which needs" in text


# ------------------------------------------------------------------ what this machine has

GROUP = {
    "v2": ("0::/jobs/run\n", "", "memory.max", "memory.current", "inactive_file"),
    "v1": (
        "5:cpu:/\n4:memory:/jobs/run\n0::/\n",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


@pytest.mark.parametrize("version", GROUP)
def test_a_containers_limit_counts_less_its_use(version, tmp_path, monkeypatch):
    own, controller, limit, use, cache = GROUP[version]
    monkeypatch.setattr(lowbit_dist.machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(lowbit_dist.machine, "OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(own)
    unlimited = machine.available_memory()
    root = tmp_path / "cgroup" / controller

    def write(folder, allowed):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{allowed}\n")
        (folder / use).write_text("300000000\n")
        (folder / "memory.stat").write_text(f"anon 1\n{cache} 100000000\n")

    write(root / "jobs" / "run", "max")
    assert machine.available_memory() == pytest.approx(unlimited, rel=0.2)
    write(root / "jobs" / "run", GB)
    assert machine.available_memory() == 0.8 * GB - 0.05 * GB
    write(root / "jobs", GB // 2)  # the group around it
    assert machine.available_memory() == 0.3 * GB - 0.025 * GB
    # In a container the process's own group is the root.
    shutil.rmtree(root / "jobs")
    write(root, GB)
    assert machine.available_memory() == 0.8 * GB - 0.05 * GB


def test_the_smallest_gpu_is_what_a_worker_has(monkeypatch):
    properties = namedtuple("Properties", "total_memory")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: properties((80 * GB, 40 * GB)[i]), raising=False
    )
    for asked in ("auto", 1):
        budget = memory.local_budget(load(content_of(cluster={"gpus_per_worker": asked})))
        assert (budget.on_gpu, budget.per_worker(2), budget.most_workers) == (True, 40 * GB, 2)
    budget = memory.local_budget(load(content_of(cluster={"gpus_per_worker": 0})))
    assert not budget.on_gpu
    assert budget.bytes < psutil.virtual_memory().total


# ------------------------------------------------------------------ disk


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"method": {"name": "dqt", "grid": "int3", "granularity": "row"}, "optimizer": {"states": "fp32"}},
        pytest.param(
            {"method": {"name": "dqt", "tensors": "all"}, "zero": {"residency": "replicated"}},
            marks=pytest.mark.slow,
        ),
        pytest.param({"method": {"name": "dense"}, "optimizer": {"states": "bf16"}}, marks=pytest.mark.slow),
        {"method": {"name": "bitnet"}, "zero": {"stage": 0}},
    ],
    ids=str,
)
def test_a_checkpoints_size_is_known_beforehand(sections, ranks, small, tmp_path):
    steps = {"steps": 2, "eval_every": 2, "save_every": 2}
    content = small(**{**sections, "train": steps, "cluster": {"workers": 2}})
    if "method" in sections:
        content["method"] = sections["method"]
    ranks(2).run(train, content)
    sizes = Checkpoint.open(tmp_path / "small" / "checkpoints" / "step-2").components()
    planned = checkpoint.checkpoint_bytes(load(content), 512)
    assert planned == pytest.approx(sum(sizes.values()), rel=0.02)


def on_disk_at_once(steps, save_every, keep_last, keep_every):
    """By doing what a run does."""
    there, most = [], 0
    for step in [*range(save_every, steps, save_every), steps]:
        there.append(step)
        most = max(most, len(there))
        there = [s for s in there[:-keep_last] if keep_every and s % keep_every == 0] + there[-keep_last:]
    return most


def test_as_many_checkpoints_are_counted_as_a_run_has_on_disk_at_once():
    for steps in (1, 4, 10, 37, 100):
        for save_every in (1, 4, 10, 200):
            for keep_last in (1, 3, 8):
                for keep_every in (None, 2 * save_every, 3 * save_every):
                    content = content_of(
                        train={
                            "steps": steps,
                            "save_every": save_every,
                            "keep_last": keep_last,
                            "keep_every": keep_every,
                        }
                    )
                    expected = on_disk_at_once(steps, save_every, keep_last, keep_every)
                    assert space.at_once(load(content)) == expected, content


@pytest.fixture
def run(tmp_path):
    """A run's configuration, its folder and a checkpoint's size."""
    content = content_of(run={"dir": str(tmp_path / "runs")}, train={"steps": 1000})
    return content, tmp_path / "runs" / "run", checkpoint.checkpoint_bytes(load(content), VOCAB)


def has_free(monkeypatch, free):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**15, 0, int(free)))


def test_a_run_whose_checkpoints_do_not_fit_on_the_disk_is_refused(run, monkeypatch):
    content, folder, size = run
    has_free(monkeypatch, 4 * size)
    checkpoint.check_disk(load(content), VOCAB)
    has_free(monkeypatch, 4 * size - 1)
    text = refusal(checkpoint.check_disk, load(content), VOCAB)
    assert f"run.dir ({folder.parent}) must have room for 4 checkpoints at once" in text
    assert "write train.keep_last=1, free 1 B or write a run.dir with more room" in text
    checkpoint.check_disk(load(content, ["train.keep_last=1"]), VOCAB)
    # Kept for good are those of steps 500 and 1000, of which the last is among the last.
    content["train"] |= {"keep_every": 500}
    text = refusal(checkpoint.check_disk, load(content), VOCAB)
    assert "room for 5 checkpoints" in text and "train.keep_every 500" in text
    has_free(monkeypatch, 2 * size)
    text = refusal(checkpoint.check_disk, load(content), VOCAB)
    assert "write train.keep_last=1 train.keep_every=null," in text
    checkpoint.check_disk(load(content, ["train.keep_last=1", "train.keep_every=null"]), VOCAB)
    has_free(monkeypatch, size)
    assert "keep_last=1" not in refusal(checkpoint.check_disk, load(content), VOCAB)


def test_checkpoints_that_are_there_already_need_no_room(run, monkeypatch):
    content, folder, size = run
    for step in (100, 200, 300):
        path = folder / "checkpoints" / f"step-{step}"
        path.mkdir(parents=True)
        with (path / "shard-00000.safetensors").open("wb") as file:
            file.truncate(size)
    has_free(monkeypatch, size)
    checkpoint.check_disk(load(content), VOCAB)
    has_free(monkeypatch, size - 1)
    assert "free beside the" in refusal(checkpoint.check_disk, load(content), VOCAB)


def test_a_small_disk_is_found_too_small(run, tmp_path):
    small = tmp_path / "runs"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a file system, and not everywhere")
    try:
        text = refusal(checkpoint.check_disk, load(run[0]), VOCAB)
        assert f"but {small} has 1.05 MB free" in text
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ------------------------------------------------------------------ before a run


def test_a_launch_is_refused_before_anything_starts(small, monkeypatch, tmp_path):
    config = load(small(cluster={"workers": 1}))
    monkeypatch.setenv("RAY_ADDRESS", "")
    with monkeypatch.context() as patch:
        patch.setattr(machine, "available_memory", lambda: machine.RAY + GB // 2)
        text = refusal(checks.check, config)
        assert text.startswith("cluster.workers (1) needs ") and "this machine has 500 MB free" in text
    with monkeypatch.context() as patch:
        has_free(patch, 1000)
        assert refusal(checks.check, config).startswith(f"run.dir ({tmp_path}) must have room for")
    assert not (tmp_path / "small").exists()
    checks.check(config)
    assert (tmp_path / "small").is_dir()


def test_the_plan_says_whether_the_run_fits_on_this_machine(monkeypatch):
    from rich.console import Console

    from lowbit_dist.cli import tables

    config = load(content_of())
    plan = memory.plan(config, VOCAB)
    for available, fits in ((100 * GB, True), (GB, False)):
        monkeypatch.setattr(machine, "available_memory", lambda free=available: machine.RAY + free)
        found = plan | memory.fits_here(config, VOCAB)
        assert (found["available_bytes_per_worker"], found["fits"]) == (available // 2, fits)
        with io.StringIO() as file:
            tables.memory_table(Console(file=file, width=120), found)
            text = " ".join(file.getvalue().split())
        assert f"each: the run {'fits' if fits else 'does not fit'}." in text
