"""Adafactor against its published equations and `torch.optim.Adafactor`; factored states on shards."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import standing
from test_memory import check_plan
from test_train import SMALLER, train
from torch import nn

from lowbit_dist import ops
from lowbit_dist.convert import Optimizer, convert_
from lowbit_dist.methods import DQT, BitNet, Flip
from lowbit_dist.optim import Adafactor, AdamW, RMSProp
from lowbit_dist.record import METRICS, rows_of

LR, DECAY = 1e-2, 0.1


def gradients(shape, n=5, size=1.0):
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(shape[:-1], generator=generator)[..., None] if len(shape) > 1 else 1
    return [torch.randn(shape, generator=generator) * size * (rows + 0.1) for _ in range(n)]


def moved(rule, weight, gradients):
    """The weight after steps of the rule on all of it, and the rule's state."""
    weight, shape = weight.clone(), tuple(weight.shape)
    state = rule.initial_state(shape)
    for step, g in enumerate(gradients, 1):
        now = ops.Now(lr=LR, weight_decay=DECAY, step=step, seed=0)
        rule.step_(ops.Weights(weight.view(-1)), g.reshape(-1), state, now=now, shape=shape)
    return weight, state


def by_its_equations(weight, gradients, *, beta, eps, clip):
    """Algorithms 4 (matrices) and 5 (vectors) of arXiv 1804.04235, in Python floats, with a given rate."""
    x = weight.double().tolist()
    is_matrix = isinstance(x[0], list)
    x = x if is_matrix else [x]
    n, m = len(x), len(x[0])
    r, c, v = [0.0] * n, [0.0] * m, [0.0] * m
    for t, g in enumerate(gradients, 1):
        g = g.double().tolist() if is_matrix else [g.double().tolist()]
        kept = 1 - t**-0.8 if beta is None else beta * (1 - beta ** (t - 1)) / (1 - beta**t)  # section 7.1
        squares = [[e * e + eps for e in row] for row in g]
        r = [kept * old + (1 - kept) * math.fsum(row) for old, row in zip(r, squares, strict=True)]
        c = [
            kept * old + (1 - kept) * math.fsum(column)
            for old, column in zip(c, zip(*squares, strict=True), strict=True)
        ]
        v = [kept * old + (1 - kept) * e for old, e in zip(v, squares[0], strict=True)]
        estimate = [[a * b / math.fsum(r) for b in c] for a in r] if is_matrix else [v]
        u = [
            [e / math.sqrt(w) for e, w in zip(row, of, strict=True)]
            for row, of in zip(g, estimate, strict=True)
        ]
        rms = math.sqrt(math.fsum(e * e for row in u for e in row) / (n * m))
        by = max(1, rms / clip) if clip else 1
        x = [
            [old * (1 - LR * DECAY) - LR * e / by for old, e in zip(row, of, strict=True)]
            for row, of in zip(x, u, strict=True)
        ]
    return torch.tensor(x if is_matrix else x[0])


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (1, 7), (9,), (1,)])
@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.9, "clip_rms": 0.0, "eps": 1e-4}, {"clip_rms": 0.5}], ids=str
)
def test_it_follows_its_equations(shape, options):
    weight, g = torch.randn(shape), gradients(shape)
    g[1] *= 100  # is clipped
    rule = Adafactor(**options)
    found, _ = moved(rule, weight, g)
    expected = by_its_equations(weight, g, beta=rule.beta, eps=rule.eps, clip=rule.clip_rms)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96), (33,)])
