"""The field's methods against transcriptions of their published equations, in Python floats and loops that
share no code with the package: one layer's forward pass, its gradients, its levels.
"""

import math

import pytest
import torch
from cases import standing
from op_cases import random_residual
from test_methods import case, layer_of, rounded_tokens
from test_train import train
from torch import nn

from lowbit_dist import configfile, ops
from lowbit_dist.convert import Optimizer, convert_
from lowbit_dist.errors import ConfigError
from lowbit_dist.grid import GRIDS
from lowbit_dist.methods import DQT, TBT, BitNet, Dense, Flip, Tequila, TriLM
from lowbit_dist.ops import cpu, reference, rng
from lowbit_dist.optim import AdamW, schedule
from lowbit_dist.packed import PackedShard
from lowbit_dist.record import METRICS, rows_of

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def clip(value, low=-1, high=1):
    return min(max(value, low), high)


def passed(layer, x, dy):
    """The layer's output, and the gradients of its input and its weight."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y.detach().double(), x.grad.double(), layer.weight.grad.double()


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


@pytest.mark.parametrize("slices", [1, 2])
def test_trilm_follows_its_equations(slices):
    x, weight, dy = case(out=6)
    rows = weight.double().tolist()
    n = len(rows) // slices
    levels, viewed = [], []
    for first in range(0, len(rows), n):
        part = rows[first : first + n]
        gamma = 1e-5 + mean(abs(w) for row in part for w in row)
        levels += [[round(clip(w / gamma)) for w in row] for row in part]
        viewed += [[gamma * round(clip(w / gamma)) for w in row] for row in part]
    viewed, dy = torch.tensor(viewed, dtype=torch.float64), dy[:, :6]
    method = TriLM(slices=slices)
    y, dx, dw = passed(layer_of(method, weight), x, dy)
    torch.testing.assert_close(y, x.double() @ viewed.t(), **CLOSE)
    torch.testing.assert_close(dx, dy.double() @ viewed, **CLOSE)
    torch.testing.assert_close(dw, dy.double().t() @ x.double(), rtol=1e-5, atol=1e-5)
    assert method.levels(weight).tolist() == levels
    if slices == 2:
        assert not torch.equal(method.levels(weight), TriLM().levels(weight)), "slices must differ from one"


@pytest.mark.parametrize("reactivation", [1e-3, 0.1])
def test_tequila_follows_its_equations_and_ends_as_a_ternary_layer_with_a_bias(reactivation):
    x, weight, dy = case(out=6)
    dy = dy[:, :6]
    viewed, levels, bias = [], [], []
    for row in weight.double().tolist():
        of_row = []
        for first in range(0, len(row), 128):
            alpha = mean(map(abs, row[first : first + 128]))
            of_row += [(alpha, (w >= alpha / 2) - (w <= -alpha / 2)) for w in row[first : first + 128]]
        viewed.append([alpha * level for alpha, level in of_row])
        levels.append([level for _, level in of_row])
        bias.append(
            reactivation * math.fsum(w for w, (_, level) in zip(row, of_row, strict=True) if level == 0)
        )
    viewed, bias = (torch.tensor(values, dtype=torch.float64) for values in (viewed, bias))
    is_dead = torch.tensor(levels) == 0
    method = Tequila(reactivation=reactivation)
    y, dx, dw = passed(layer_of(method, weight), x, dy)
    torch.testing.assert_close(y, x.double() @ viewed.t() + bias, **CLOSE)
    torch.testing.assert_close(dx, dy.double() @ viewed, **CLOSE)
    plain = dy.double().t() @ x.double()
    extra = is_dead * (reactivation * dy.double().sum(0))[:, None]
    torch.testing.assert_close(dw, plain + extra, rtol=1e-5, atol=1e-5)
    assert extra.abs().max() > 1e-4, "the case must show the bias in the gradient"
    assert method.levels(weight).tolist() == levels

    finished = method.finished("a.weight", weight)
    assert list(finished) == ["a.weight", "a.bias"]
    assert finished["a.weight"].levels().tolist() == levels
    merged = nn.functional.linear(
        x.double(), finished["a.weight"].dequantize(torch.float32).double(), finished["a.bias"].double()
    )
    torch.testing.assert_close(merged, y.double(), **CLOSE)


@pytest.mark.parametrize("rules", ["paper", "released"])
@pytest.mark.parametrize("weights", ["ternary", "binary"])
def test_the_weights_of_tbt_follow_their_equations(weights, rules):
    x, weight, dy = case(out=6)
    weight, dy = weight + 0.004, dy[:, :6]
    viewed, levels, passes = [], [], []
    for row in weight.double().tolist():
        mu = mean(row) if rules == "paper" else 0.0
        alpha = mean(abs(w - mu) for w in row) * (4 / 3 if weights == "ternary" else 1)
        scaled = [(w - mu) / alpha for w in row]
        levels.append([round(clip(v)) if weights == "ternary" else int(math.copysign(1, v)) for v in scaled])
        viewed.append([alpha * level for level in levels[-1]])
        passes.append([abs(v) < 1 or rules == "released" for v in scaled])
    viewed = torch.tensor(viewed, dtype=torch.float64)
    method = TBT(weights=weights, rules=rules)
    y, dx, dw = passed(layer_of(method, weight), x, dy)
    xq = rounded_tokens(x)
    torch.testing.assert_close(y, xq @ viewed.t(), **CLOSE)
    torch.testing.assert_close(dx, dy.double() @ viewed, **CLOSE)
    torch.testing.assert_close(dw, dy.double().t() @ xq * torch.tensor(passes), rtol=1e-5, atol=1e-5)
    assert method.levels(weight).tolist() == levels
    assert method.forward_grid.n_levels == 3 and method.label == f"tbt {weights}"
    zeros = TBT(weights=weights, rules=rules)._view.forward(torch.zeros(2, 256))[0]
    assert torch.equal(zeros, torch.zeros(2, 256)), "a row of zeros has no size"


@pytest.mark.parametrize("rules", ["paper", "released"])
@pytest.mark.parametrize("bits", [1, 2])
def test_elastic_activations_follow_their_equations(bits, rules):
    x, weight, dy = case(out=6)
    x, dy, alpha = x + 0.3, dy[:, :6], 0.9
    method = TBT(activation_bits=bits, rules=rules)
    layer = layer_of(method, weight)
    assert method.initial("q_proj.activation.alpha", (1,)).item() == pytest.approx(2 * math.sqrt(2 / math.pi))
    layer.activation.alpha.data.fill_(alpha)
    viewed = method._view.forward(weight)[0].double()
    dxq = (dy.double() @ viewed).tolist()
    expected_x, expected_dx, dalpha = [], [], 0.0
    for token, d in zip(x.double().tolist(), dxq, strict=True):
        mu = mean(token) if rules == "paper" else 0.0
        scaled = [(v - mu) / alpha for v in token]
        if bits == 1:
            expected_x.append([alpha * math.copysign(1, v) for v in scaled])
            dalpha += sum(g * math.copysign(1, v) for g, v in zip(d, scaled, strict=True))
        else:
            expected_x.append([alpha * round(clip(v)) for v in scaled])
            dalpha += sum(
                g * (round(v) - v if abs(v) <= 1 else math.copysign(1, v))
                for g, v in zip(d, scaled, strict=True)
            )
        inside = [g if abs(v) <= 1 else 0.0 for g, v in zip(d, scaled, strict=True)]
        centre = mean(inside) if rules == "paper" else 0.0  # the mean that was taken off has a gradient, too
        expected_dx.append([g - centre for g in inside])
    y, dx, _ = passed(layer, x, dy)
    torch.testing.assert_close(y, torch.tensor(expected_x, dtype=torch.float64) @ viewed.t(), **CLOSE)
    torch.testing.assert_close(dx, torch.tensor(expected_dx, dtype=torch.float64), **CLOSE)
    assert layer.activation.alpha.grad.item() == pytest.approx(dalpha / math.sqrt(256), rel=1e-4)


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_a_ternary_forward_pass_rounds_the_stored_levels_by_their_mean_magnitude(granularity):
    _, weight, _ = case(out=8, inputs=512)
    method = DQT(grid="int8", forward="ternary", granularity=granularity)
    stored = method.quantize(weight)
    assert stored.grid == GRIDS["int8"] and method.sent_grid == method.forward_grid == GRIDS["ternary"]
    saturated = (stored.levels() == 127) | (stored.levels() == -128)
    assert 0.08 < saturated.double().mean() < 0.14, "as many normal weights are beyond two mean magnitudes"
    seen = method.seen(stored)
    size = {"tensor": 8 * 512, "row": 512, "group": 128}[granularity]
    levels, scales = [], []
    for part, scale in zip(
        stored.levels().reshape(-1, size).tolist(), stored.scale.double().tolist(), strict=True
    ):
        size_of_level = mean(map(abs, part))
        levels += [round(clip(level / size_of_level)) for level in part]
        scales.append(scale * size_of_level)
    assert seen.levels().flatten().tolist() == levels
    assert torch.equal(seen.scale, torch.tensor(scales).half().float())
    assert method.levels(seen.dequantize(torch.float32)).flatten().tolist() == levels
    assert method.label == "dqt int8, ternary forward" and DQT(grid="int8").label == "dqt int8"
    empty = PackedShard(stored.codes[:0], stored.scale, stored.scale_every, stored.grid, stored.shape, 16)
    assert method.sent(empty).codes.numel() == 0, "a worker may have no part of a tensor"


def seen_by(method, weight):
    seen = method.seen(method.quantize(weight))
    return seen.levels(), seen.scale


def test_a_whole_tensor_is_seen_alike_beside_others_that_have_it_too(ranks):
    """As under data parallelism in plain PyTorch: what each process has is no part of a sum."""
    _, weight, _ = case(out=8, inputs=512)
    method = DQT(grid="int8", forward="ternary")
    expected = seen_by(method, weight)
    for found in ranks(2).run(seen_by, method, weight):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_the_range_of_a_grid_is_a_multiple_of_its_scale():
    _, weight, _ = case(out=8, inputs=512)
    one, two = (DQT(grid="int4", scale="rms", range_factor=f).quantize(weight) for f in (None, 2.0))
    assert torch.equal(two.scale, (one.scale * 2).half().float()) and one.scale.item() > 0
    through = DQT(grid="int8", range_factor=2.0).through(weight, GRIDS["ternary"])
    assert torch.equal(through.scale, DQT(scale="rms").quantize(weight).scale), (
        "another grid has its own range"
    )


def accumulated(q, r, *, moved, decay, threshold, reach, leak, resets):
    """One element's step of `flip`, in Python floats: its level, and its residual before that is rounded."""
    x = (q + (1 - leak) * r) * (1 - decay) - moved
    new = clip(round(x)) if abs(x - q) > threshold else q
    return new, 0.0 if resets and new != q else clip(x - new, -reach, reach)


