"""What the interface of methods must carry, shown by the toys of toys.py: other codes on the wire than in the
shard, a bias from the weight, a parameter of an activation quantiser.
"""

import json
from pathlib import Path

import pytest
import torch
import toys
from cases import standing
from test_train import train as train_alone
from torch import nn
from toys import LAMBDA, TOYS, Biased, DeadZone, FineStored, LearnedActivation

from lowbit_dist import configfile
from lowbit_dist.grid import GRIDS
from lowbit_dist.linear import linear
from lowbit_dist.methods import METHODS
from lowbit_dist.optim import OPTIMIZERS

REPRODUCIBLE = {
    "reproducible": True,
    "steps": 4,
    "save_every": 2,
    "log_every": 2,
    "batch_tokens": 6 * 64,
    "micro_batch": 1,
}


def train(configuration, stop_at=None):
    toys.register()
    return train_alone(configuration, stop_at)


@pytest.mark.parametrize("name", standing({name: name for name in TOYS}, "learned-activation"))
def test_a_toy_gives_one_digest_on_any_number_of_workers_and_after_a_resume(name, ranks, small):
    def run(label, world, stop_at=None, **sections):
        method, model = {"name": name}, {"layers": 1}
        content = small(run={"name": label}, method=method, model=model, train=REPRODUCIBLE, **sections)
        return ranks(world).run(train, content, stop_at)[0]

    digests = {world: run(f"{name}{world}", world)["digest"] for world in (1, 2, 3)}
    assert len(set(digests.values())) == 1, digests
    run("cut", 2, stop_at=2)
    assert run("cut", 3)["digest"] == digests[1]
    if TOYS[name]().stored is not None:
        assert run("replicated", 2, zero={"residency": "replicated"})["digest"] == digests[1]


def rows(configuration):
    text = Path(configuration["run"]["dir"], configuration["run"]["name"], "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", ["fine-stored", "biased"])
def test_statistics_are_of_the_forward_passs_own_levels(name, ranks, small, known):
    content = small(
        method={"name": name}, train={"steps": 4, "log_every": 1, "save_every": 4, "eval_every": 4}
    )
    summary = ranks(2).run(train, content)[0]
    from lowbit_dist.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(summary["checkpoint"])
    zeros = total = 0
    for tensor in (checkpoint.tensor(n) for n in checkpoint.names if n.endswith("proj.weight")):
        if name == "fine-stored":
            levels = (tensor.levels().double() * 3 / 127).round()  # written again, not by the toy
        else:
            levels = (tensor / tensor.abs().mean(1, keepdim=True)).round()
        zeros, total = zeros + int((levels == 0).sum()), total + levels.numel()
    found = rows(content)
    assert found[-1]["zero_fraction"] == pytest.approx(zeros / total, abs=1e-6)
    assert found[-1]["saturation"] == pytest.approx(1 - zeros / total, abs=1e-6)
    assert all(0 < row["flip_rate"] < 0.2 for row in found[1:]), (
        "ternary levels flip far less than int8 codes"
    )


def gathered_bytes(configuration):
    """Per low-bit weight: bytes that a worker of two receives in a step of one pass, and that it keeps."""
    from lowbit_dist import memory, model, ops
    from lowbit_dist.zero import Engine

    toys.register()

    config = configfile.from_dict(configuration)
    built = model.build(config.model, 512, config.method, torch.float32)
    initial = model.InitialWeights(built, config.method, 0, None)
    engine = Engine(config, built, initial, model.low_bit_names(built, config.method))
    before = []
    for n in (1, 2, 3):
        before.append(engine.gathered_bytes)
        with engine.step(ops.Now(lr=1e-3, weight_decay=0.0, step=n, seed=0)) as step:
            step.backward(torch.arange(128).view(2, 64))
    numel = sum(engine.numels[name] for name in engine.low_bit)
    kept = memory.measure(engine)["components"]["low_bit_weights"]["bytes"]
    gathered = engine.gathered_bytes - before[-1]
    engine.close()
    return gathered / numel, kept / numel


@pytest.mark.parametrize("residency", ["sharded", "replicated"])
def test_gathers_move_the_sent_codes(residency, ranks, small):
    content = small(
        method={"name": "fine-stored"}, zero={"residency": residency}, train={"batch_tokens": 256}
    )
    for received, kept in ranks(2).run(gathered_bytes, content):
        gathers = 2 if residency == "sharded" else 1  # forward and backward pass, or once a step
        assert received == gathers * 0.25 / 2, "half of 2 bits a weight is another worker's"
        # Its half of int8 codes and of the 2-bit codes made of them; replicated, also all of these.
        assert kept == 0.5 + 0.125 + (0.25 if residency == "replicated" else 0)


@pytest.fixture
def known():
    """The toys are known in this process while a test runs."""
    before = METHODS.keys() | OPTIMIZERS.keys()
    toys.register()
    yield
    for registry in (METHODS, OPTIMIZERS):
        for name in registry.keys() - before:
            del registry[name]