def test_a_weight_moves_as_under_torchs_own(shape):
    """Whose rate is the weight's size times lr, here 1 times."""
    weight, g = torch.rand(shape) * 0.5, gradients(shape)
    g[1] *= 100
    theirs = nn.Parameter(weight.clone())
    peer = torch.optim.Adafactor([theirs], lr=LR, weight_decay=DECAY, eps=(None, 1.0))
    for each in g:
        theirs.grad = each.clone()
        peer.step()
    found, state = moved(Adafactor(), weight, g)
    torch.testing.assert_close(found, theirs.detach(), rtol=1e-5, atol=1e-6)
    if len(shape) > 1:
        for stored, name in zip(state, ("row_var", "col_var"), strict=True):
            torch.testing.assert_close(stored.values, peer.state[theirs][name].flatten(), rtol=1e-5, atol=0)


def test_gradients_of_any_size_and_of_zero_give_finite_steps():
    """As the rows of tokens that a batch has not have."""
    for size in (1e-6, 1e-3, 1e6):
        g = gradients((40, 16), size=size)
        for i, each in enumerate(g):
            each[i : i + 20] = 0
            each[-1] *= 1e-8
        weight = torch.zeros(40, 16)
        found, _ = moved(Adafactor(clip_rms=0.0), weight, g)
        assert found.isfinite().all() and found.abs().max() < 10 * LR * len(g)
        assert found[-1].abs().mean() > 0.2 * LR, "a row is measured by itself"
        assert found[0].abs().max() > 0 and not moved(Adafactor(), weight, [torch.zeros(40, 16)])[0].any()


def test_rmsprop_follows_its_equations():
    rule, v, slot = RMSProp(beta=0.9, eps=1e-3), 0.0, torch.zeros(1)
    for step, g in enumerate([2e-3, -1e-2, 3e-3], 1):
        v = 0.9 * v + 0.1 * g * g
        u, slot = rule.update(torch.tensor([g]), slot, step=step)
        assert u.item() == pytest.approx(g / (math.sqrt(v / (1 - 0.9**step)) + 1e-3), rel=1e-5)
    # Without a mean and an eps that counts, a gradient is divided by the IEEE root, wherever it stands.
    g = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    u, _ = RMSProp(beta=0.0, eps=1e-20).update(g, torch.zeros_like(g), step=1)
    assert torch.equal(u, g / torch.from_numpy(np.sqrt((g * g).numpy())))


def test_factored_rmsprop_is_adafactor_with_its_beta_on_linear_layers_alone():
    rule = RMSProp(beta=0.9, eps=1e-8, second_moment="factored", states="int8")
    linear, other = (rule.of(is_linear=is_linear) for is_linear in (True, False))
    assert linear == Adafactor(beta=0.9, eps=1e-8**2, clip_rms=0.0) and isinstance(other, AdamW)
    assert other.states == "int8" and RMSProp().second_moment == "factored"
    of_elements = RMSProp(second_moment="element")
    assert of_elements.of(is_linear=True) == of_elements
    # One gradient, of products: then the product is the very second moment, that of each element.
    g = torch.rand(6, 1).add(0.5) @ torch.rand(1, 8).add(0.5)
    per_element = RMSProp(beta=0.9, states="fp32")
    v, weight = torch.zeros(6, 8), torch.zeros(6, 8)
    for step, each in enumerate((g, 3 * g, -g), 1):
        u, v = per_element.update(each, v, step=step)
        weight = weight * (1 - LR * DECAY) - LR * u
    found, _ = moved(linear, torch.zeros(6, 8), [g, 3 * g, -g])
    torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-7)


REPRODUCIBLE = {
    "reproducible": True, "steps": 4, "save_every": 2, "log_every": 2, "batch_tokens": 6 * 64,
    "micro_batch": 1,
}  # fmt: skip
# Codes with residuals flip in a few steps at such a rate alone: from 0, a residual has half a level to go.
FACTORED = {"name": "rmsprop", "linear_lr_ratio": 4.0}
RUNS = {
    "codes": {"optimizer": {"name": "adafactor"}, "method": {"grid": "int8"}, "model": SMALLER},
    # rows of 576 are cut anywhere; a worker has none of a norm's gains
    "latent weights": {
        "optimizer": {"name": "adafactor", "beta": 0.9},
        "method": {"name": "bitnet"},
        "model": {"hidden_size": 576, "intermediate_size": 768, "heads": 9, "kv_heads": 3, "layers": 1},
    },
    "flip": {"optimizer": FACTORED, "method": {"name": "flip"}, "model": SMALLER},
}


