"""Gradient release: buckets are applied in the backward pass, with the results of an update at its end."""

import math
from unittest.mock import patch

import pytest
import test_memory
import torch
from cases import slow
from test_guard import train_and_hear
from test_train import digest, train

from lowbit_dist.config import ConfigError

RELEASED = {"gradient_release": True}
FEW = {"steps": 4, "log_every": 1, "eval_every": 4, "save_every": 4}
UNCLIPPED = {**FEW, "clip_norm": 0}
FACTORED = {"name": "rmsprop", "linear_lr_ratio": 4.0}

# ------------------------------------------------------------------ equal where clipping does not act

CASES = {
    "ternary": {},
    "tied and recomputed": {
        "model": {"tie_embeddings": True}, "method": {"tensors": "all"},
        "train": {"activation_checkpointing": True},
    },
    "sent on another grid": {
        "method": {"grid": "int8", "forward": "ternary"}, "zero": {"residency": "replicated"},
        "precision": "bf16",
    },
    "muon": {"method": {"grid": "int8"}, "optimizer": {"name": "muon"}},
    "dense, bf16": {"method": {"name": "dense"}, "precision": "bf16"},
    "bitnet, tied": {
        "method": {"name": "bitnet"}, "model": {"tie_embeddings": True},
        "train": {"activation_checkpointing": True},
    },
    "flip": {"method": {"name": "flip"}, "optimizer": FACTORED | {"second_moment": "element"}},
    "flip, factored": {
        "method": {"name": "flip"}, "optimizer": FACTORED,
        "train": {"reproducible": True},
    },
    "adafactor, all tensors": {
        "method": {"grid": "int8", "tensors": "all"}, "optimizer": {"name": "adafactor"},
        "model": {"tie_embeddings": True}, "train": {"activation_checkpointing": True},
    },
    "released": {
        "method": {"grid": "int4", "rules": "released"},
        "optimizer": {"lr": 0.05, "weight_decay": 10.0, "eps": 0.1},  # leaves the highest level at once
    },
    "a forward pass that changes": {
        "method": {"grid": "int8", "forward": "ternary", "forward_from": 0.5, "rounding_anneal": 1.0},
    },
}  # fmt: skip