@pytest.mark.parametrize(
    ("optimizer", "same_states"),
    [({"name": "half"}, 4 + 4 + 2), ({"name": "lion", "states": "fp32"}, 4 + 4 + 4)],
    ids=str,
)
def test_adamw_is_a_baseline_whatever_a_run_is_trained_by(optimizer, same_states, small, known):
    from lowbit_dist import memory

    plans = memory.baselines(configfile.from_dict(small(optimizer=optimizer)), 512, 1)
    each = {
        name: plan["resident_bytes_per_worker"] / plan["parameters"]["total"] for name, plan in plans.items()
    }
    assert each["plan_dense"] == pytest.approx(4 + 4 + 8, rel=1e-3)
    assert each["plan_dense_same_states"] == pytest.approx(same_states, rel=1e-3)


def test_the_plan_knows_what_is_sent(ranks, small, known):
    from lowbit_dist.memory.plan import planned

    for residency in ("sharded", "replicated"):
        content = small(
            method={"name": "fine-stored"}, zero={"residency": residency}, train={"batch_tokens": 256}
        )
        config = configfile.from_dict({**content, "cluster": {"workers": 2}})
        plan = planned(config, 512, 2)["components"]["low_bit_weights"]
        kept = ranks(2).run(gathered_bytes, content)[0][1]
        assert plan["bytes_per_parameter"] == 2 * kept, "of both workers"


def test_a_bias_from_the_weight_has_the_gradient_of_autograd():
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 64, generator=g), torch.randn(7, 64, generator=g)
    dy = torch.randn(5, 7, generator=g)
    ours = [t.clone().requires_grad_() for t in (x, weight)]
    linear(*ours, view=DeadZone()).backward(dy)

    x, w = (t.clone().requires_grad_() for t in (x, weight))
    alpha = w.detach().abs().mean(1, keepdim=True)
    levels = (w.detach() / alpha).round().clamp(-1, 1)
    straight = w + (levels * alpha - w).detach()
    y = x @ straight.t() + LAMBDA * torch.where(levels == 0, w, 0.0).sum(1)
    y.backward(dy)
    torch.testing.assert_close(ours[0].grad, x.grad)
    torch.testing.assert_close(ours[1].grad, w.grad)
    assert (levels == 0).any() and not torch.equal(ours[1].grad, dy.t() @ x.detach()), "the bias must count"


def test_a_learned_activation_scale_has_the_gradient_of_its_definition():
    g = torch.Generator().manual_seed(0)
    layer = LearnedActivation().linear(nn.Linear(64, 7, bias=False), name="q", is_head=False, norm_eps=1e-5)
    layer.activation.alpha.data.fill_(0.25)
    x, dy = torch.randn(50, 64, generator=g), torch.randn(50, 7, generator=g)
    layer(x).backward(dy)
    dx = (dy @ layer.weight.detach()).double()
    expected = 0.0
    for v, d in zip((x.double() / 0.25).flatten().tolist(), dx.flatten().tolist(), strict=True):
        expected += d * (min(max(v, -8), 7) if not -8 <= v <= 7 else round(v) - v)
    assert layer.activation.alpha.grad.item() == pytest.approx(expected, rel=1e-4)
    assert (x.abs() / 0.25 > 8).any(), "the case must have elements beyond the grid"


def test_labels_and_grids_are_the_methods_own():
    assert [toy().label for toy in (FineStored, Biased, LearnedActivation)] == list(TOYS)
    assert FineStored().stored == GRIDS["int8"] and FineStored().forward_grid == GRIDS["ternary"]
    assert Biased().stored is None and LearnedActivation().forward_grid is None


def test_a_run_whose_codes_are_sent_evaluates_as_it_trained(ranks, small, known):
    """Evaluation multiplies with what the gathers moved, packed and decoded alike."""
    from lowbit_dist import trained

    content = small(method={"name": "fine-stored"}, train={"steps": 4, "save_every": 4, "eval_every": 4})
    summary = ranks(2).run(train, content)[0]
    opened = trained.open(summary["checkpoint"])
    assert opened.evaluate(content["data"]["path"])["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    for packed in (False, True):
        weight = opened.network(packed=packed).model.layers[0].mlp.up_proj.weight
        values = weight.packed.dense(weight.shape, torch.float32) if packed else weight
        assert len(values.unique()) == 3, "a ternary forward pass"


class OwnGrid(FineStored):
    @property
    def stored(self):
        from lowbit_dist.grid import Grid

        return Grid("int2-symmetric", -1, 2, 2)


def test_a_grid_that_no_checkpoint_could_name_is_refused(small, known, monkeypatch):
    from lowbit_dist.config import ConfigError

    monkeypatch.setattr(toys, "FineStored", OwnGrid)
    with pytest.raises(ConfigError, match=r"method\.name \(fine-stored\) packs weights on a grid of its own"):
        configfile.from_dict(small(method={"name": "fine-stored"}))


def test_levels_that_a_method_does_not_tell_are_not_reported(ranks, small):
    content = small(method={"name": "silent"}, train={"steps": 2, "log_every": 1, "save_every": 2})
    ranks(2).run(train, content)
    assert all("zero_fraction" not in row for row in rows(content))
