"""Steps that are not to be trusted: which they are, and that they leave no trace in a run."""

import math
import time
from pathlib import Path

import pytest
from test_train import digest, train

from lowbit_dist import guard

# ------------------------------------------------------------------ which they are


def test_a_spike_is_six_deviations_above_the_mean_of_at_least_sixteen_losses():
    before = [4.0, 4.2] * 8  # mean 4.1, deviation 0.1
    assert not guard.is_spike(4.69, before)
    assert guard.is_spike(4.71, before)
    assert not guard.is_spike(4.71, before[:15])
    assert not guard.is_spike(0.1, before), "a loss that falls is none"
    assert not guard.is_spike(math.nan, before), "what is no number is skipped for that"


def test_losses_that_hardly_differ_are_no_reason_for_alarm():
    flat = [2.0 + 1e-9 * (i % 2) for i in range(64)]
    assert not guard.is_spike(2.0 + 1e-7, flat)
    assert guard.is_spike(2.02, flat)


def test_the_largest_norm_follows_the_median_and_forgets():
    assert guard.norm_limit([], 1000.0) == math.inf
    assert guard.norm_limit([0.0, 0.0], 1000.0) == math.inf, "of zeros nothing can be told"
    assert guard.norm_limit([1.0, 2.0, 1e9], 1000.0) == 2000.0
    window = ()
    for i in range(100):
        window = guard.append(window, float(i))
    assert window == tuple(float(i) for i in range(36, 100))


# ------------------------------------------------------------------ what a run does about them