def summary_and_rows(configuration):
    """The summary, and what the record has of each step and of each layer."""
    import json
    from pathlib import Path

    summary = train(configuration)
    folder = Path(configuration["run"]["dir"], configuration["run"]["name"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    layers = [json.loads(line)["layers"] for line in (folder / "layers.jsonl").read_text().splitlines()]
    return summary, rows, layers


@pytest.mark.parametrize(
    ("world", "case"),
    [
        (2, "ternary"),
        (1, "tied and recomputed"),
        (2, "sent on another grid"),
        (2, "muon"),
        pytest.param(2, "tied and recomputed", marks=pytest.mark.slow),
        pytest.param(1, "ternary", marks=pytest.mark.slow),
        pytest.param(1, "sent on another grid", marks=pytest.mark.slow),
        pytest.param(1, "muon", marks=pytest.mark.slow),
        *[pytest.param(world, "dense, bf16", marks=pytest.mark.slow) for world in (1, 2)],
        *[pytest.param(world, "bitnet, tied", marks=pytest.mark.slow) for world in (1, 2)],
        pytest.param(2, "flip", marks=pytest.mark.slow),
        (2, "flip, factored"),
        *[
            pytest.param(2, case, marks=pytest.mark.slow)
            for case in ("adafactor, all tensors", "released", "a forward pass that changes")
        ],
    ],
)
def test_it_changes_nothing_where_clipping_does_not_act(world, case, ranks, small):
    def run(name, **more):
        own = {**UNCLIPPED, "micro_batch": 4 // world, **CASES[case].get("train", {}), **more}
        sections = {**CASES[case], "train": own, "cluster": {"workers": world}}
        configuration = small(run={"name": name}, **sections)
        return ranks(world).run(summary_and_rows, configuration)[0]

    (kept, rows, layers), (released, found, of_layers) = run("kept"), run("released", **RELEASED)
    for name in ("digest", "train_loss", "val_loss", "skipped_steps"):
        assert released[name] == kept[name], name
    assert len(rows) == len(found) == 4
    assert "dense" in case or any(row["flip_rate"] for row in rows), "the case must flip some"
    for row, other in zip(rows, found, strict=True):
        for name in ("loss", "flip_rate", "zero_fraction", "val_loss"):
            assert other.get(name) == row.get(name), name
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-6)
        assert other["memory/gradients"] == 0 < row["memory/gradients"]
    assert len(layers) == 4 and of_layers == layers, "flips and gradient norms of each layer"


@pytest.mark.parametrize("world", [2, 3, pytest.param(1, marks=pytest.mark.slow)])
def test_reproducible_bits_are_those_of_any_number_of_workers(world, ranks, small):
    """A released run has one number of workers; what it computes, ordinary runs do on 1, 2 and 3."""
    train_section = {**UNCLIPPED, "batch_tokens": 6 * 64, "micro_batch": 6 // world, "reproducible": True}
    section = {"model": {"layers": 1}, "train": train_section, "cluster": {"workers": world}}
    released = small(run={"name": "released"}, **{**section, "train": train_section | RELEASED})
    expected = digest(ranks, world, released)
    for other in {n for n in (1, 2, 3) if world % n == 0}:
        assert digest(ranks, other, small(run={"name": f"on-{other}"}, **section)) == expected


# ------------------------------------------------------------------ clipping


def transcribed(configuration, *, by_previous):
    """The run of `configuration` (dense, fp32, one worker) in plain PyTorch: weights, and gradient norms."""
    from lowbit_dist import configfile, data, inputs, model
    from lowbit_dist.optim import schedule
    from lowbit_dist.zero.standard import materialize

    config = configfile.from_dict(configuration)
    built = model.build(config.model, inputs.agreed(config).vocab_size, config.method, torch.float32)
    initial = model.InitialWeights(built, config.method, config.run.seed, None)
    materialize(built, torch.device("cpu"), torch.float32)
    for name, p in built.named_parameters():
        p.data.copy_(initial(name, p.shape))
    groups = [
        {"params": [p], "factors": config.method.rates(name, tuple(p.shape))}
        for name, p in built.named_parameters()
    ]
    rule, batches = config.optimizer, data.Batches(config.data, "train", config.run.seed)
    adamw = torch.optim.AdamW(groups, betas=rule.betas, eps=rule.eps)
    norms, size = [], config.train.micro_batch
    for step in range(1, config.train.steps + 1):
        now = schedule.now(config, step, step)
        for group in adamw.param_groups:
            lr, decay = group["factors"]
            group |= {"lr": now.lr * lr, "weight_decay": now.weight_decay * decay}
        tokens = batches.micro_batch((step - 1) * size, size)
        adamw.zero_grad()
        built(input_ids=tokens, labels=tokens).loss.backward()
        norms.append(torch.cat([p.grad.flatten() for p in built.parameters()]).double().norm().item())
        seen = norms[-1:] if not by_previous else norms[-2:-1]
        factor = min([1.0, *[config.train.clip_norm / (norm + 1e-6) for norm in seen]])
        for p in built.parameters():
            p.grad *= factor
        adamw.step()
    return {name: p.detach() for name, p in built.named_parameters()}, norms


def weights_of(configuration):
    import json
    from pathlib import Path

    from lowbit_dist.checkpoint import Checkpoint

    opened = Checkpoint.open(train(configuration)["checkpoint"])
    rows = Path(configuration["run"]["dir"], configuration["run"]["name"], "metrics.jsonl").read_text()
    norms = [json.loads(row)["grad_norm"] for row in rows.splitlines()]
    return {name: opened.tensor(name) for name in opened.names}, norms


def test_gradients_are_clipped_by_the_norm_of_the_step_before(ranks, small):
    content = small(
        method={"name": "dense"}, optimizer={"lr": 1e-3, "eps": 0.1, "states": "fp32"},
        schedule={"name": "constant", "warmup_steps": 1},
        train={**FEW, "clip_norm": 0.5, "micro_batch": 4, **RELEASED}, cluster={"workers": 1},
    )  # fmt: skip
    weights, norms = ranks(1).run(weights_of, content)[0]
    expected, of_steps = ranks(1).run(transcribed, content, by_previous=True)[0]
    other, _ = ranks(1).run(transcribed, content, by_previous=False)[0]
    assert min(of_steps) > 0.5, "the case must clip"
    assert norms == pytest.approx(of_steps, rel=1e-4)

    def off(others):
        return max((weights[name] - w).abs().max().item() for name, w in others.items())

    assert weights.keys() == expected.keys()
    assert off(expected) < 1e-5 < 2e-4 < off(other), (off(expected), off(other))


@pytest.mark.parametrize("world", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_resumed_run_is_clipped_by_the_same_norm(world, ranks, small):
    section = {
        "model": {"layers": 1},
        "cluster": {"workers": world},
        "optimizer": {"eps": 0.1},
        "train": {
            "steps": 4, "save_every": 2, "eval_every": 4, "clip_norm": 0.5, "micro_batch": 4 // world,
            "reproducible": True,
        }
        | RELEASED,
    }  # fmt: skip
    expected = digest(ranks, world, small(run={"name": "whole"}, **section))
    stopped = small(run={"name": "stopped"}, **section)
    ranks(world).run(train, stopped, stop_at=2)
    assert digest(ranks, world, stopped) == expected
    section["train"] |= {"clip_norm": 0}
    assert digest(ranks, world, small(run={"name": "unclipped"}, **section)) != expected, "it must clip"


# ------------------------------------------------------------------ what cannot be taken back


def parameters_after(configuration, fault=None, limit=math.inf):
    """Two steps; the second is spoiled.  Its update, and this rank's weights before and after it."""
    from lowbit_dist import configfile, model, ops
    from lowbit_dist.zero import Engine

    config = configfile.from_dict(configuration)
    built = model.build(config.model, 512, config.method, torch.float32)
    initial = model.InitialWeights(built, config.method, 0, None)
    engine = Engine(config, built, initial, model.low_bit_names(built, config.method))

    def held():
        return {s.name: (s.weight if s.codes is None else s.codes).clone() for s in engine.shards}

    def spoil(gradient):
        return gradient * math.nan if engine.rank == engine.world - 1 else gradient

    generator = torch.Generator().manual_seed(engine.rank)
    for n in (1, 2):
        before = held()
        if n == 2 and fault == "nan":
            engine.module.model.layers[0].mlp.up_proj.weight.register_hook(spoil)
        now = ops.Now(lr=2e-2, weight_decay=0.0, step=n, seed=0)
        with engine.step(now, limit if n == 2 else math.inf, details=True) as step:
            step.backward(torch.randint(512, (2, 64), generator=generator))
            if n == 2 and fault == "drop":
                step.drop()
    after = held()
    engine.close()
    return step.done, before, after


@pytest.mark.parametrize("fault", ["nan", "limit", "drop"])
def test_a_wrong_step_keeps_what_was_updated_before_it_was_known_and_says_so(fault, ranks, small):
    content = small(model={"layers": 2}, method={"grid": "int8"}, train=RELEASED)
    healthy = ranks(2).run(parameters_after, content)
    limit = 0.999 * healthy[0][0].grad_norm if fault == "limit" else math.inf
    spoiled = ranks(2).run(parameters_after, content, fault, limit)
    (update, wrong), (other, same) = (healthy[0][0], spoiled[0][0]), (healthy[1][0], spoiled[1][0])
    assert (other, same) == (update, wrong) or fault == "nan", "workers agree"
    assert (update.skipped, update.n_released, wrong.skipped, same.skipped) == (False, 0, True, True)

    def whole(found, place):  # the weights of all ranks, by name
        return {name: torch.cat([part[place][name] for part in found]) for name in found[0][place]}

    expected, before, after = whole(healthy, 2), whole(spoiled, 1), whole(spoiled, 2)
    left = {name for name in after if torch.equal(after[name], before[name])}
    updated = {name for name in after if torch.equal(after[name], expected[name])} - left
    assert left | updated == set(after), "each is as before, or as after a right step"
    assert len(updated) == wrong.n_released == same.n_released
    assert wrong.flips_of == {name: n if name in updated else 0 for name, n in update.flips_of.items()}
    assert wrong.flips == sum(wrong.flips_of.values())
    if fault == "drop":
        assert not left and wrong.grad_norm == update.grad_norm
        return
    assert "lm_head.weight" in updated and "model.embed_tokens.weight" in left
    assert math.isinf(wrong.grad_norm) == (fault == "nan")
    if fault == "nan":
        assert "model.layers.0.mlp.up_proj.weight" in left
        assert "model.layers.1.mlp.down_proj.weight" in updated


def spoiled_training(configuration):
    """`train_and_hear`, in whose step 2 the gradient of an early layer is not finite."""
    from lowbit_dist.zero.engine import Step

    backward, n = Step.backward, 0

    def spoiled(step, *batch):
        nonlocal n
        n += 1
        weight = step.engine.module.model.layers[0].mlp.up_proj.weight
        hook = weight.register_hook(lambda gradient: gradient * (math.inf if n == 2 else 1.0))
        try:
            return backward(step, *batch)
        finally:
            hook.remove()

    with patch.object(Step, "backward", spoiled):
        return train_and_hear(configuration)


def test_a_run_counts_and_warns_of_such_a_step(ranks, small):
    train_section = {**FEW, "micro_batch": 4, **RELEASED}
    summary, said = ranks(1).run(spoiled_training, small(train=train_section, cluster={"workers": 1}))[0]
    assert summary["skipped_steps"] == 1 and math.isfinite(summary["val_loss"])
    warnings = [text for text in said if "skipped" in text]
    assert len(warnings) == 1 and warnings[0].startswith("step 2 skipped: loss ")
    assert "gradient norm inf; " in warnings[0]
    assert warnings[0].endswith(" parameters were updated before that was known")


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"train": {**RELEASED, "micro_batch": 1}},
            "train.gradient_release (true) must go with one micro-batch a worker and step, not 2: a gradient "
            "is gone before the next one could be added to it; write train.micro_batch: 2 or "
            "train.batch_tokens: 128",
        ),
        (
            {"train": RELEASED, "cluster": {"workers": {"min": 1, "max": 2}}},
            "train.gradient_release (true) must go with one micro-batch a worker and step, not 2: a gradient "
            "is gone before the next one could be added to it; write cluster.workers: 2",
        ),
        (
            {
                "train": RELEASED, "method": {"name": "dense"}, "zero": {"stage": 2},
                "optimizer": {"states": "fp32"},
            },
            "train.gradient_release (true) must not be used with zero.stage 2, where DeepSpeed keeps all "
            "gradients until the step's end; write zero.stage: 3",
        ),
    ],
    ids=["accumulation", "fewer workers", "stage"],
)  # fmt: skip
def test_what_it_does_not_go_with_is_refused_with_the_remedy(sections, says, small):
    from lowbit_dist import configfile

    with pytest.raises(ConfigError) as refused:
        configfile.from_dict(small(**sections))
    assert str(refused.value) == says
    for remedy in says.rpartition("write ")[2].split(" or "):
        name, _, value = remedy.partition(": ")
        section, _, field = name.partition(".")
        content = small(**sections)
        content[section] = {**content[section], field: int(value)}
        configfile.from_dict(content)