@pytest.mark.parametrize("sections", standing(RUNS, "flip"))
def test_one_digest_on_any_number_of_workers_and_after_a_resume(sections, ranks, small, tmp_path):
    def run(label, world, stop_at=None):
        return ranks(world).run(train, small(run={"name": label}, train=REPRODUCIBLE, **sections), stop_at)[0]

    found = {world: run(f"on{world}", world)["digest"] for world in (1, 2, 3)}
    for before, after in pairwise((1, 3, 2)):
        run(f"cut{before}", before, stop_at=2)
        found[f"{before}, then {after}"] = run(f"cut{before}", after)["digest"]
    assert len(set(found.values())) == 1, found
    assert any(row["flip_rate"] for row in rows_of(tmp_path / "on1" / METRICS)), "the case must flip some"


def test_a_checkpoint_has_rows_and_columns_once(ranks, small):
    from lowbit_dist.checkpoint import Checkpoint

    content = small(train=REPRODUCIBLE, **RUNS["flip"])
    saved = Checkpoint.open(ranks(3).run(train, content)[0]["checkpoint"])
    name = "model.layers.0.mlp.down_proj.weight"
    assert saved.shape(name) == (256, 512)
    held = [json.dumps(list(_keys(saved.path / file))) for file in saved.manifest["files"]]
    assert [f"{name}/slots/rows" in keys for keys in held] == [True, False, False]
    assert saved.whole(name, "slots/rows").shape == (256,)
    assert saved.whole(name, "slots/columns").shape == (512,)
    assert (saved.whole(name, "slots/columns") > 0).all()
    # of the gradients' squares: both have one mean
    means = [saved.whole(name, f"slots/{of}").double().mean().item() for of in ("rows", "columns")]
    assert means[0] == pytest.approx(means[1], rel=1e-5)


def _keys(path):
    from lowbit_dist.checkpoint.reading import _tensor_sizes

    return (key for key, _ in _tensor_sizes(path))


PLANS = [
    (1, {"optimizer": FACTORED, "method": {"name": "flip"}, "precision": "bf16"}),
    (3, {"optimizer": FACTORED, "method": {"name": "flip"}}),
    (2, {"optimizer": FACTORED, "method": {"name": "flip", "residual": "bf16"}, "precision": "bf16"}),
    (2, {"optimizer": {"name": "adafactor"}, "method": {"grid": "int8"}, "precision": "bf16"}),
    (2, {"optimizer": {"name": "adafactor"}, "method": {"name": "bitnet"}, "zero": {"stage": 0}}),
]


@pytest.mark.parametrize(
    ("world", "case"), standing({str(plan): plan for plan in PLANS}, str(PLANS[0]), str(PLANS[4]))
)
def test_the_plan_is_what_is_measured(world, case, ranks):
    check_plan(case, world, ranks)


def test_a_flip_accumulator_with_factored_moments_takes_five_quarters_of_a_byte():
    from lowbit_dist import configfile
    from lowbit_dist.checkpoint.space import checkpoint_bytes
    from lowbit_dist.memory.resident import resident
    from lowbit_dist.model import linear_weights, shapes

    model = {"hidden_size": 1024, "intermediate_size": 2816, "heads": 8, "kv_heads": 8, "layers": 2}
    content = {"data": {"path": "x"}, "method": {"name": "flip"}, "model": model, "precision": "bf16"}
    configs = [
        configfile.from_dict(content | {"optimizer": FACTORED | {"second_moment": of}})
        for of in ("element", "factored")
    ]
    named = dict(shapes(configs[0], 512).named_parameters())
    linear = [tuple(named[name].shape) for name in linear_weights(shapes(configs[0], 512))]
    n, ends = sum(map(math.prod, linear)), sum(map(sum, linear))
    parts = [resident(config, shapes(config, 512), 1) for config in configs]
    fewer = parts[0]["optimizer_states"] - parts[1]["optimizer_states"]
    assert fewer == n + n // 64 - 4 * ends, (
        "8 bits of each element, and a scale of 256, for its rows and columns"
    )
    assert checkpoint_bytes(configs[0], 512) - checkpoint_bytes(configs[1], 512) == fewer
    low_bit = parts[1]["low_bit_weights"] + parts[1]["scales"] + n + 4 * ends
    assert low_bit / n < 1.26
    assert parts[1]["low_bit_weights"] == n // 4