def train_with(configuration, faults, *, on_rank=0, stop_at=None):
    """`train`, in whose steps `faults` ({step: word}) something goes wrong on one worker.

    (Under stage 0 on all: there, all have the same gradient by then.)
    `skip` leaves the step out as if nothing had ever been wrong with it: the reference of the others.
    """
    from lowbit_dist.zero import Engine
    from lowbit_dist.zero.engine import Step

    update, read, backward = Engine._update, Engine._read, Step.backward

    def skipping_update(engine, now, limit, details):
        return update(engine, now, -1.0 if faults.get(now.step) == "skip" else limit, details)

    def fault_of(engine):
        return faults.get((engine.n_passes - 1) // (engine.micro_batches // engine.world) + 1)

    def spoiled_read(engine, numbers):  # before the gradients' norm is known
        fault = fault_of(engine)
        is_spoiled = engine.rank == on_rank or engine.config.zero.stage == 0
        if fault not in (None, "loss", "skip") and is_spoiled:
            gradients = [g for g in engine.gradients() if g.numel()]
            if fault == "times":
                for g in gradients:
                    g.mul_(1e6)
            else:
                gradients[0].view(-1)[3] = float(fault)
        return read(engine, numbers)

    def spoiled_backward(passes, *batch):
        loss, engine = backward(passes, *batch), passes.engine
        engine.n_passes = getattr(engine, "n_passes", 0) + 1
        if fault_of(engine) == "loss" and engine.rank == on_rank:
            loss = loss * math.nan
        return loss

    Engine._update, Engine._read, Step.backward = skipping_update, spoiled_read, spoiled_backward
    try:
        return train(configuration, stop_at)
    finally:
        Engine._update, Engine._read, Step.backward = update, read, backward


STEPS = (3, 4, 6)
METHODS = {
    "ternary": {},
    "int8, fp32 states": {"method": {"grid": "int8"}, "optimizer": {"states": "fp32"}},
    "dense, stage 0": {"method": {"name": "dense"}, "zero": {"stage": 0}, "optimizer": {"states": "fp32"}},
    "dense, stage 2": {"method": {"name": "dense"}, "zero": {"stage": 2}, "optimizer": {"states": "fp32"}},
    "dense, stage 3, bf16": {"method": {"name": "dense"}, "precision": "bf16"},
    "dense, stage 0, bf16": {
        "method": {"name": "dense"}, "zero": {"stage": 0}, "optimizer": {"states": "fp32"},
        "precision": "bf16",
    },
}  # fmt: skip


ALWAYS = ("ternary", "dense, stage 0")


@pytest.fixture(
    params=[pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in METHODS]
)
def method(request):
    sections = {"model": {"layers": 1}, "train": {"steps": 7, "save_every": 7, "eval_every": 7}}
    return {**METHODS[request.param], **sections}


def test_wrong_steps_leave_what_a_run_without_them_has(method, ranks, small):
    def run(name, fault=None):
        configuration = small(run={"name": name}, **method)
        return ranks(2).run(train_with, configuration, dict.fromkeys(STEPS, fault), on_rank=1)[0]

    expected = run("left-out", "skip")["digest"]
    assert run("healthy")["digest"] != expected
    for fault in ("nan", "inf", "times", "loss"):
        found = run(fault, fault)
        assert (found["skipped_steps"], found["digest"]) == (len(STEPS), expected), fault


def diverging(configuration, faults):
    try:
        train_with(configuration, faults)
    except guard.Diverged as error:
        return str(error)
    raise AssertionError("the run went on")


def test_a_run_whose_steps_are_all_wrong_ends_with_its_last_checkpoint_intact(ranks, small, tmp_path):
    from lowbit_dist import checkpoint

    sections = {"train": {"steps": 20, "save_every": 2, "keep_last": 2, "max_skipped": 4}}
    good = ranks(2).run(train, small(run={"name": "good"}, train={"steps": 5, "save_every": 5}))
    answers = ranks(2).run(
        diverging, small(run={"name": "bad"}, **sections), dict.fromkeys(range(6, 21), "nan")
    )
    assert all("of 4 steps in a row, up to step 9, cannot be used (loss " in answer for answer in answers)
    deadline = time.monotonic() + 60  # who gives up does not wait for the thread that writes
    while (newest := checkpoint.latest(tmp_path / "bad")) is None or newest.name != "step-8":
        assert time.monotonic() < deadline, newest
        time.sleep(0.1)
    opened = checkpoint.Checkpoint.open(newest)
    assert (opened.position.skipped_steps, opened.position.skipped_in_a_row) == (3, 3)
    assert opened.digest() != good[0]["digest"], "the learning rate of the shorter run differs"
    five = ranks(2).run(train, small(run={"name": "five"}, **sections), stop_at=6)
    assert five[0] is None
    # What came after step 5 changed nothing: a run that leaves those steps out has the same weights.
    ranks(2).run(
        train_with, small(run={"name": "left"}, **sections), {6: "skip", 7: "skip", 8: "skip"}, stop_at=8
    )
    left = checkpoint.Checkpoint.open(checkpoint.latest(tmp_path / "left"))
    assert left.digest() == opened.digest()


# ------------------------------------------------------------------ spikes


def train_with_spike(configuration, at, *, stop_at=None, told_in=None):
    """`train`, in which the loss of the samples of step `at` is high whenever they come up, and which is told
    to stop when those of step `told_in` are read.

    Returns the summary and the first samples of all micro-batches that were asked for.
    """
    from lowbit_dist import configfile, data
    from lowbit_dist.zero.engine import Step

    stop_file = configfile.from_dict(configuration).stop_file
    stop_file.unlink(missing_ok=True)
    backward, micro_batch = Step.backward, data.Batches.micro_batch
    asked, n = [], 4 * at - 4

    def remembering(batches, first_sample, size):
        asked.append(first_sample)
        if told_in is not None and first_sample == 4 * told_in - 4:
            stop_file.touch()
        return micro_batch(batches, first_sample, size)

    def spoiled(passes, *batch):
        loss = backward(passes, *batch)
        return loss + 50 if n <= asked[-1] < n + 4 else loss

    Step.backward, data.Batches.micro_batch = spoiled, remembering
    try:
        return train(configuration, stop_at), asked
    finally:
        Step.backward, data.Batches.micro_batch = backward, micro_batch


SPIKE = {"steps": 30, "save_every": 5, "log_every": 1, "eval_every": 30, "on_spike": "rollback"}


def rows(tmp_path, name):
    import json

    return [json.loads(line) for line in Path(tmp_path, name, "metrics.jsonl").read_text().splitlines()]


def test_a_spike_sends_the_run_back_and_its_batches_are_skipped(ranks, small, tmp_path):
    summary, asked = ranks(1).run(train_with_spike, small(run={"name": "back"}, train=SPIKE), 23)[0]
    # 22 steps, the spike's, then from step 20 on with the samples behind those of step 23
    steps = [first // 4 + 1 for first in asked if first % 4 == 0][:-1]
    assert steps[:33] == [*range(1, 24), *range(24, 34)]
    assert (summary["steps"], summary["rollbacks"], summary["skipped_steps"]) == (30, 1, 0)
    found = rows(tmp_path, "back")
    assert [row["step"] for row in found] == list(range(1, 31))
    assert [row["rollbacks"] for row in found] == [0] * 20 + [1] * 10
    assert max(row["loss"] for row in found) < 10


@pytest.mark.slow
def test_a_run_killed_after_a_spike_ends_as_one_that_was_not(ranks, small):
    expected = ranks(2).run(train_with_spike, small(run={"name": "whole"}, train=SPIKE), 23)[0][0]
    stopped = small(run={"name": "cut"}, train=SPIKE)
    for stop_at in (20, 25):
        ranks(2).run(train_with_spike, stopped, 23, stop_at=stop_at)
    assert ranks(2).run(train_with_spike, stopped, 23)[0][0]["digest"] == expected["digest"]


@pytest.mark.parametrize(("save_every", "rollbacks"), [(5, 1), (30, 0)])
def test_a_run_stopped_before_a_spike_goes_back_where_one_would_that_was_not(
    ranks, small, save_every, rollbacks
):
    """Not to the checkpoint of the stop; before the first of its own the step is skipped."""
    section = {**SPIKE, "save_every": save_every, "keep_last": 1}
    expected = ranks(1).run(train_with_spike, small(run={"name": "whole"}, train=section), 23)[0][0]
    stopped = small(run={"name": "cut"}, train=section)
    assert ranks(1).run(train_with_spike, stopped, 23, told_in=22)[0][0] is None
    summary = ranks(1).run(train_with_spike, stopped, 23)[0][0]
    assert summary["digest"] == expected["digest"]
    assert summary["rollbacks"] == expected["rollbacks"] == rollbacks


def test_a_spike_is_only_mentioned_if_nothing_else_is_asked(ranks, small, tmp_path):
    only_warned = {**SPIKE, "on_spike": "warn"}
    summary, asked = ranks(1).run(train_with_spike, small(run={"name": "on"}, train=only_warned), 23)[0]
    assert summary["rollbacks"] == 0
    assert summary["digest"] == digest(ranks, 1, small(run={"name": "calm"}, train=only_warned))
    assert len([first for first in asked if first % 4 == 0][:-1]) == 30


def spiking_for_ever(configuration):
    from lowbit_dist.zero.engine import Step

    backward = Step.backward
    n = 0

    def spoiled(passes, *batch):
        nonlocal n
        n += 1
        loss = backward(passes, *batch)
        return loss + 50 if n > 40 and n % 4 < 2 else loss

    Step.backward = spoiled
    try:
        train(configuration)
    except guard.Diverged as error:
        return str(error)
    finally:
        Step.backward = backward
    raise AssertionError("the run went on")


def test_a_checkpoint_that_only_leads_to_spikes_is_given_up(ranks, small):
    answer = ranks(1).run(spiking_for_ever, small(train={**SPIKE, "save_every": 20}))[0]
    assert "after 3 returns to step 20" in answer


def train_and_hear(configuration):
    """The summary, and what was warned of."""
    import logging

    said, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("lowbit_dist")
    logger.addHandler(handler)
    try:
        return train(configuration), said
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("lr", "warmup", "is_lost"), [(2e-3, 2, False), (30.0, 2, True), (30.0, 16, False)],
    ids=["learns", "lost", "not yet warm"],
)  # fmt: skip
def test_a_run_that_is_no_better_than_guessing_is_marked(lr, warmup, is_lost, ranks, small, lowbit):
    from lowbit_dist import compare, runs

    content = small(
        run={"name": "lost"}, method={"name": "dense"}, optimizer={"lr": lr, "states": "fp32"},
        schedule={"name": "constant", "warmup_steps": warmup},
        train={"steps": 16, "eval_every": 16, "save_every": 16},
    )  # fmt: skip
    ((summary, said),) = ranks(1).run(train_and_hear, content)
    assert ((summary["val_loss"] or math.inf) > math.log(512)) == (lr > 1), "the case must be one"
    assert any("is above that of guessing, 6.238: the run has diverged" in text for text in said) == is_lost
    run = runs.read(Path(content["run"]["dir"], "lost"))
    assert summary["diverged"] == run.has_diverged == is_lost
    assert run.rows[-1].get("diverged") == (1.0 if is_lost else None)
    assert ("diverged: its validation loss" in run.described()) == is_lost
    comparison = compare.compare([run])
    assert compare.count(comparison["groups"][0]) == ("1, 1 diverged" if is_lost else "1")
    assert len(compare.not_well(comparison)) == is_lost
    listed = lowbit("runs", run.folder.parent)
    assert ("diverged" in listed.stdout) == is_lost


def test_guessing_is_the_logarithm_of_the_vocabulary():
    assert not guard.is_no_better_than_guessing(math.log(512), 512)
    assert guard.is_no_better_than_guessing(math.log(512) + 1e-9, 512)
    assert guard.is_no_better_than_guessing(math.nan, 512)