# ------------------------------------------------------------------ memory


def content(world, **sections):
    train_section = {"micro_batch": 2, "batch_tokens": 2 * world * test_memory.SEQ_LEN, **RELEASED}
    train_section |= sections.pop("train", {})
    return test_memory.configuration(**sections, train=train_section, cluster={"workers": world})


PLANNED = {
    "bf16": {"precision": "bf16"},
    "recomputed": {"train": {"activation_checkpointing": True}, "model": {"layers": 7}},
    "sent on another grid": {
        "method": {"grid": "int8", "forward": "ternary"}, "zero": {"residency": "replicated"}
    },
    "muon": {"method": {"grid": "int8"}, "optimizer": {"name": "muon"}, "precision": "bf16"},
    "flip, factored": {"method": {"name": "flip"}, "optimizer": FACTORED, "precision": "bf16"},
    "dense": {"method": {"name": "dense"}, "train": {"reproducible": True}},
}  # fmt: skip
STANDING = ((2, "bf16"), (1, "recomputed"), (3, "muon"))  # in every pass; the others are slow


@pytest.mark.parametrize(
    ("world", "case"),
    [
        *STANDING,
        *slow(*((n, case) for n in (1, 2, 3) for case in PLANNED if (n, case) not in STANDING)),
    ],
)
def test_the_plan_is_what_is_measured(world, case, ranks):
    test_memory.check_content(content(world, **PLANNED[case]), world, ranks)


