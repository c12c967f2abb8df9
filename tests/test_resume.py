"""What may change when a run is resumed: its length and its end, if no step behind it had another rate."""

import shutil
from pathlib import Path

import pytest
from cases import slow
from test_train import train

from lowbit_dist import configfile, data, inputs
from lowbit_dist.checkpoint import Checkpoint
from lowbit_dist.cluster import checks
from lowbit_dist.config import ConfigError
from lowbit_dist.optim import schedule

EACH = {"save_every": 4, "eval_every": 4}


def rates(config):
    return [
        schedule.rate(config.schedule, step, config.train.steps)[0]
        for step in range(1, config.train.steps + 1)
    ]


def changed(content, **sections):
    return {**content, **{name: {**content[name], **fields} for name, fields in sections.items()}}


def test_wsd_is_flat_and_then_falls_to_its_end(small):
    config = configfile.from_dict(
        small(
            train={"steps": 20},
            schedule={"name": "wsd", "warmup_steps": 4, "decay_share": 0.25, "min_lr_ratio": 0.2},
        )
    )
    assert rates(config) == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, *[1.0] * 11, 0.84, 0.68, 0.52, 0.36, 0.2], abs=1e-12
    )


@pytest.mark.parametrize(
    ("ending", "agrees"),
    [
        ({"name": "constant"}, True),
        ({"name": "wsd", "decay_share": 0.5}, True),  # a decay that begins at step 8 of 16
        ({"name": "wsd", "decay_share": 0.75}, False),
        ({"name": "linear"}, False),
        ({"name": "constant", "warmup_steps": 3}, False),
    ],
    ids=str,
)
def test_a_constant_run_may_go_on_where_the_steps_behind_it_keep_their_rates(ending, agrees, ranks, small):
    before = small(train={"steps": 8, **EACH}, schedule={"name": "constant"})
    ranks(1).run(train, before)
    longer = configfile.from_dict(changed(before, train={"steps": 16}, schedule=ending))
    if agrees:
        checks.check_run(longer)
        return
    with pytest.raises(ConfigError, match=r"^train.steps \(16\) .* other rates .* train.steps: 8 -> 16"):
        checks.check_run(longer)


def test_a_run_that_was_made_longer_ends_as_one_that_was_long_from_the_start(ranks, small):
    constant = {"name": "constant"}
    long = small(run={"name": "long"}, train={"steps": 16, **EACH}, schedule=constant)
    expected = ranks(1).run(train, long)[0]
    short = small(run={"name": "short"}, train={"steps": 8, **EACH}, schedule=constant)
    ranks(1).run(train, short)
    longer = changed(short, train={"steps": 16})
    config = configfile.from_dict(longer)
    checks.check_run(config)
    assert checks.finished(config) is None
    found = ranks(1).run(train, longer)[0]
    assert (found["digest"], found["steps"]) == (expected["digest"], 16)
    assert configfile.load(config.run_dir / "config.yaml") == config
    with pytest.raises(
        ConfigError, match=r"^train.steps \(12\) is less than .* has behind it, 16; write 16 or more"
    ):
        checks.check_run(configfile.from_dict(changed(longer, train={"steps": 12})))


def test_a_decaying_run_is_not_made_longer(ranks, small):
    content = small(train={"steps": 8, **EACH})
    ranks(1).run(train, content)
    with pytest.raises(ConfigError, match="only a constant rate, and the decay of wsd before it begins"):
        checks.check_run(configfile.from_dict(changed(content, train={"steps": 16})))


