"""Post-training quantisation: the methods against what they are derived from, and models that it gives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hf_folders
import numpy as np
import pytest
import torch
from test_trained import logits

import lowbit_dist
from lowbit_dist.checkpoint import Checkpoint
from lowbit_dist.config import ConfigError
from lowbit_dist.convert import PackedLinear
from lowbit_dist.grid import GRIDS
from lowbit_dist.methods import DQT, Dense
from lowbit_dist.model import of_hf_config
from lowbit_dist.packed import PackedTensor
from lowbit_dist.quantize import GPTQ, PTQTP, RTN, Calibration, quantize
from lowbit_dist.quantize.calibration import micro_batches
from lowbit_dist.quantize.gptq import inverse_factor
from lowbit_dist.quantize.ptqtp import fit, fit_tied, squared_error
from lowbit_dist.quantize.quantizer import Gram
from lowbit_dist.quantize.walk import Walk, blocks

BITS = (2, 3, 4, 6, 8)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(x):
    gram = Gram(torch.zeros(x.shape[1], x.shape[1]))
    gram.add(x)
    return gram


def correlated(n_tokens, n, seed=1):
    """Inputs of a layer some of which are large, and all of which have much in common."""
    x = random(n_tokens, n, seed=seed) + 2 * random(n_tokens, 4, seed=seed + 1) @ random(4, n, seed=seed + 2)
    return x * (1 + 5 * random(n, seed=seed + 3).abs())


def output_error(weight, packed, gram):
    difference = weight - packed.dequantize(torch.float32)
    return (difference @ gram.total * difference).sum().item()


def equal(a, b):
    return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and a.scale_every == b.scale_every


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_gptq_is_rounding_to_nearest_where_inputs_have_nothing_in_common(bits, act_order):
    weight, sizes = random(64, 256), random(256, seed=1).abs() + 0.1
    gram = Gram(torch.diag(sizes) * 1000, n_tokens=1000)
    assert equal(GPTQ(bits=bits, act_order=act_order).layer(weight, gram), RTN(bits=bits).layer(weight, None))


def transcription(weight, hessian, bits, group, damping, order):
    """GPTQ after its equations, in float64: of the columns that are left, H^-1 is computed anew each time."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    w, h = weight.astype(np.float64).copy(), hessian.astype(np.float64)
    h = h + damping * np.mean(np.diag(h)) * np.eye(len(h))
    levels, scales = np.zeros(w.shape, int), np.zeros((len(w), w.shape[1] // group))
    left = list(order)
    while left:
        j, columns = left[0], np.arange(w.shape[1])
        if (w.shape[1] - len(left)) % group == 0:
            members = columns[columns // group == j // group]
            largest = np.abs(w[:, members]).max(1)
            scales[:, j // group] = (largest / high).astype(np.float32).astype(np.float16)
        scale = scales[:, j // group]
        levels[:, j] = np.clip(np.round(w[:, j] / scale), low, high)
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        error = (w[:, j] - levels[:, j] * scale) / inverse[0, 0]
        w[:, left] -= np.outer(error, inverse[0])
        left = left[1:]
    return levels, scales


@pytest.mark.parametrize(
    "bits, group, act_order", [(3, 64, True), (4, 64, False), (2, 192, True), (6, 128, True)]
)
def test_gptq_equals_an_independent_transcription(bits, group, act_order):
    n = 384 if group == 192 else 256
    weight, gram = random(32, n), gram_of(correlated(1000, n))
    hessian = 2 / gram.n_tokens * gram.total
    order = np.arange(n)
    if act_order:  # whole groups by what they hold in all, columns within them by what they hold
        diagonal = hessian.diagonal().numpy()
        groups = sorted(range(n // group), key=lambda g: -diagonal[g * group : (g + 1) * group].sum())
        order = np.concatenate([
            g * group + np.argsort(-diagonal[g * group : (g + 1) * group], kind="stable") for g in groups
        ])  # fmt: skip
    levels, scales = transcription(weight.numpy(), hessian.numpy(), bits, group, 0.01, order)
    packed = GPTQ(bits=bits, group=group, act_order=act_order).layer(weight, gram)
    assert (packed.levels().numpy() != levels).mean() < 1e-3, "but for ties that float32 tells otherwise"
    assert np.allclose(packed.scale.view(32, -1).numpy(), scales, rtol=2e-3)
    assert not equal(packed, RTN(bits=bits, group=group).layer(weight, None))


@pytest.mark.parametrize("granularity", ["group", "row"])
@pytest.mark.parametrize("bits", BITS)
def test_gptq_costs_the_output_less_than_rounding_to_nearest(bits, granularity):
    weight, gram = random(64, 512), gram_of(correlated(2000, 512))
    options = {"bits": bits, "granularity": granularity}
    nearest = output_error(weight, RTN(**options).layer(weight, None), gram)
    first = output_error(weight, GPTQ(**options, act_order=False).layer(weight, gram), gram)
    ordered = output_error(weight, GPTQ(**options).layer(weight, gram), gram)
    assert max(first, ordered) < 0.7 * nearest
    assert len(RTN(**options).layer(weight, None).scale) == 64 * (4 if granularity == "group" else 1)


def test_inputs_that_are_always_zero_have_no_weight_and_do_no_harm():
    weight, x = random(32, 256), correlated(1000, 256)
    x[:, 128:200] = 0
    packed = GPTQ().layer(weight, gram_of(x))
    assert not packed.levels()[:, 128:200].any()
    nearest = output_error(weight, RTN().layer(weight, None), gram_of(x))
    assert output_error(weight, packed, gram_of(x)) < nearest
    assert not GPTQ().layer(weight, Gram(torch.zeros(256, 256), n_tokens=256)).levels().any()


def test_a_hessian_is_damped_until_it_has_an_inverse():
    lacking = torch.diag(torch.tensor([4.0, 4.0, 4.0, -0.2]))  # as rounding may leave it
    mean = lacking.diagonal().mean()
    with_less = lacking + 0.08 * mean * torch.eye(4)
    assert torch.linalg.cholesky_ex(lacking + 0.04 * mean * torch.eye(4)).info
    u = inverse_factor(lacking, 0.01)
    assert torch.allclose(u.t() @ u @ with_less, torch.eye(4), atol=1e-5)
    for wrong in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="its Hessian stays singular"):
            inverse_factor(torch.full((4, 4), wrong), 0.01)


def test_a_layer_that_few_tokens_came_to_is_rounded_to_nearest():
    weight, gram = random(32, 256), gram_of(correlated(255, 256))
    assert equal(GPTQ().layer(weight, gram), RTN().layer(weight, None))
    assert equal(GPTQ().layer(weight, None), RTN().layer(weight, None))


def best_of_gaussian(planes):
    """The least mean squared error of planes on a normal distribution, by search over their scales."""
    x = np.linspace(-6, 6, 4001)
    density = np.exp(-x * x / 2)
    density /= density.sum()

    def cost(scales):
        levels = np.array([0.0])
        for scale in scales:
            levels = np.add.outer(levels, scale * np.array([-1, 0, 1])).ravel()
        return (density * np.abs(x[:, None] - levels).min(1) ** 2).sum()

    coarse = np.arange(0.2, 2.2, 0.05)
    tried = [(a,) for a in coarse] if planes == 1 else [(a, b) for a in coarse for b in coarse if b < a]
    return min(map(cost, tried))


def test_planes_part_and_the_error_falls_round_by_round():
    """Toward what the best scales of one and of two planes cost on normally distributed weights."""
    w = random(64, 4096)
    reached = {}
    for planes in (1, 2, 3):
        costs = []
        for rounds in range(1, 31):
            scale, trits = fit(w, planes, rounds)
            costs.append(squared_error(w, scale, trits.float()) / w.square().sum(1))
        assert all(
            (after <= before * (1 + 1e-3)).all() for before, after in zip(costs, costs[1:], strict=False)
        )
        assert (scale.diff(dim=0) <= 0).all() and scale.min() > 0.2
        reached[planes] = costs[-1].mean().item()
    one, two = best_of_gaussian(1), best_of_gaussian(2)
    assert one == pytest.approx(0.190, abs=1e-3) and two == pytest.approx(0.030, abs=1e-3)
    assert reached[1] == pytest.approx(one, rel=0.02)
    assert reached[2] == pytest.approx(two, rel=0.05)
    assert reached[3] < 0.2 * two


def test_scales_are_those_of_least_squares_and_trits_the_nearest():
    w = random(200, 128)
    scale, trits = fit(w, 2)
    error = squared_error(w, scale, trits.float())
    for i in range(0, 200, 17):
        s = trits[:, i].double().t()
        solved = torch.linalg.lstsq(s, w[i].double()).solution
        least = (w[i] - s @ solved).square().sum().item()
        assert error[i].item() == pytest.approx(least, rel=1e-3), "what is left after projection"
        sums = torch.tensor([scale[0, i] * a + scale[1, i] * b for a in (-1, 0, 1) for b in (-1, 0, 1)])
        nearest = (w[i, :, None] - sums).abs().min(1).values.square().sum().item()
        assert error[i].item() == pytest.approx(nearest, rel=1e-4)


def test_odd_groups_are_fitted_too():
    w = torch.zeros(4, 128)
    w[1] = 0.5
    w[2, ::2] = -1.0
    w[3, 0] = 3.0
    for planes in (1, 2, 3):
        scale, trits = fit(w, planes)
        assert scale.isfinite().all() and (scale > 0).all()
        assert squared_error(w, scale, trits.float()).max() < 1e-3
    for highest in (4, 13):
        scale, levels = fit_tied(w, highest)
        assert squared_error(w, scale, levels.float()).max() < 1e-3 and levels.abs().max() <= highest


@pytest.mark.parametrize("planes, tied, grid", [
    (1, False, "ternary"), (1, True, "ternary"), (2, False, "ternary"), (3, False, "ternary"),
    (2, True, "int4"), (3, True, "int6"),
])  # fmt: skip
def test_planes_are_a_tensor_like_any_other(planes, tied, grid):
    weight = random(32, 256)
    by = PTQTP(planes=planes, tied=tied)
    packed = by.layer(weight, None)
    assert packed.grid == GRIDS[grid] == by.method.stored and packed.scale_every == 128
    assert packed.planes == by.summed_planes == (1 if tied else planes) and packed.shape == (32, 256)
    levels, scale = packed.levels().float(), packed.scale
    assert torch.equal(scale, scale.half().float())
    expected = levels.view(packed.planes, 64, 128) * scale.view(packed.planes, 64, 1)
    assert torch.equal(packed.dequantize(torch.float32), expected.sum(0).view(32, 256))
    assert torch.equal(packed.dequantize(torch.bfloat16), expected.sum(0).view(32, 256).bfloat16())
    error = (weight - packed.dequantize(torch.float32)).square().mean() / weight.square().mean()
    assert error < {1: 0.2, 2: 0.035, 3: 0.01}[planes]
    if packed.planes > 1:
        with pytest.raises(ValueError, match="no shards"):
            packed.as_shard()


@pytest.fixture(scope="module")
def dense(few_steps):
    """A dense model of ours that has learned something."""
    summary = few_steps(
        method={"name": "dense"},
        train={"steps": 150, "batch_tokens": 1024, "micro_batch": 8, "save_every": 150},
        optimizer={"name": "adamw", "lr": 5e-3},
    )
    return lowbit_dist.open(summary["checkpoint"])


@pytest.fixture
def hf_folder(tmp_path, corpus):
    """`hf_folder("qwen2")`: a Hugging Face folder with random weights, and the corpus's tokenizer."""

    def written(name, **changed):
        folder = hf_folders.write(tmp_path / name, name, **changed)
        shutil.copytree(corpus.parent / "tokenizer", folder, dirs_exist_ok=True)
        return folder

    return written


def calibration(corpus, samples=64, **options):
    return Calibration(path=str(corpus), samples=samples, **options)


def test_calibrated_weights_are_worth_more_than_rounded_ones(dense, corpus, tmp_path):
    def loss(name, by):
        given = calibration(corpus) if by.needs_calibration else None
        done = quantize(dense, by, tmp_path / name, calibration=given)
        assert done["bits_per_weight"] == pytest.approx(
            by.method.stored.bits * by.summed_planes + 16 / 128 * by.summed_planes
        )
        return lowbit_dist.open(tmp_path / name).evaluate(str(corpus), n_samples=20)["loss"]

    plain = dense.evaluate(str(corpus), n_samples=20)["loss"]
    losses = {
        f"{kind.__name__}{bits}": loss(f"{kind.__name__}{bits}", kind(bits=bits))
        for kind in (RTN, GPTQ)
        for bits in (3, 4)
    }
    losses |= {f"planes{k}": loss(f"planes{k}", PTQTP(planes=k)) for k in (1, 2)}
    print(plain, losses)
    assert losses["RTN3"] > losses["GPTQ3"] > plain
    assert losses["RTN4"] >= losses["GPTQ4"]
    assert losses["planes1"] > losses["planes2"] > plain - 0.01