def test_the_gradients_of_the_whole_model_are_never_alive():
    from lowbit_dist.memory.plan import planned

    def highest(**train_section):
        config = test_memory.load(content(1, model={"layers": 12}, train=train_section))
        return planned(config, test_memory.VOCAB, 1)

    released, kept = highest(), highest(gradient_release=False)
    gradients = kept["components"]["gradients"]["bytes"]
    assert released["components"]["gradients"]["bytes"] == 0
    assert kept["resident_bytes_per_worker"] - released["resident_bytes_per_worker"] == gradients
    assert kept["peak_bytes_per_worker"] - released["peak_bytes_per_worker"] > 0.8 * gradients


def held_a_parameter(configuration):
    """Measured bytes of a low-bit parameter's weight, states and gradient between two steps."""
    from lowbit_dist import memory

    training = test_memory.Training(configuration)
    training.step()
    training.step()
    packed = [shard for shard in training.engine.shards if shard.codes is not None]
    tensors = [t for s in packed for t in (s.codes, s.scale, *(t for slot in s.state for t in slot.tensors))]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    parts = memory.measure(training.engine)["components"]
    n = sum(s.numel for s in packed)
    training.engine.close()
    return sum(storages.values()) / n + parts["gradients"]["bytes_per_parameter"]


@pytest.mark.parametrize(
    ("sections", "released", "at_most"),
    [
        ({}, True, 2.35),
        ({}, False, 4.35),
        ({"method": {"grid": "int8"}, "optimizer": {"name": "muon"}}, True, 2.10),
        ({"method": {"name": "flip"}, "optimizer": FACTORED}, True, 1.35),
    ],
)
def test_weights_states_and_gradients_take_few_bytes(sections, released, at_most, ranks):
    asked = content(1, precision="bf16", train={"gradient_release": released}, **sections)
    (held,) = ranks(1).run(held_a_parameter, asked)
    assert at_most - 0.1 < held <= at_most