# Where codes are drawn at random, a sum's last digit decides now and then where one goes.
@pytest.mark.parametrize(("method", "agreement"), [("dqt", 1e-2), *slow(("dense", 1e-6))])
def test_a_pass_may_take_other_samples_unless_bits_were_promised(method, agreement, ranks, small):
    content = small(
        run={"name": "passes"}, method={"name": method}, optimizer={"states": "fp32"},
        train={"steps": 8, **EACH},
    )  # fmt: skip
    whole = ranks(1).run(train, {**content, "run": {**content["run"], "name": "whole"}})[0]
    ranks(1).run(train, content, stop_at=4)
    other = changed(
        content, train={"micro_batch": 4, "activation_checkpointing": True}, cluster={"workers": 1}
    )
    checks.check_run(configfile.from_dict(other))
    found = ranks(1).run(train, other)[0]
    for loss in ("train_loss", "val_loss"):
        assert found[loss] == pytest.approx(whole[loss], rel=agreement)
    assert Checkpoint.open(found["checkpoint"]).step == 8

    promised = small(run={"name": "promised"}, train={"steps": 8, "reproducible": True, **EACH})
    ranks(1).run(train, promised, stop_at=4)
    with pytest.raises(ConfigError, match=r"train.micro_batch: 2 -> 4"):
        checks.check_run(
            configfile.from_dict(changed(promised, train={"micro_batch": 4}, cluster={"workers": 1}))
        )
    assert Path(promised["run"]["dir"], "promised").is_dir()


def test_a_run_from_another_starts_with_its_weights_and_its_loss(ranks, small):
    parent = ranks(1).run(train, small(run={"name": "parent"}, train={"steps": 8, **EACH}))[0]
    child = small(
        run={"name": "child", "from": "parent"}, train={"steps": 2, "eval_every": 1, "save_every": 1},
        optimizer={"lr": 0.0}, schedule={"name": "constant", "warmup_steps": 0},
    )  # fmt: skip
    found = ranks(2).run(train, child)[0]
    assert found["digest"] == parent["digest"], "at a rate of zero nothing moves"
    assert found["val_loss"] == pytest.approx(parent["val_loss"], rel=1e-6)
    earlier = changed(child, run={"name": "earlier", "from": "parent@4"})
    assert ranks(1).run(train, earlier)[0]["digest"] != parent["digest"]
    # It resumes from its own checkpoints, even if the other run is gone.
    shutil.rmtree(Path(parent["checkpoint"]).parent.parent)
    longer = changed(child, train={"steps": 4})
    checks.check_run(configfile.from_dict(longer))
    assert ranks(1).run(train, longer)[0]["digest"] == parent["digest"]


def test_with_its_states_a_run_goes_on_as_the_other_would(ranks, small):
    constant = {"name": "constant", "warmup_steps": 0}
    method = {"name": "dense"}
    whole = small(run={"name": "whole"}, train={"steps": 8, **EACH}, schedule=constant, method=method)
    expected = ranks(1).run(train, whole)[0]
    child = small(
        run={"name": "child", "from": "whole@4", "with_states": True}, train={"steps": 4, **EACH},
        schedule=constant, method=method,
    )  # fmt: skip
    without = changed(child, run={"name": "without", "with_states": False})
    ranks(1).run(continued, child)
    ranks(1).run(continued, without)
    folder = Path(child["run"]["dir"])
    digests = {
        name: Checkpoint.open(folder / name / "checkpoints" / "step-4").digest()
        for name in ("child", "without")
    }
    assert digests["child"] == expected["digest"] != digests["without"]


