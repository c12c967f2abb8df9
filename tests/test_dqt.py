"""The options of dqt that change its update or its forward pass: released rules, rounding that goes to the
nearest, a ternary forward pass that begins within the run; against transcriptions in Python floats.
"""

import math

import pytest
import torch
from cases import standing
from test_methods import case
from test_train import train
from torch import nn

from lowbit_dist import configfile, ops
from lowbit_dist.convert import Optimizer, convert_
from lowbit_dist.errors import ConfigError
from lowbit_dist.grid import GRIDS
from lowbit_dist.methods import DQT, Flip
from lowbit_dist.ops import reference, rng
from lowbit_dist.optim import AdamW, schedule
from lowbit_dist.packed import PackedTensor

DRAWS = 400
LR, WEIGHT_DECAY = 5e-4, 0.01  # of the released code


def released(grid, *, highest):
    """A weight [8, 256] whose highest level this is, and a direction that moves it to all places of the grid
    that its next scale makes, and beyond its ends.
    """
    g = torch.Generator().manual_seed(highest)
    levels = torch.randint(grid.low, highest + 1, (2048,), generator=g).to(torch.int8)
    levels[0] = highest
    scale = torch.tensor(
        [grid.high * 2.0**-11]
    )  # whichever level is the highest, the next scale is a float16
    packed = PackedTensor(ops.pack(levels, grid=grid), scale, 2048, grid, (8, 256))
    places = torch.randint(grid.low - 1, grid.high + 1, (2048,), generator=g)
    places = places + 0.05 + 0.9 * torch.rand(2048, generator=g)  # rarer ones would be no normal distribution
    u = (levels * scale - places * scale * highest / grid.high) / LR
    return packed, u


def published(packed, u):
    """What the authors' code rounds by chance to whole levels, and their size: of their AdamW's step p with
    its decay clamp(p * s), s = Qp / p_old.max(); in Python floats.
    """
    old = [level * packed.scale.item() for level in packed.levels().flatten().tolist()]
    s, grid = packed.grid.high / max(old), packed.grid
    moved = [p - LR * d for p, d in zip(old, u.tolist(), strict=True)]
    return [min(max((p - LR * WEIGHT_DECAY * p) * s, grid.low), grid.high) for p in moved], max(
        old
    ) / grid.high


@pytest.mark.parametrize(
    ("grid", "highest"),
    [
        ("ternary", 1),
        ("int2", 1),
        ("int3", 3),
        ("int3", 2),
        ("int4", 7),
        ("int4", 5),
        ("int8", 127),
        ("int8", 90),
    ],
)
def test_released_rules_agree_in_distribution_with_the_published_update(grid, highest):
    grid = GRIDS[grid]
    packed, u = released(grid, highest=highest)
    expected, scale = published(packed, u)
    next_scale = DQT(grid=grid.name, rules="released").rescaled(packed.as_shard())
    assert (next_scale is None) == (highest == grid.high)
    assert (packed.scale if next_scale is None else next_scale).item() == scale
    total = torch.zeros(2048, dtype=torch.float64)
    for seed in range(DRAWS):
        codes = packed.codes.clone()
        target = ops.Codes(codes, packed.scale, 2048, grid, 0, 0, next_scale=next_scale)
        flips = ops.apply_(target, u, now=ops.Now(lr=LR, weight_decay=WEIGHT_DECAY, step=1, seed=seed))
        levels = ops.unpack(codes, grid=grid)
        assert flips.item() == (levels != packed.levels().flatten()).sum() > 0
        total += levels
    for mean, x in zip((total / DRAWS).tolist(), expected, strict=True):
        fraction = x - math.floor(x)
        deviation = math.sqrt(fraction * (1 - fraction) / DRAWS)
        assert abs(mean - x) <= 5 * deviation + 1e-9, x


def test_a_scale_that_is_derived_anew_shrinks_and_never_grows():
    method, grid = DQT(grid="int4", rules="released"), GRIDS["int4"]

    def rescaled(*levels, scale=0.0625):
        codes = ops.pack(torch.tensor(levels + (-8,) * (256 - len(levels)), dtype=torch.int8), grid=grid)
        return method.rescaled(PackedTensor(codes, torch.tensor([scale]), 256, grid, (256,)).as_shard())

    assert rescaled(7, 3) is None, "a weight is at the highest level"
    assert rescaled(5, 3).item() == torch.tensor(0.0625 * 5 / 7).half().float().item()
    assert rescaled() is None and rescaled(0, -1) is None, "no weight is positive"
    assert rescaled(1, scale=2.0**-14).item() == 2.0**-14, "no scale is smaller"
    assert DQT(grid="int4").rescaled(method.quantize(torch.randn(4, 256)).as_shard()) is None


