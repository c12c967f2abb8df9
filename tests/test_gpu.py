"""One worker on a GPU: its bits repeat, compiled and not, over a stop and a resume; what stays between steps
is the plan's; it computes what a CPU does.  The kernels are compared with the reference in test_kernels.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from test_memory import VOCAB, configuration, load, measured
from test_train import digest, train

pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 0, reason="there is no CUDA GPU")

BF16 = {"precision": "bf16"}
RUNS = {
    **{grid: {"method": {"grid": grid}} for grid in ("ternary", "int2", "int3", "int4", "int6", "int8")},
    **{name: {"method": {"name": name}} for name in ("flip", "bitnet", "trilm", "tequila", "tbt", "dense")},
    "sent on another grid": {"method": {"grid": "int8", "forward": "ternary"}},
    "groups": {"method": {"granularity": "group", "group": 64}},
    **{name: {"optimizer": {"name": name, "lr": 3e-4}} for name in ("lion", "rmsprop", "adafactor", "muon")},
    "rmsprop of elements": {"optimizer": {"name": "rmsprop", "second_moment": "element", "lr": 3e-4}},
    "states in fp32": {"optimizer": {"states": "fp32"}},
    "fp32": {"precision": "fp32"},
    "integers": {"precision": {"matmul": "int8"}},
    "integers, gradients too": {
        "method": {"granularity": "row"}, "precision": {"matmul": "int8", "grad_input": "int8"}
    },
    "integers of 8 bits": {"method": {"grid": "int8"}, "precision": {"matmul": "int8"}},
    "fp8": {"precision": "fp8"},
    "compiled": {"train": {"compile": "on"}},
    "compiled, dense": {"method": {"name": "dense"}, "train": {"compile": "on"}},
    "compiled, integers": {
        "precision": {"matmul": "int8", "grad_input": "int8"}, "train": {"compile": "on"}
    },
    "recomputed": {"train": {"activation_checkpointing": True}},
    "gradients released": {
        "train": {"gradient_release": True, "micro_batch": 4}, "cluster": {"workers": 1}
    },
    "reproducible": {"precision": "fp32", "train": {"reproducible": True}},
    "stage 2": {"method": {"name": "bitnet"}, "zero": {"stage": 2}, "optimizer": {"states": "fp32"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def gpus(tmp_path_factory):
    """`gpus(1)`: as `ranks`, on a GPU."""
    one = Ranks(1, str(tmp_path_factory.mktemp("store") / "file"), "cuda")
    yield {1: one}.__getitem__
    one.close()


def losses(content):
    """The rows of a run's metrics that have a loss."""
    file = Path(content["run"]["dir"], content["run"]["name"], "metrics.jsonl")
    return [row for row in map(json.loads, file.read_text().splitlines()) if "loss" in row]


@pytest.mark.parametrize("case", RUNS)
def test_a_stopped_and_resumed_run_ends_as_one_that_was_not(case, gpus, small):
    sections = {**BF16, **RUNS[case]}
    sections["train"] = {"save_every": 4, **sections.get("train", {})}
    whole = gpus(1).run(train, small(run={"name": "whole"}, **sections))[0]
    stopped = small(run={"name": "stopped"}, **sections)
    gpus(1).run(train, stopped, stop_at=4)
    assert digest(gpus, 1, stopped) == whole["digest"]
    first, *_, last = (row["loss"] for row in losses(stopped))
    assert last < first


def test_a_gpu_computes_what_a_cpu_does(gpus, ranks, small):
    """float32: the first loss and norm are those of a CPU, to the order of sums."""
    few = {"steps": 1, "log_every": 1, "eval_every": 1, "save_every": 1}
    found = []
    for place, workers in (("gpu", gpus), ("cpu", ranks)):
        content = small(run={"name": place}, train=few)
        workers(1).run(train, content)
        found.append(losses(content)[0])
    on_gpu, on_cpu = found
    for name in ("loss", "grad_norm"):
        assert on_gpu[name] == pytest.approx(on_cpu[name], rel=1e-5), name


@pytest.mark.parametrize(
    "case",
    [{}, {"method": {"grid": "int8"}}, {"method": {"name": "bitnet"}}, {"method": {"name": "dense"}}],
    ids=str,
)
def test_what_stays_between_steps_is_the_plans(case, gpus):
    from lowbit_dist.memory.plan import planned

    content = configuration(**case, precision="bf16")
    plan, (found,) = planned(load(content), VOCAB, 1), gpus(1).run(measured, content)
    resident = {"low_bit_weights", "scales", "other_weights", "optimizer_states"}
    assert {n: plan["components"][n] for n in resident} == {n: found["components"][n] for n in resident}
    assert found["peak_bytes_per_worker"] <= plan["peak_bytes_per_worker"] * 1.1


def test_a_7b_ternary_step_with_gradient_release_peaks_below_24_gigabytes(gpus):
    ((peak, resident),) = gpus(1).run(peak_of_7b)
    print(f"7b: resident {resident / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB")
    assert peak < 24e9


def peak_of_7b():
    from lowbit_dist import configfile, model, ops, zero

    config = configfile.from_dict(
        {
            "model": {"preset": "7b"},
            "data": {"path": "none", "seq_len": 2048},
            "train": {
                "micro_batch": 4, "batch_tokens": 4 * 2048, "activation_checkpointing": True,
                "gradient_release": True,
            },
            "cluster": {"workers": 1},
        }
    )  # fmt: skip
    built = model.build(config.model, 32_000, config.method, torch.bfloat16)
    engine = zero.Engine(config, built, None, model.low_bit_names(built, config.method))
    for shard in engine.shards:  # which a start takes minutes to draw on the host
        if shard.codes is None:
            shard.weight.normal_(0, 0.02)
        else:
            levels = torch.randint(-1, 2, (shard.numel,), dtype=torch.int8, device="cuda")
            shard.codes.copy_(ops.pack(levels, grid=shard.grid))
            shard.scale.fill_(0.02)
    engine.refresh(1)
    tokens = torch.randint(0, 32_000, (4, 2048), device="cuda")
    torch.cuda.empty_cache()
    resident = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for number in (1, 2, 3):
        now = ops.Now(lr=1e-3, weight_decay=0.01, step=number, seed=0)
        with engine.step(now, previous_norm=1.0) as step:
            loss = step.backward(tokens)
        assert step.done.flips > 0 and torch.isfinite(loss)
    return torch.cuda.max_memory_allocated(), resident


def test_a_run_on_rays_gpu_is_stopped_and_resumed_from_the_command_line(small, tmp_path):
    pytest.importorskip("ray")
    digests = []
    for name, steps in (("whole", [8]), ("halves", [4, 8])):
        for n in steps:
            content = small(run={"name": name}, schedule={"warmup_steps": 2, "name": "constant"})
            content["train"] |= {"steps": n, "save_every": 4, "eval_every": 4}
            content["cluster"] = {"workers": 1}
            file = tmp_path / f"{name}.json"
            file.write_text(json.dumps(content))
            done = subprocess.run(
                [sys.executable, "-m", "lowbit_dist", "train", str(file), "--json"],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"}, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        digests.append(json.loads(done.stdout)["digest"])
    assert digests[0] == digests[1]
