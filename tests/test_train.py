"""The whole training of one worker, on real gloo ranks: exactly equal results where the design promises
them.
"""

import json
from pathlib import Path
from statistics import fmean

import pytest
from cases import slow

GRIDS = ("ternary", "int2", "int3", "int4", "int8")


def train(configuration, stop_at=None):
    """One worker's run; `stop_at` ends it after that step's checkpoint, as a kill would."""
    import logging

    logging.disable(logging.INFO)
    from lowbit_dist import configfile
    from lowbit_dist import loop as training

    config = configfile.from_dict(configuration)
    if stop_at is None:
        return training.run(config)
    save = training.checkpoint.Saver.save

    def save_then_stop(saver, shards, position):
        save(saver, shards, position)
        if position.step == stop_at:
            saver.wait()
            raise KeyboardInterrupt

    training.checkpoint.Saver.save = save_then_stop
    try:
        training.run(config)
    except KeyboardInterrupt:
        return None
    finally:
        training.checkpoint.Saver.save = save
    raise AssertionError("the run was not stopped")


def digest(ranks, world, configuration):
    return ranks(world).run(train, configuration)[0]["digest"]


SMALLER = {"layers": 1}


@pytest.mark.parametrize("grid", ["ternary", *slow(*((grid,) for grid in GRIDS[1:]))])
def test_workers_residency_checkpointing_and_repetition_give_one_digest(grid, ranks, small):
    variants = {
        "one": (1, {}),
        "again": (1, {}),
        "two": (2, {}),
        "replicated": (2, {"zero": {"residency": "replicated"}}),
        "recomputed": (2, {"train": {"activation_checkpointing": True}}),
    }
    few = {"steps": 4, "eval_every": 4, "save_every": 4}
    found = {}
    for name, (world, changes) in variants.items():
        changes = {**changes, "train": {**few, **changes.get("train", {})}}
        found[name] = digest(ranks, world, small(run={"name": name}, method={"grid": grid}, **changes))
    assert len(set(found.values())) == 1, found


def test_the_digest_sees_the_seed_and_the_learning_rate(ranks, small):
    plain = digest(ranks, 1, small(run={"name": "plain"}))
    assert digest(ranks, 1, small(run={"name": "seed", "seed": 1})) != plain
    assert digest(ranks, 1, small(run={"name": "lr"}, optimizer={"lr": 1e-3})) != plain