def test_a_rescaled_tensors_parts_are_those_of_the_whole_and_other_targets_are_refused():
    packed, u = released(GRIDS["int8"], highest=100)
    next_scale = DQT(grid="int8", rules="released").rescaled(packed.as_shard())
    now = ops.Now(lr=LR, weight_decay=0.0, step=3, seed=5)
    whole, parts = (
        ops.Codes(packed.codes.clone(), packed.scale, 2048, packed.grid, 1, 0, next_scale=next_scale)
        for _ in range(2)
    )
    ops.apply_(whole, u, now=now)
    for start in range(0, 2048, 512):
        ops.apply_(parts.part(start, start + 512), u[start : start + 512], now=now)
    assert torch.equal(whole.codes, parts.codes)
    with pytest.raises(ValueError, match="next_scale has 2 elements; it must have 1"):
        ops.apply_(
            ops.Codes(packed.codes, packed.scale, 2048, packed.grid, 1, 0, next_scale=torch.ones(2)),
            u,
            now=now,
        )


def test_the_released_codes_adamw_adds_eps_before_the_bias_is_corrected():
    """Its moments and steps, in Python floats: the first steps differ by more than rounding."""
    rule = AdamW(betas=(0.9, 0.999), eps=1e-6, eps_before_correction=True, states="fp32")
    m = v = 0.0
    slots = torch.zeros(1), torch.zeros(1)
    for step, g in enumerate([2e-5, -1e-5, 3e-5], 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected = math.sqrt(1 - 0.999**step) / (1 - 0.9**step) * m / (math.sqrt(v) + 1e-6)
        u, *slots = rule.update(torch.tensor([g]), *slots, step=step)
        assert u.item() == pytest.approx(expected, rel=1e-5)
    later = rule.model_copy(update={"eps_before_correction": False})
    assert abs(later.update(torch.tensor([3e-5]), *slots, step=3)[0].item() / expected) > 1.2
    assert rule.eps_at(10**6) == pytest.approx(1e-6)


def test_released_rules_in_plain_pytorch():
    """The step that a layer's optimizer makes: the codes of the op, and the scale that it rounds them to."""
    _, weight, _ = case(out=8)
    method = DQT(grid="int4", rules="released", tensors="linears", activation_bits=None)
    layer = nn.Linear(256, 8, bias=False)
    layer.weight = nn.Parameter(weight)
    model = convert_(nn.Sequential(layer), method)
    optimizer = Optimizer(model, AdamW(lr=0.1, weight_decay=5.0, states="fp32"), seed=3)
    packed, scales = model[0].weight.packed.tensor, []
    for _ in range(3):
        model[0].weight.grad = torch.zeros(8, 256)
        before, first = packed.levels().clone(), packed.scale.item()
        optimizer.step()
        scales.append(packed.scale.item())
        highest = int(before.max())
        assert scales[-1] == torch.tensor(first * highest / 7).half().float().item()
        places = (before.double() * first * 0.5 / scales[-1]).clamp(-8, 7)  # half decays in a step
        assert (packed.levels() - places).abs().max() < 1 and not torch.equal(packed.levels(), before)
    assert scales[0] > scales[1] > scales[2], "each step leaves the highest level"


def test_all_tensors_are_codes_under_released_rules_unless_others_are_asked_for():
    assert DQT(rules="released").is_low_bit(False) and not DQT().is_low_bit(False)
    assert not DQT(rules="released", tensors="linears").is_low_bit(False)
    assert DQT(tensors="all").is_low_bit(False)
    assert all(DQT(rules=rules, tensors="linears").is_low_bit(True) for rules in ("paper", "released"))
    assert DQT(rules="released").label == "dqt released ternary"


def test_rounding_goes_in_a_line_from_chance_to_the_nearest():
    method = DQT(rounding_anneal=0.4)
    assert [method.nearest(step, 10) for step in (1, 6, 7, 8, 10)] == pytest.approx([0, 0, 0.25, 0.5, 1])
    assert method.nearest(10, 10) == 1.0 and DQT().nearest(10, 10) == 0.0
    assert DQT(rounding_anneal=1.0).nearest(3, 4) == 0.75
    content = {
        "data": {"path": "x"},
        "train": {"steps": 10},
        "method": {"name": "dqt", "rounding_anneal": 0.4},
    }
    assert schedule.now(configfile.from_dict(content), 8, 8).nearest == pytest.approx(0.5)
    longer = configfile.from_dict(content | {"train": {"steps": 20}, "schedule": {"name": "constant"}})
    shorter = configfile.from_dict(content | {"schedule": {"name": "constant"}})
    assert schedule.agree(shorter, longer, 6) and not schedule.agree(shorter, longer, 8)


@pytest.mark.parametrize("nearest", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_annealed_rounding_follows_its_equation(grid, nearest):
    g = torch.Generator().manual_seed(2)
    levels = torch.randint(grid.low, grid.high + 1, (2048,), generator=g).to(torch.int8)
    codes, u = ops.pack(levels, grid=grid), torch.randn(2048, generator=g)
    target = ops.Codes(codes, torch.tensor([0.02]), 2048, grid, 3, 0)
    flips = ops.apply_(target, u, now=ops.Now(lr=0.01, weight_decay=0.1, step=7, seed=11, nearest=nearest))
    words = rng.block_words(11, step=7, tensor=3, first_block=0, n_blocks=8).flatten().tolist()
    expected = []
    for level, d, word in zip(levels.tolist(), u.tolist(), words, strict=True):
        step = -0.01 * d / 0.02 - 0.01 * 0.1 * level
        whole = math.floor(abs(step))
        fraction = abs(step) - whole
        if nearest == 1:
            whole += fraction > 0.5
        else:
            whole += word / 2**32 < (fraction - nearest / 2) / (1 - nearest)
        expected.append(min(max(level + int(math.copysign(whole, step)), grid.low), grid.high))
    after = ops.unpack(codes, grid=grid).tolist()
    # float32 may draw an element's line of chance a hair from where float64 has it.
    assert sum(a != b for a, b in zip(after, expected, strict=True)) <= 1
    assert flips.item() == sum(a != b for a, b in zip(after, levels.tolist(), strict=True)) > 20


def test_annealed_steps_of_a_rule_are_those_of_the_reference():
    """No fused kernel knows them: the step on any backend is the reference's, states included."""
    g = torch.Generator().manual_seed(4)
    grid, rule = GRIDS["int4"], AdamW(states="int8")
    codes = ops.pack(torch.randint(-8, 8, (512,), generator=g).to(torch.int8), grid=grid)
    grad, now = torch.randn(512, generator=g), ops.Now(lr=0.01, weight_decay=0.1, step=1, seed=0, nearest=0.5)
    results = []
    for each in (ops, reference):
        target = ops.Codes(codes.clone(), torch.tensor([0.02]), 512, grid, 0, 0)
        state = [ops.Stored.zeros(slot, 512, "int8") for slot in rule.slots]
        flips = each.step_(target, grad, state, rule=rule, now=now)
        results.append((flips, target.codes, *(tensor for slot in state for tensor in slot.tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and results[0][0] > 0
    with pytest.raises(ValueError, match=r"nearest is 1\.5"):
        ops.Now(lr=0.0, weight_decay=0.0, step=1, seed=0, nearest=1.5)


def test_a_forward_pass_becomes_ternary_when_a_share_of_the_steps_is_done():
    method = DQT(grid="int8", forward="ternary", forward_from=0.5)
    assert [method.at(step, 5).sent_grid.name for step in (1, 2, 3, 5)] == [
        "int8",
        "int8",
        "ternary",
        "ternary",
    ]
    before, after = method.stages(10)
    _, weight, _ = case(out=8)
    packed = method.quantize(weight)
    assert torch.equal(before.quantize(weight).codes, packed.codes), "the range is that of the run"
    assert before.seen(packed) is packed and before.levels(weight) is None
    ternary = DQT(grid="int8", forward="ternary")
    assert torch.equal(after.seen(packed).codes, ternary.seen(packed).codes)
    assert after.forward_grid == GRIDS["ternary"] and ternary.stages(10) == [ternary]
    assert method.label == "dqt int8, ternary forward from 0.5"
    with pytest.raises(ValueError, match="whose length convert_ does not know"):
        convert_(nn.Sequential(nn.Linear(256, 256)), method)
    with pytest.raises(ValueError, match="whose length convert_ does not know"):
        convert_(nn.Sequential(nn.Linear(256, 256)), DQT(rounding_anneal=0.1))


REPRODUCIBLE = {
    "reproducible": True, "steps": 4, "save_every": 1, "keep_last": 9, "log_every": 1, "batch_tokens": 6 * 64,
    "micro_batch": 1,
}  # fmt: skip
RUNS = {
    "released": (  # so large a decay leaves the highest level at once
        {"name": "dqt", "grid": "int4", "rules": "released"}, {"lr": 0.05, "weight_decay": 10.0, "eps": 0.1}
    ),
    "annealed": ({"name": "dqt", "grid": "int4", "rounding_anneal": 0.75}, {}),
    "switched": ({"name": "dqt", "grid": "int8", "forward": "ternary", "forward_from": 0.5}, {}),
    "switched, annealed": (
        {
            "name": "dqt", "grid": "int4", "forward": "ternary", "forward_from": 0.25, "granularity": "row",
            "rounding_anneal": 1.0,
        },
        {"name": "lion"},
    ),
}  # fmt: skip


@pytest.fixture
def run(ranks, small, tmp_path):
    """`run(NAME, method, optimizer, world)`: the run's summary, and its folder."""

    def of(name, method, optimizer, world=1, stop_at=None, **sections):
        content = small(
            run={"name": name}, method=method, model={"layers": 1}, train=REPRODUCIBLE, optimizer=optimizer,
            **sections,
        )  # fmt: skip
        return ranks(world).run(train, content, stop_at)[0], tmp_path / name

    return of


def recorded(folder):
    """The rows of a run's layers, and of its metrics what does not depend on time or place."""
    from lowbit_dist.record import LAYERS, METRICS, rows_of

    names = ("step", "loss", "val_loss", "flip_rate", "zero_fraction", "saturation", "entropy")
    layers = [row["layers"] for row in rows_of(folder / LAYERS)]
    for of_layer in (of_layer for row in layers for of_layer in row.values()):
        of_layer.pop("grad_norm")  # a sum of floats
    return layers, [[row.get(name) for name in names] for row in rows_of(folder / METRICS)]


@pytest.mark.parametrize(("method", "optimizer"), standing(RUNS, "switched, annealed"))
def test_one_digest_on_any_number_of_workers_and_after_a_resume(method, optimizer, run):
    whole, folder = run("on1", method, optimizer, 1)
    digests = {world: run(f"on{world}", method, optimizer, world)[0]["digest"] for world in (2, 3)}
    assert set(digests.values()) == {whole["digest"]}, digests
    run("cut", method, optimizer, 2, stop_at=2)  # just before a forward pass changes, and just after
    summary, cut = run("cut", method, optimizer, 3)
    assert (summary["digest"], summary["val_loss"]) == (whole["digest"], whole["val_loss"])
    assert recorded(cut) == recorded(folder)


def test_released_scales_shrink_in_a_run_and_an_update_of_the_paper_leaves_them(run):
    from lowbit_dist.checkpoint import Checkpoint

    method, optimizer = RUNS["released"]
    for rules in ("released", "paper"):
        _, folder = run(rules, {**method, "rules": rules, "tensors": "all"}, optimizer)
        first, last = (Checkpoint.open(folder / "checkpoints" / f"step-{n}") for n in (1, 4))
        scales = [(first.scale(name), last.scale(name)) for name in first.names if first.grid(name)]
        assert len(scales) == len(first.names), "all tensors are codes"
        assert all(bool((b <= a).all()) for a, b in scales)
        shrunk = sum(not torch.equal(a, b) for a, b in scales)
        assert bool(shrunk) == (rules == "released"), shrunk


def test_a_run_whose_forward_pass_changes_is_first_one_and_then_the_other(run):
    from lowbit_dist import trained
    from lowbit_dist.checkpoint import Checkpoint
    from lowbit_dist.memory.plan import planned

    method, optimizer = RUNS["switched"]
    ternary = {"name": "dqt", "grid": "int8", "forward": "ternary"}
    stored = {"name": "dqt", "grid": "int8", "range_factor": 2.0}
    _, folder = run("switched", method, optimizer)
    others = [run(f"other{i}", other, optimizer)[1] for i, other in enumerate((stored, ternary))]

    def digests(folder):
        return [Checkpoint.open(folder / "checkpoints" / f"step-{n}").digest() for n in (1, 2, 3, 4)]

    assert digests(folder)[:2] == digests(others[0])[:2]
    assert not set(digests(folder)[2:]) & {*digests(others[0]), *digests(others[1])}
    seen = [trained.open(folder / "checkpoints" / f"step-{n}").method.sent_grid.name for n in (2, 3)]
    assert seen == ["int8", "ternary"], "a checkpoint is of the forward pass of its step"
    layers, _ = recorded(folder)
    assert layers[1] == recorded(others[0])[0][1]
    assert all(0.2 < of_layer["zero_fraction"] < 0.6 for of_layer in layers[-1].values())
    plans = []
    for folder_of in (folder, *others):
        config = configfile.load(folder_of / "config.yaml")
        plans.append(planned(config, 512, 2)["peak_bytes_per_worker"])
    assert plans[0] == max(plans[1:]) > min(plans[1:])


def test_flip_has_rules_and_rounding_of_its_own():
    assert Flip().rules == "paper"
    with pytest.raises(ConfigError, match="must be left out for method flip"):
        Flip(rounding_anneal=0.1)
    with pytest.raises(ValueError, match="paper"):
        Flip(rules="released")