@pytest.mark.parametrize("method", [BitNet(), DQT(grid="int8"), Flip()])
def test_it_is_an_optimizer_of_plain_pytorch_that_resumes(method):
    def network():
        torch.manual_seed(0)
        return convert_(nn.Sequential(nn.Embedding(16, 256), nn.Linear(256, 64), nn.RMSNorm(64)), method)

    def step(model, optimizer, seed):
        tokens = torch.randint(16, (8,), generator=torch.Generator().manual_seed(seed))
        model.zero_grad()
        model(tokens).sin().sum().backward()
        optimizer.step()

    for rule in (Adafactor(), RMSProp(second_moment="factored", states="int8")):
        model = network()
        optimizer = Optimizer(model, rule)
        for seed in range(3):
            step(model, optimizer, seed)
        again = network()
        resumed = Optimizer(again, rule)
        again.load_state_dict(model.state_dict())
        resumed.load_state_dict(optimizer.state_dict())
        for each in ((model, optimizer), (again, resumed)):
            step(*each, 7)
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), again.parameters(), strict=True))
        state = optimizer.state[model[1].weight]
        assert state["rows"].shape == (64,) and state["columns"].shape == (256,)
        assert state["rows"].dtype == torch.float32


DENSE = {"data": {"path": "x"}, "method": {"name": "dense"}, "precision": "fp32"}


@pytest.mark.parametrize(
    ("optimizer", "more", "answer"),
    [
        ({"name": "adafactor", "states": "int8"}, {},
         "optimizer.states ('int8') must be fp32; write fp32, for example"),
        ({"name": "adafactor"}, {"zero": {"stage": 2}},
         "zero.stage (2) must not be used with optimizer adafactor, which must know which weight an element "
         "is of: DeepSpeed's stage-1/2 partitions are flat; write zero.stage: 3, or 0"),
        ({"name": "rmsprop", "states": "fp32", "second_moment": "factored"}, {"zero": {"stage": 1}},
         "zero.stage (1) must not be used with optimizer rmsprop, which must know which weight an element is "
         "of: DeepSpeed's stage-1/2 partitions are flat; write zero.stage: 3, or 0"),
        ({"name": "rmsprop", "states": "fp32"}, {"zero": {"stage": 1}}, "optimizer rmsprop, which must know"),
        ({"name": "rmsprop", "second_moment": "rows"}, {},
         "optimizer.second_moment ('rows') must be one of element, factored"),
        ({"name": "adafactor", "eps": 0.0}, {}, "optimizer.eps (0.0) must be"),
        ({"name": "adafactor", "beta": 1.0}, {}, "optimizer.beta (1.0) must be"),
        ({"name": "adafactor", "clip_rms": -1.0}, {}, "optimizer.clip_rms (-1.0) must be"),
        ({"name": "adamw", "clip_rms": 1.0}, {}, "it belongs to adafactor"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_answered_in_one_line(optimizer, more, answer):
    from lowbit_dist import configfile
    from lowbit_dist.config import ConfigError

    with pytest.raises(ConfigError) as error:
        configfile.from_dict(DENSE | {"optimizer": optimizer} | more)
    assert answer in str(error.value) and "\n" not in str(error.value)