def continued(configuration):
    """A run that reads the samples after those that the other has read."""
    from lowbit_dist import data

    micro_batch = data.Batches.micro_batch

    def later(batches, first_sample, size):
        return micro_batch(batches, first_sample + (16 if batches.order.seed is not None else 0), size)

    data.Batches.micro_batch = later
    try:
        return train(configuration)
    finally:
        data.Batches.micro_batch = micro_batch


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"run": {"from": "absent"}}, r"run.from \(absent\): 'absent' is neither a run"),
        ({"run": {"from": "parent@5"}}, r"run.from \(parent@5\): .* no checkpoint of step 5; write @4"),
        ({"method": {"grid": "int8"}}, "is a checkpoint of another model: .* write another run.from"),
        ({"model": {"layers": 1}}, "is a checkpoint of another model: .* write another run.from"),
        # Of the same shapes:
        (
            {"model": {"heads": 2, "kv_heads": 1}},
            r"run.from \(parent\) is another model \(.*num_attention_heads: 4 -> 2.*\); write another run",
        ),
        ({"model": {"rope_theta": 5e5}}, r"is another model \(rope_.*500000"),
        ({"method": {"activation_bits": None}}, r"is another model \(method.activation_bits: 8 -> null\)"),
        (
            {"run": {"with_states": True}, "optimizer": {"states": "fp32"}},
            r"run.with_states \(true\): .* other states .*\(optimizer.states: int8 -> fp32\); write",
        ),
    ],
    ids=str,
)
def test_what_a_run_cannot_start_from_is_refused_before_a_worker_starts(sections, words, ranks, small):
    ranks(1).run(train, small(run={"name": "parent"}, train={"steps": 4, **EACH}))
    content = changed(small(run={"name": "child", "from": "parent"}), **sections)
    with pytest.raises(ConfigError, match=words):
        checks.check(configfile.from_dict(changed(content, cluster={"workers": 1})))


def test_states_that_a_rule_keeps_otherwise_are_refused_before_a_worker_starts(ranks, small):
    """By rows and columns, of the same name and precision; rates do not matter."""
    rmsprop = {"name": "rmsprop"}
    parent = small(run={"name": "parent"}, train={"steps": 4, **EACH}, optimizer=rmsprop)
    ranks(1).run(train, parent)
    child = changed(parent, run={"name": "child", "from": "parent", "with_states": True})
    check_parent(changed(child, optimizer={"lr": 1e-4, "linear_lr_ratio": 0.5, "beta": 0.9}))
    with pytest.raises(ConfigError, match=r"\(optimizer.second_moment: factored -> element\); write"):
        check_parent(changed(child, optimizer={"lr": 1e-4, "second_moment": "element"}))


def check_parent(content):
    config = configfile.from_dict(content)
    inputs.check_parent(config, data.check(config))


def test_a_damaged_checkpoint_is_no_start_however_it_is_named(ranks, small):
    parent = ranks(1).run(train, small(run={"name": "parent"}, train={"steps": 4, **EACH}))[0]["checkpoint"]
    child = small(run={"name": "child"})
    shard = Path(parent, "shard-00000.safetensors")
    whole = shard.read_bytes()
    for content, is_refused in ((whole, False), (whole[:-1] + bytes([whole[-1] ^ 1]), True)):
        shard.write_bytes(content)
        for word in ("parent", "parent@4", str(parent)):
            started = changed(child, run={"from": word})
            if is_refused:
                with pytest.raises(ConfigError, match=r"^run.from \(.*\): .*does not have the SHA-256"):
                    check_parent(started)
            else:
                check_parent(started)


def test_a_start_from_a_run_of_a_pretrained_model_needs_that_model_wherever_it_lies(ranks, small, tmp_path):
    from hf_folders import reconfigure, write

    base = write(tmp_path / "base", "qwen3")
    parent = small(run={"name": "parent"}, train={"steps": 4, **EACH}) | {"model": {"pretrained": str(base)}}
    ranks(1).run(train, parent)
    elsewhere = base.rename(tmp_path / "elsewhere")
    child = small(run={"name": "child", "from": "parent"}) | {"model": {"pretrained": str(elsewhere)}}
    check_parent(child)
    reconfigure(elsewhere, rms_norm_eps=1e-3, max_position_embeddings=256)
    with pytest.raises(ConfigError, match=r"is another model \(rms_norm_eps: 1e-06 -> 0.001\)"):
        check_parent(child)


def test_states_come_with_a_run_alone(small):
    with pytest.raises(ConfigError, match=r"run.with_states \(true\) must go with run.from"):
        configfile.from_dict(small(run={"with_states": True}))