@pytest.mark.parametrize(
    "sections",
    [
        {"method": {"grid": "ternary"}},
        {"method": {"name": "bitnet"}},
        {"method": {"name": "dense"}, "zero": {"stage": 0}},
        {"method": {"name": "dense"}, "zero": {"stage": 2}, "optimizer": {"states": "fp32"}},
        {"method": {"granularity": "row", "tensors": "all"}, "precision": "bf16"},
        *slow(*(({"method": {"grid": grid}},) for grid in GRIDS[1:])),
        *slow(
            ({"method": {"name": "dense"}, "optimizer": {"states": "bf16"}},),
            ({"method": {"grid": "int4", "granularity": "group", "group": 64}},),
            ({"optimizer": {"name": "lion", "lr": 3e-4}},),
            ({"optimizer": {"name": "lion", "states": "bf16"}, "method": {"name": "bitnet"},
              "zero": {"stage": 2}},),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_stopped_and_resumed_run_ends_as_one_that_was_not(sections, ranks, small):
    halfway = {"train": {"save_every": 4}, "model": SMALLER}
    expected = digest(ranks, 2, small(run={"name": "whole"}, **sections, **halfway))
    stopped = small(run={"name": "stopped"}, **sections, **halfway)
    ranks(2).run(train, stopped, stop_at=4)
    assert digest(ranks, 2, stopped) == expected


def phases(configuration):
    from lowbit_dist import configfile, loop

    beats = []
    loop.run(configfile.from_dict(configuration), heartbeat=lambda phase, *_: beats.append(phase))
    return beats


def test_a_finished_run_that_is_measured_again_is_alive_meanwhile(ranks, small):
    content = small(train={"steps": 2, "eval_samples": 6})
    ranks(1).run(train, content)
    assert ranks(1).run(phases, content)[0] == ["end"] * (1 + 3), "of three micro-batches"


TWELVE = {
    "steps": 3, "batch_tokens": 12 * 64, "micro_batch": 1, "reproducible": True, "save_every": 2,
}  # fmt: skip
MATRIX = [(grid, states) for grid in GRIDS for states in ("int8", "fp32")]


@pytest.mark.parametrize(("grid", "states"), [MATRIX[0], *slow(*MATRIX[1:])])
def test_reproducible_runs_are_equal_on_any_number_of_workers_and_in_both_residencies(
    grid, states, ranks, small
):
    sections = {
        "method": {"grid": grid}, "optimizer": {"states": states}, "train": TWELVE, "model": SMALLER,
    }  # fmt: skip
    found = {w: digest(ranks, w, small(run={"name": f"r{w}"}, **sections)) for w in (1, 2, 3, 4)}
    for w in (2, 3):
        replicated = small(run={"name": f"replicated-{w}"}, zero={"residency": "replicated"}, **sections)
        found[f"replicated on {w}"] = digest(ranks, w, replicated)
    assert len(set(found.values())) == 1, found


SIX = {"steps": 4, "batch_tokens": 6 * 64, "micro_batch": 1, "reproducible": True, "save_every": 2}
# Widths of published models (SmolLM, Qwen2) that are no multiples of 256.
WIDTH_576 = {"hidden_size": 576, "intermediate_size": 1536, "heads": 9, "kv_heads": 3, "layers": 1}
WIDTH_896 = {"hidden_size": 896, "intermediate_size": 1792, "heads": 14, "kv_heads": 2, "layers": 1}


@pytest.mark.parametrize(
    "sections",
    [
        {"method": {"granularity": "group", "group": 64}, "model": SMALLER},
        *slow(
            ({"model": WIDTH_576},),
            ({"optimizer": {"name": "lion", "lr": 3e-4, "states": "int8"}, "model": SMALLER},),
            ({"optimizer": {"name": "lion", "states": "bf16"}, "model": SMALLER,
              "method": {"grid": "int8"}},),
            ({"optimizer": {"name": "lion", "states": "fp32"}, "model": SMALLER,
              "method": {"name": "bitnet"}},),
            ({"optimizer": {"name": "muon"}, "method": {"grid": "int8"}, "model": SMALLER},),
            ({"optimizer": {"name": "muon", "states": "bf16"}, "model": SMALLER,
              "method": {"grid": "int8", "forward": "ternary"}},),
            ({"optimizer": {"name": "muon", "states": "fp32"}, "model": SMALLER,
              "method": {"name": "bitnet"}},),
            ({"method": {"granularity": "group", "grid": "int4"}, "model": SMALLER},),
            ({"model": WIDTH_896, "method": {"granularity": "row"}},),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_rules_granularities_and_widths_give_one_digest_on_any_number_of_workers(sections, ranks, small):
    def run(name, world, stop_at=None):
        return ranks(world).run(train, small(run={"name": name}, train=SIX, **sections), stop_at)[0]

    found = {world: run(f"on{world}", world)["digest"] for world in (1, 2, 3)}
    run("cut", 3, stop_at=2)
    found["resumed on 2"] = run("cut", 2)["digest"]
    assert len(set(found.values())) == 1, found


def test_a_rule_that_sees_the_matrix_gives_one_digest_on_any_number_of_workers(ranks, small):
    """One worker sees all of it, slots in 8 bits included, and each applies its own part."""
    sections = {"optimizer": {"name": "rows"}, "method": {"grid": "int8"}, "model": SMALLER, "train": SIX}
    found = {w: ranks(w).run(train_by_rows, small(run={"name": f"m{w}"}, **sections))[0] for w in (1, 2, 3)}
    assert len({each["digest"] for each in found.values()}) == 1
    stage0 = {
        **sections, "method": {"name": "dense"}, "zero": {"stage": 0},
        "optimizer": {"name": "rows", "states": "fp32"}, "train": {**SIX, "reproducible": False},
    }  # fmt: skip
    assert ranks(2).run(train_by_rows, small(run={"name": "z"}, **stage0))[0]["val_loss"] < 6.2, (
        "it must learn"
    )


def train_by_rows(configuration):
    import toys

    toys.register()
    return train(configuration)


@pytest.mark.parametrize("world", [3, *slow((1,), (4,))])
def test_a_run_continues_on_any_other_number_of_workers(world, ranks, small):
    sections = {"train": TWELVE, "model": SMALLER}
    expected = digest(ranks, 2, small(run={"name": "whole"}, **sections))
    moved = small(run={"name": "moved-to"}, **sections)
    ranks(2).run(train, moved, stop_at=2)
    assert digest(ranks, world, moved) == expected
    moved = small(run={"name": "moved-from"}, **sections)
    ranks(world).run(train, moved, stop_at=2)
    assert digest(ranks, 2, moved) == expected


def test_tied_embeddings_train_alike_on_any_number_of_workers(ranks, small):
    tied = {"model": {"tie_embeddings": True}, "method": {"tensors": "all"}}
    found = [digest(ranks, world, small(run={"name": f"tied-{world}"}, **tied)) for world in (1, 2)]
    assert found[0] == found[1]


def test_a_resumed_run_logs_what_an_undisturbed_one_does(ranks, small):
    # log_every does not divide the step of the stop: the sums since the last log are part of the checkpoint
    train_section = {"train": {"save_every": 4, "log_every": 3}}
    whole, stopped = (
        small(run={"name": "whole"}, **train_section),
        small(run={"name": "cut"}, **train_section),
    )
    ranks(2).run(train, whole)
    ranks(2).run(train, stopped, stop_at=4)
    ranks(2).run(train, stopped)
    files = [Path(c["run"]["dir"], c["run"]["name"], "metrics.jsonl") for c in (whole, stopped)]
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    for row in rows[0] + rows[1]:
        for key in list(row):
            if key == "time" or key.startswith("tokens_per_second") or key.endswith("_bytes"):
                del row[key]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [3, 6, 8]


def test_the_validation_loss_is_of_all_samples_for_any_workers_and_micro_batches(ranks, small):
    losses = []
    for world, size in ((1, 1), (1, 4), (2, 3), (3, 2), (2, 6)):
        train_section = {
            "steps": 1, "batch_tokens": 24 * 64, "micro_batch": size, "eval_samples": 7, "eval_every": 1,
            "save_every": 1,
        }  # fmt: skip
        content = small(run={"name": f"{world}x{size}"}, optimizer={"lr": 0.0}, train=train_section)
        summary = ranks(world).run(train, content)[0]
        losses.append(summary["val_loss"])
        assert summary["val_samples"] == 7
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


def test_the_summary_does_not_depend_on_what_is_logged(ranks, small):
    few, many = (
        ranks(1).run(train, small(run={"name": f"every-{n}"}, train={"log_every": n}))[0] for n in (8, 1)
    )
    assert few["train_loss"] == many["train_loss"]
    losses = [json.loads(line)["loss"] for line in _metrics(many).read_text().splitlines()]
    assert many["train_loss"] == fmean(losses)


def _metrics(summary):
    return Path(summary["checkpoint"]).parent.parent / "metrics.jsonl"


def test_training_learns_and_no_learning_rate_does_not(ranks, small):
    def run(name, steps, **sections):
        section = {
            "steps": steps,
            "eval_every": steps,
            "save_every": steps,
            "log_every": 10,
            "eval_samples": 32,
        }
        return ranks(2).run(train, small(run={"name": name}, train=section, **sections))[0]

    learned, frozen = run("learns", 64), run("frozen", 10, optimizer={"lr": 0.0})
    assert learned["val_loss"] < 0.85 * frozen["val_loss"], (learned["val_loss"], frozen["val_loss"])
    assert abs(frozen["val_loss"] - frozen["train_loss"]) < 0.1


def test_a_gradient_that_is_not_finite_changes_nothing(ranks, small):
    found = ranks(2).run(step_with_infinite_gradient, small())
    assert found == [(True, True)] * 2


def step_with_infinite_gradient(configuration):
    """(skipped, unchanged) of an engine whose second micro-batch has an infinite loss on one worker."""
    import torch

    from lowbit_dist import configfile, model, ops
    from lowbit_dist.zero import Engine

    config = configfile.from_dict(configuration)
    built = model.build(config.model, 512, config.method, torch.float32)
    initial = model.InitialWeights(built, config.method, 0, None)
    engine = Engine(config, built, initial, model.low_bit_names(built, config.method))
    tokens = torch.arange(2 * 64).view(2, 64)

    def kept():
        own = [t for shard in engine.shards for t in (shard.codes, shard.weight) if t is not None]
        return own + [t for shard in engine.shards for slot in shard.state for t in slot.tensors]

    with engine.step(ops.Now(lr=1e-3, weight_decay=0.0, step=1, seed=0)) as step:
        for _ in range(engine.micro_batches // engine.world):
            step.backward(tokens)
        if engine.rank == engine.world - 1:
            engine.gradients()[0][5] = float("nan")
        before = [t.clone() for t in kept()]
    update, after = step.done, kept()
    engine.close()
    return update.skipped, all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("stage", [0, 2])
def test_levels_of_latent_weights_do_not_depend_on_the_number_of_workers(stage, ranks, small):
    found = []
    for world in (1, 2):
        content = small(
            run={"name": f"latent{world}"}, method={"name": "bitnet"}, zero={"stage": stage},
            optimizer={"states": "fp32"}, train={"steps": 2, "log_every": 1},
        )  # fmt: skip
        ranks(world).run(train, content)
        lines = Path(content["run"]["dir"], f"latent{world}", "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line) for line in lines])
    for one, two in zip(*found, strict=True):
        assert one["zero_fraction"] == pytest.approx(two["zero_fraction"], abs=1e-3)
        assert one["flip_rate"] == pytest.approx(two["flip_rate"], abs=1e-3)
    assert 0.2 < found[0][0]["zero_fraction"] < 0.5 and found[0][1]["flip_rate"] > 0
