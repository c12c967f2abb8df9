"""Muon against `torch.optim.Muon`, and what is AdamW's."""

import math

import pytest
import torch
from torch import nn

from lowbit_dist import ops
from lowbit_dist.convert import Optimizer, convert_
from lowbit_dist.methods import DQT, BitNet
from lowbit_dist.optim import AdamW, Muon


def gradients(shape, n=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(n)]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)])
def test_a_matrix_moves_as_under_torchs_own(shape, nesterov):
    rule, weight = Muon(momentum=0.9, nesterov=nesterov, states="fp32"), torch.randn(shape)
    theirs = nn.Parameter(weight.clone())
    peer = torch.optim.Muon(
        [theirs], lr=1e-2, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    ours = weight.clone()
    state = [ops.Stored.zeros(slot, ours.numel(), "fp32") for slot in rule.slots]
    for step, g in enumerate(gradients(shape), 1):
        now = ops.Now(lr=1e-2, weight_decay=0.1, step=step, seed=0)
        ops.whole_step_(ops.Weights(ours.view(-1)), g, state, rule=rule, now=now)
        theirs.grad = g.clone()
        peer.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    assert (ours - weight).abs().max() > 0.01


def test_its_directions_have_the_size_of_adamws():
    rule, (g,) = Muon(), gradients((256, 128), 1)
    u, _ = rule.update(g, torch.zeros_like(g), step=1)
    assert u.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)


@pytest.mark.parametrize("method", [BitNet(), DQT(grid="int8")])
def test_all_but_the_matrices_of_linear_layers_is_adamws(method):
    """Equal to AdamW's own run where no linear layer is."""
    rule = Muon(lr=1e-2, states="fp32")
    model = convert_(
        nn.Sequential(nn.Embedding(8, 256), nn.Linear(256, 256, bias=False), nn.RMSNorm(256)), method
    )
    alone = nn.Sequential(nn.Embedding(8, 256), nn.Identity(), nn.RMSNorm(256))
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("1.")})
    adamw = AdamW(lr=1e-2, betas=rule.betas, states="fp32", weight_decay=rule.weight_decay)
    optimizers = Optimizer(model, rule), Optimizer(alone, adamw)
    slots = {
        name: len(rule.of(is_linear=name.startswith("1.")).slots) for name, _ in model.named_parameters()
    }
    assert slots == {"0.weight": 2, "1.weight": 1, "2.weight": 2}
    for g in gradients((8, 256), 3):
        for net, optimizer in zip((model, alone), optimizers, strict=True):
            for name, p in net.named_parameters():
                p.grad = (
                    torch.ones(p.shape)
                    if name.startswith("1.")
                    else g[: len(p)].reshape(-1)[: p.numel()].view(p.shape).clone()
                )
            optimizer.step()
    for name, p in alone.named_parameters():
        assert torch.equal(p, dict(model.named_parameters())[name]), name


def are_those_of_the_whole(shapes):
    """Of each matrix's direction and momentum: whether this worker's part of it is."""
    import torch.distributed as dist

    from lowbit_dist.zero.whole import Matrix, updated

    world, rank, rule = dist.get_world_size(), dist.get_rank(), Muon()
    matrices, expected = [], []
    for seed, shape in enumerate(shapes):
        generator = torch.Generator().manual_seed(seed)
        whole = [torch.randn(shape, generator=generator) for _ in range(2)]
        n = math.prod(shape)
        padded = -(-n // (256 * world)) * 256
        here = slice(rank * padded, min(n, (rank + 1) * padded))
        matrices.append(Matrix(rule, shape, padded, [x.view(-1)[here] for x in whole]))
        expected.append([x.reshape(-1)[here] for x in rule.update(*whole, step=3)])
    found = updated(matrices, step=3)
    return [
        torch.equal(a, b)
        for parts, of_whole in zip(found, expected, strict=True)
        for a, b in zip(parts, of_whole, strict=True)
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_of_a_few_matrices_each_worker_sees_one_whole(world, ranks):
    shapes = [(40, 64), (96, 32), (2, 200)][:world]  # of the last, two of three workers have a part
    for few in (shapes, shapes[-1:]):
        assert ranks(world).run(are_those_of_the_whole, few) == [[True] * 2 * len(few)] * world


def test_stages_that_cut_matrices_are_refused():
    from lowbit_dist import configfile
    from lowbit_dist.config import ConfigError

    content = {
        "data": {"path": "x"},
        "method": {"name": "dense"},
        "precision": "fp32",
        "optimizer": {"name": "muon", "states": "fp32"},
    }
    with pytest.raises(ConfigError, match=r"zero.stage \(2\) must not be used with optimizer muon"):
        configfile.from_dict(content | {"zero": {"stage": 2}})
    assert configfile.from_dict(content | {"zero": {"stage": 0}}).optimizer.momentum == 0.95