def rounded_residual(rest, word, reach, states):
    """By chance, in levels: to 127 counts on either side, or to the 8 significant bits of a bfloat16."""
    if states == "int8":
        counts = rest * 127 / reach
        return (math.floor(counts) + (word / 2**32 < counts - math.floor(counts))) * reach / 127
    unit = 2.0 ** (math.frexp(rest)[1] - 8)
    size, bits = divmod(abs(rest) / unit, 1)
    return math.copysign((size + (math.floor(bits * 2**16) + (word >> 16) >= 2**16)) * unit, rest)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"hysteresis": 0.2, "leak": 0.1}, {"on_flip": "reset", "granularity": "row"},
        {"last_hysteresis": 0.3}, {"hysteresis": 0.2, "last_hysteresis": 0.1, "on_flip": "reset"},
        {"residual": "bf16"}, {"residual": "bf16", "hysteresis": 0.2, "last_hysteresis": 0.0, "leak": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_flip_follows_its_equations(options):
    method, g = Flip(**options), torch.Generator().manual_seed(0)
    packed = method.quantize(torch.randn(4, 256, generator=g) * 0.02)
    kept, n = method.accumulator, packed.numel
    values = random_residual(kept, n, g).values
    unit = kept.reach / 127 if kept.states == "int8" else 1.0
    u, before, first = torch.randn(n, generator=g), packed.levels().flatten().tolist(), values.tolist()
    target = ops.Codes(
        packed.codes, packed.scale, packed.scale_every, packed.grid, 3, 0, ops.Residual(values, kept)
    )
    now = ops.Now(lr=0.004, weight_decay=0.5, step=7, seed=11, threshold=method.threshold(7, 10))
    flips = ops.apply_(target, u, now=now)
    words = rng.block_words(11, step=7, tensor=3, first_block=0, n_blocks=n // 256).flatten().tolist()
    scale = packed.scale.repeat_interleave(packed.scale_every).double().tolist()
    ends = [options.get("hysteresis", 0), options.get("last_hysteresis", options.get("hysteresis", 0))]
    reach, threshold = 0.5 + max(ends), 0.5 + 0.3 * ends[0] + 0.7 * ends[1]
    expected = []
    for q, r, d, s, word in zip(before, first, u.double().tolist(), scale, words, strict=True):
        level, rest = accumulated(
            q, r * unit, moved=0.004 / s * d, decay=0.004 * 0.5, threshold=threshold, reach=reach,
            leak=options.get("leak", 0), resets="on_flip" in options,
        )  # fmt: skip
        expected.append((level, pytest.approx(rounded_residual(rest, word, reach, kept.states), abs=1e-9)))
    after = list(zip(packed.levels().flatten().tolist(), (values.double() * unit).tolist(), strict=True))
    # float32 may draw an element's line of chance, or that of a flip, a hair from where float64 has it: small
    # residuals in bfloat16 have lines that are close together.
    wrong = sum(a != b for a, b in zip(after, expected, strict=True))
    assert wrong <= (1 if kept.states == "int8" else 5)
    assert flips.item() == sum(level != q for (level, _), q in zip(after, before, strict=True)) > 20


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "kept",
    [
        (0.5, 0.0, False), (0.7, 0.05, False), (0.5, 0.0, True),
        (0.7, 0.05, False, "bf16"), (0.5, 0.0, True, "bf16"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("every", [64, 512, 256 * 600])
def test_a_residual_is_the_same_in_c(grid, kept, every):
    """Every byte, over several steps, at the grid's ends and beyond, in several threads."""
    if not cpu.available():
        pytest.skip("no C compiler")
    g, n, grid = torch.Generator().manual_seed(1), 256 * 600, GRIDS[grid]
    levels = torch.randint(grid.low, grid.high + 1, (n,), generator=g).to(torch.int8)
    kept = ops.Accumulator(*kept)
    values = random_residual(kept, n, g).values
    scale = torch.rand(n // every, generator=g) * 0.05 + 0.01
    targets = [
        ops.Codes(
            ops.pack(levels, grid=grid), scale, every, grid, 5, 0, ops.Residual(values.clone(), kept),
        )
        for _ in range(2)
    ]  # fmt: skip
    for step, threshold in ((1, None), (2, 0.55), (2**31, 0.7)):
        u = torch.randn(n, generator=g) * 10 ** torch.randint(-6, 3, (n,), generator=g)
        now = ops.Now(lr=0.01, weight_decay=0.1, step=step, seed=2**60 + 3, threshold=threshold)
        flips = [each.apply_(t, u, now=now) for each, t in zip((cpu, reference), targets, strict=True)]
        assert torch.equal(*flips) and flips[0] > 0
        assert torch.equal(*(t.codes for t in targets))
        assert torch.equal(*(t.residual.values for t in targets))


@pytest.mark.parametrize("states", ["int8", "bf16"])
def test_a_residual_loses_nothing_on_average_and_its_parts_are_those_of_the_whole(states):
    kept, n = Flip(residual=states).accumulator, 256 * 200
    codes = ops.pack(torch.zeros(n, dtype=torch.int8), grid=GRIDS["ternary"])
    values, scale, u = kept.residual(n).values, torch.tensor([0.02]), torch.full((n,), -0.3)
    whole = ops.Codes(codes, scale, n, GRIDS["ternary"], 0, 0, ops.Residual(values, kept))
    parts = ops.Codes(codes.clone(), scale, n, GRIDS["ternary"], 0, 0, ops.Residual(values.clone(), kept))
    for step in range(1, 6):
        now = ops.Now(lr=0.001, weight_decay=0.0, step=step, seed=0)
        ops.apply_(whole, u, now=now)
        for start in range(0, n, 256 * 50):
            part = parts.part(start, start + 256 * 50)
            ops.apply_(part, u[: part.numel], now=now)
    assert torch.equal(whole.codes, parts.codes) and torch.equal(values, parts.residual.values)
    expected = 5 * 0.001 * 0.3 / 0.02
    assert not ops.unpack(codes, grid=GRIDS["ternary"]).any(), "7.5 % of a level flip nothing"
    spacing = {"int8": 1 / 254, "bf16": 2**-11}[states]
    deviation = spacing * math.sqrt(5 * 0.25 / n)  # a step's rounding has a variance of at most 1/4
    found = values.double().mean().item() * (1 / 254 if states == "int8" else 1)
    assert abs(found - expected) < 5 * deviation and len(values.unique()) > 1


def test_the_threshold_of_flip_moves_in_a_line_and_its_residual_reaches_the_highest():
    method = Flip(hysteresis=0.1, last_hysteresis=0.5)
    assert [method.threshold(step, 4) for step in (1, 2, 4)] == pytest.approx([0.7, 0.8, 1.0])
    assert method.accumulator.reach == 1.0
    falling = Flip(hysteresis=0.5, last_hysteresis=0.0)
    assert falling.threshold(4, 4) == 0.5 and falling.accumulator.reach == 1.0
    assert Flip(hysteresis=0.5).threshold(1, 4) is None
    content = {
        "data": {"path": "x"}, "optimizer": {"name": "rmsprop"},
        "method": {"name": "flip", "hysteresis": 0.1, "last_hysteresis": 0.5},
        "schedule": {"name": "constant"},
    }  # fmt: skip
    config, longer = (configfile.from_dict(content | {"train": {"steps": steps}}) for steps in (4, 8))
    assert schedule.now(config, 2, 2).threshold == pytest.approx(0.8)
    assert schedule.agree(config, config, 2) and not schedule.agree(config, longer, 2)
    with pytest.raises(ValueError, match="whose length convert_ does not know"):
        convert_(nn.Sequential(nn.Linear(256, 256)), method)


def test_a_residual_has_the_type_of_its_accumulator():
    kept, codes = Flip(residual="bf16").accumulator, torch.zeros(64, dtype=torch.uint8)
    residual = ops.Residual(torch.zeros(256, dtype=torch.int8), kept)
    target = ops.Codes(codes, torch.ones(1), 256, GRIDS["ternary"], 0, 0, residual)
    with pytest.raises(ValueError, match=r"residual is torch.int8; it must be torch.bfloat16"):
        ops.apply_(target, torch.zeros(256), now=ops.Now(lr=0.0, weight_decay=0.0, step=1, seed=0))


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"hysteresis": 0.003}, 0.004), ({"last_hysteresis": 0.003}, 0.004),
        ({"hysteresis": 0.01, "last_hysteresis": 1.0}, 0.0119),  # counts of a longer reach
        ({"hysteresis": 0.003, "residual": "bf16"}, 0.004),
    ],
)  # fmt: skip
def test_a_hysteresis_below_the_noise_of_its_residual_is_refused(options, least):
    with pytest.raises(ConfigError, match=rf"must be 0 or at least {least}, .*: {least}, or 0"):
        Flip(**options)
    name = next(iter(options))
    assert getattr(Flip(**options | {name: least}), name) == least
    assert Flip(hysteresis=0.01, last_hysteresis=1.0, residual="bf16").accumulator.reach == 1.5


METHODS = {
    "trilm": {"name": "trilm", "slices": 2},
    "tequila": {"name": "tequila", "group": 64},
    "tbt": {"name": "tbt", "activation_bits": 2},
    "tbt binary": {"name": "tbt", "weights": "binary", "activation_bits": 1, "rules": "released"},
    "flip": {"name": "flip", "hysteresis": 0.1, "leak": 0.01},
    "flip in bf16": {"name": "flip", "residual": "bf16", "last_hysteresis": 0.1},
    "dqt, ternary forward": {"name": "dqt", "grid": "int8", "forward": "ternary"},
    "dqt, ternary forward by rows": {
        "name": "dqt", "grid": "int4", "forward": "ternary", "granularity": "row",
    },
}  # fmt: skip
REPRODUCIBLE = {
    "reproducible": True, "steps": 4, "save_every": 2, "log_every": 2, "batch_tokens": 6 * 64,
    "micro_batch": 1,
}  # fmt: skip


@pytest.mark.parametrize("method", standing(METHODS, "tequila", "flip"))
def test_one_digest_on_any_number_of_workers_and_after_a_resume(method, ranks, small, tmp_path):
    optimizer = {"linear_lr_ratio": 0.25}
    if method["name"] == "flip":  # from 0, a residual has more than half a level to go
        optimizer = {"name": "rmsprop", "second_moment": "element", "linear_lr_ratio": 4.0}

    def run(label, world, stop_at=None):
        content = small(
            run={"name": label}, method=method, model={"layers": 1}, train=REPRODUCIBLE, optimizer=optimizer,
        )  # fmt: skip
        return ranks(world).run(train, content, stop_at)[0]

    digests = {world: run(f"on{world}", world)["digest"] for world in (1, 2, 3)}
    assert len(set(digests.values())) == 1, digests
    assert any(row["flip_rate"] for row in rows_of(tmp_path / "on1" / METRICS)), "the case must flip some"
    run("cut", 2, stop_at=2)
    assert run("cut", 3)["digest"] == digests[1]


@pytest.mark.parametrize("method", [{"name": "bitnet", "sub_norms": False}, {"name": "dense"}], ids=str)
def test_weights_of_linear_layers_have_a_rate_of_their_own(method, ranks, small):
    """With a rate of 0 for the others, it is theirs alone; the head, norms and the embedding do not move."""
    from lowbit_dist.checkpoint import Checkpoint

    def run(label, **optimizer):
        content = small(
            run={"name": label}, method=method, model={"layers": 1}, precision="fp32",
            optimizer={"states": "fp32", **optimizer}, schedule={"name": "constant", "warmup_steps": 0},
            train={"steps": 1, "save_every": 1, "clip_norm": 0.0},
        )  # fmt: skip
        return Checkpoint.open(ranks(1).run(train, content)[0]["checkpoint"])

    first, slow, fast = (
        run(label, lr=lr, linear_lr_ratio=ratio, weight_decay=0.0)
        for label, lr, ratio in (("first", 0.0, 1.0), ("slow", 1e-3, 0.25), ("fast", 1e-3, 1.0))
    )
    for name in first.names:
        moves = [(each.tensor(name) - first.tensor(name)).double() for each in (slow, fast)]
        ratio = 0.25 if name.endswith("proj.weight") else 1.0
        torch.testing.assert_close(moves[0], ratio * moves[1], rtol=1e-3, atol=1e-8, msg=name)
        assert moves[1].abs().max() > 1e-4, name


def test_the_rate_of_linear_layers_holds_in_plain_pytorch():
    for method in (BitNet(), DQT(grid="int8"), Dense()):
        model = convert_(nn.Sequential(nn.Linear(256, 256), nn.RMSNorm(256)), method)
        optimizer = Optimizer(model, AdamW(lr=1e-2, linear_lr_ratio=0.1))
        rates = {p.shape: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates == {torch.Size([256, 256]): pytest.approx(1e-3), torch.Size([256]): 1e-2}


def test_a_conversion_that_does_not_fit_changes_nothing():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 255))
    with pytest.raises(ValueError, match=r"layer 1: 2 slices do not divide 255 rows"):
        convert_(model, TriLM(slices=2))
    assert all(type(layer) is nn.Linear for layer in model)
