"""Post-training quantisation: the methods against what they are derived from, and models that it gives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise, product
from types import SimpleNamespace

import hf_folders
import numpy as np
import pytest
import torch
from cases import slow
from test_trained import logits

import lowbit_dist
from lowbit_dist.checkpoint import Checkpoint
from lowbit_dist.config import ConfigError
from lowbit_dist.convert import PackedLinear
from lowbit_dist.grid import GRIDS
from lowbit_dist.methods import Dense
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
    w = random(32, 2048)
    reached = {}
    for planes in (1, 2, 3):
        costs = []
        for rounds in (1, 2, 3, 4, 6, 9, 14, 20, 30):
            scale, trits = fit(w, planes, rounds)
            costs.append(squared_error(w, scale, trits.float()) / w.square().sum(1))
        assert all((after <= before * (1 + 1e-3)).all() for before, after in pairwise(costs))
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
    return lowbit_dist.open(few_steps(method={"name": "dense"})["checkpoint"])


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


@pytest.mark.slow
def test_calibrated_weights_are_worth_more_than_rounded_ones(few_steps, corpus, tmp_path):
    summary = few_steps(  # until weights are no longer noise
        model={"hidden_size": 128, "intermediate_size": 256},
        method={"name": "dense"},
        train={"steps": 250, "batch_tokens": 1024, "micro_batch": 16, "save_every": 250},
        optimizer={"name": "adamw", "lr": 3e-3},
    )
    dense = lowbit_dist.open(summary["checkpoint"])

    def perplexity(by):
        out = tmp_path / "-".join(map(str, by.model_dump().values()))
        done = quantize(dense, by, out, calibration=calibration(corpus) if by.needs_calibration else None)
        stored = by.method.stored.bits + 16 / 128  # a scale for each group
        assert done["bits_per_weight"] == pytest.approx(by.summed_planes * stored)
        return lowbit_dist.open(out).evaluate(str(corpus), n_samples=64)["perplexity"]

    plain = dense.evaluate(str(corpus), n_samples=64)["perplexity"]
    rtn3, rtn4, gptq3, gptq4 = (perplexity(kind(bits=bits)) for kind in (RTN, GPTQ) for bits in (3, 4))
    assert rtn3 > gptq3 > plain and rtn4 >= gptq4
    one, two = (perplexity(PTQTP(planes=planes)) for planes in (1, 2))
    assert one > two


@pytest.mark.parametrize(
    "by", [GPTQ(bits=3), PTQTP(), *slow((RTN(bits=6),), (PTQTP(planes=3, tied=True),))], ids=repr
)
def test_a_result_is_a_trained_model_like_any_other(by, dense, corpus, lowbit, tmp_path):
    out = tmp_path / "out"
    quantize(dense, by, out, calibration=calibration(corpus) if by.needs_calibration else None)
    trained, checkpoint = lowbit_dist.open(out), Checkpoint.open(out)
    assert checkpoint.verify() == [] and trained.method.stored == by.method.stored
    assert trained.tokenizer.sha256 == dense.tokenizer.sha256
    for name in dense.names:
        tensor = trained.tensor(name)
        assert isinstance(tensor, PackedTensor) == ("proj" in name), name
        if not isinstance(tensor, PackedTensor):
            assert torch.equal(tensor, dense.tensor(name)), name
    up = trained.tensor("model.layers.0.mlp.up_proj.weight")
    if not by.needs_calibration:
        expected = by.layer(dense.tensor("model.layers.0.mlp.up_proj.weight"), None)
        assert equal(up, expected) and up.planes == expected.planes
    through = trained.network(forward=by.method.stored).get_parameter("model.layers.0.mlp.up_proj.weight")
    if up.planes == 1:
        assert torch.equal(through, up.dequantize(through.dtype)), "it is on its own grid"
    else:
        expected = by.method.through(up.dequantize(torch.float32), by.method.stored)
        assert torch.equal(through, expected.dequantize(through.dtype)), "a sum of planes is on no grid"
        said = [
            trained.evaluate(str(corpus), n_samples=2, forward=grid)["forward"] for grid in (None, "ternary")
        ]
        assert said == [f"ternary, {up.planes} planes", "ternary"]
    packed = trained.network(packed=True)
    assert sum(isinstance(layer, PackedLinear) for layer in packed.modules()) == 14
    assert torch.equal(logits(packed, trained), logits(trained.network(), trained))
    restored = trained.network(packed=True)
    restored.load_state_dict(packed.state_dict())
    assert len(trained.generate("def ", max_new_tokens=3, temperature=0)["text"]) > 0
    done = lowbit("inspect", out, "--verify", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == checkpoint.digest()
    moved = out.rename(tmp_path / "elsewhere")
    assert lowbit_dist.open(moved).evaluate(str(corpus), n_samples=2)["samples"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"], "nothing is left beside it"


FAMILIES = ["gemma2", "bloom", "mixtral"]
MORE_FAMILIES = ["llama", "tied", "qwen3", "gemma3", "phi", "gpt_neox", "opt"]


@pytest.mark.parametrize("name", [*FAMILIES, *slow(*zip(MORE_FAMILIES))])
@torch.inference_mode()
def test_a_walk_ends_where_the_models_own_forward_pass_ends(name, hf_folder):
    source = lowbit_dist.open(hf_folder(name))
    tokens = torch.randint(0, 512, (6, 32), generator=torch.Generator().manual_seed(0))
    network = source.network()
    inputs = {}
    for layer_name, layer in network.named_modules():
        if layer_name.endswith(("q_proj", "query_key_value")):
            layer.register_forward_pre_hook(
                lambda _, x, layer_name=layer_name: inputs.update({layer_name: x[0]})
            )
    last, ended = [], blocks(network, network.linear_weights)[-1]
    network.get_submodule(ended).register_forward_hook(lambda _, x, out: last.append(out))
    network.base_model(input_ids=tokens)
    built = of_hf_config(source.hf_config, Dense(), torch.float32)
    parts = blocks(built, built.linear_weights)
    walk = Walk(source, built, parts, tokens.split(2))
    for block in parts:
        linears = [name for name in built.linear_weights if name.startswith(f"{block}.")]
        grams = walk.grams(block, linears)
        for linear, gram in grams.items():
            if (x := inputs.get(linear.removesuffix(".weight"))) is not None:
                x = x.reshape(-1, x.shape[-1])
                assert gram.n_tokens == 192
                assert torch.allclose(gram.total, x.t() @ x, rtol=1e-4, atol=1e-3 * gram.total.abs().max())
        walk.advance(block, {})
        assert all(p.device.type == "meta" for p in built.get_submodule(block).parameters())
    out = last[0] if isinstance(last[0], torch.Tensor) else last[0][0]
    assert torch.allclose(torch.cat(walk._hidden), out, rtol=1e-4, atol=1e-4 * out.abs().max())


def test_layers_that_are_given_the_same_share_a_gram(hf_folder):
    source = lowbit_dist.open(hf_folder("llama"))
    built = of_hf_config(source.hf_config, Dense(), torch.float32)
    parts = blocks(built, built.linear_weights)
    walk = Walk(source, built, parts, [torch.zeros(2, 8, dtype=torch.int64)])
    grams = walk.grams(parts[0], [name for name in built.linear_weights if ".0." in name])
    assert len(grams) == 7 and len({id(gram) for gram in grams.values()}) == 4
    assert {gram.n_tokens for gram in grams.values()} == {16}


@pytest.mark.parametrize("name", ["qwen2", *slow(("tied",), ("mixtral",))])
def test_a_hugging_face_folder_takes_the_same_path(name, hf_folder, corpus, lowbit, tmp_path):
    folder, out = hf_folder(name), tmp_path / "out"
    arguments = "quantize", folder, "--method", "gptq", "--bits", 4, "--data", corpus, "--samples", 32
    done = lowbit(*arguments, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["grid"] == "int4" and 0 < answer["relative_error"] < 0.5
    assert answer["weights"] < answer["parameters"] and answer["bits_per_weight"] == 4.125
    source, trained = lowbit_dist.open(folder), lowbit_dist.open(out)
    shutil.rmtree(folder)  # which is no longer needed
    assert trained.names == source.names
    low_bit = [name for name in trained.names if isinstance(trained.tensor(name), PackedTensor)]
    assert len(low_bit) == answer["layers"] and not any(
        "embed" in name or "gate.weight" in name for name in low_bit
    )
    assert trained.evaluate(str(corpus), n_samples=2)["forward"] == "int4"
    assert lowbit("quantize", out, "--method", "rtn", "--out", tmp_path / "twice").returncode == 2


def test_an_expert_that_few_tokens_came_to_is_rounded_and_named(hf_folder, corpus, tmp_path, caplog):
    source = lowbit_dist.open(hf_folder("mixtral"))
    quantize(source, GPTQ(), tmp_path / "out", calibration=calibration(corpus, samples=8))
    warned = {record.args[0] for record in caplog.records if "rounded to nearest" in record.message}
    assert warned and all(".experts." in name for name in warned)
    trained = lowbit_dist.open(tmp_path / "out")
    name = min(warned)
    assert equal(trained.tensor(name), RTN().layer(source.tensor(name), None))


def test_a_run_starts_from_a_result(dense, corpus, few_steps, tmp_path):
    out = tmp_path / "out"
    quantize(dense, GPTQ(bits=4), out, calibration=calibration(corpus))
    method = {
        "name": "dqt", "grid": "int4", "scale": "absmax", "granularity": "group", "activation_bits": None
    }  # fmt: skip
    summary = few_steps(method=method, run={"name": "begun", "from": str(out)}, optimizer={"lr": 1e-4})
    quantised = lowbit_dist.open(out)
    begun = lowbit_dist.open(summary["checkpoint"])
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(begun.tensor(name).scale, quantised.tensor(name).scale)
    differing = begun.tensor(name).levels() != quantised.tensor(name).levels()
    assert 0 < differing.float().mean() < 0.1


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "by, after",
    [
        (GPTQ(bits=3), 9),
        *slow(*product((GPTQ(bits=3),), (1, 14)), *product((PTQTP(),), (1, 9, 14))),
    ],
)
def test_killed_and_taken_up_the_result_is_the_same_to_the_byte(
    by, after, dense, corpus, tmp_path, monkeypatch
):
    """After the first, the ninth and the last layer of two blocks of seven."""
    given = calibration(corpus, samples=16) if by.needs_calibration else None
    quantize(dense, by, tmp_path / "straight", calibration=given)
    kind, layers = type(by), []
    layer = kind.layer

    def dying(self, *arguments):
        if len(layers) == after:
            raise Killed
        layers.append(1)
        return layer(self, *arguments)

    out, draft = tmp_path / "out", tmp_path / ".out.partial"
    with monkeypatch.context() as patch:
        patch.setattr(kind, "layer", dying)
        if after == 14:  # while the checkpoint is put together
            patch.setattr("lowbit_dist.quantize.folder.sums_text", lambda sums: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            quantize(dense, by, out, calibration=given)
    assert not out.exists() and draft.is_dir(), "no half result, and what was done"
    finished = sorted(path.name for path in draft.glob("shard-*"))
    assert len(finished) == 1 + after // 7
    before = {name: (draft / name).stat().st_mtime_ns for name in finished}
    quantize(dense, by, out, calibration=given)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == before, "none was made again"
    straight, resumed = content(tmp_path / "straight"), content(out)
    assert straight == resumed and not draft.exists()


@pytest.mark.integration
@pytest.mark.slow
def test_layers_spread_over_rays_workers_give_the_same_bytes(dense, corpus, tmp_path):
    given = calibration(corpus, samples=16)
    quantize(dense, GPTQ(bits=3), tmp_path / "alone", calibration=given)
    quantize(dense, GPTQ(bits=3), tmp_path / "spread", calibration=given, workers=2)
    assert content(tmp_path / "alone") == content(tmp_path / "spread")


@pytest.mark.integration
@pytest.mark.slow
def test_a_mistake_that_a_worker_meets_is_told_as_one_that_is_met_here(hf_folder, corpus, tmp_path):
    source, out = lowbit_dist.open(broken(hf_folder("llama"))), tmp_path / "out"
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.down_proj\.weight of .* stays singular"):
        quantize(source, GPTQ(), out, calibration=calibration(corpus), workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


@pytest.mark.slow
def test_memory_is_that_of_a_block_and_not_of_the_model(hf_folder, corpus, tmp_path):
    peaks = []
    for n_layers in (2, 8):  # of 13.6 MB
        folder = hf_folder("llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=n_layers)
        command = [sys.executable, "-m", "lowbit_dist", "quantize", folder, "--method", "gptq"]
        command += ["--data", corpus, "--samples", "32", "--out", tmp_path / "out", "--force", "--json"]
        # Its C library would keep what is freed, in pieces, for later.
        returns_at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
        done = subprocess.run(command, check=True, capture_output=True, env=returns_at_once)
        peaks.append(json.loads(done.stdout)["peak_bytes"])
    assert peaks[1] - peaks[0] < 30e6, "6 more blocks have 82 MB"


def test_what_was_begun_otherwise_is_not_taken_up(dense, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("lowbit_dist.quantize.folder.finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            quantize(dense, RTN(bits=8), out)
    done = quantize(dense, RTN(bits=3), out)
    assert done["grid"] == "int3" and "is removed" in caplog.text
    quantize(dense, RTN(bits=3), tmp_path / "alone")
    assert content(out) == content(tmp_path / "alone")


@pytest.mark.slow
def test_a_killed_process_leaves_no_half_file(hf_folder, tmp_path):
    folder, out = hf_folder("llama", num_hidden_layers=6, intermediate_size=256), tmp_path / "out"
    command = [sys.executable, "-m", "lowbit_dist", "quantize", folder, "--method", "ptqtp"]
    process = subprocess.Popen([*command, "--out", out], stderr=subprocess.PIPE, text=True)
    draft = tmp_path / ".out.partial"
    while process.poll() is None and not (draft / "shard-00002.safetensors").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and 3 <= len(list(draft.glob("shard-*"))) < 7, "it was killed in the middle"
    source, by = lowbit_dist.open(folder), PTQTP()
    first = (draft / "shard-00001.safetensors").stat().st_mtime_ns
    quantize(source, by, out)
    assert Checkpoint.open(out).verify() == [] and not draft.exists()
    assert (out / "shard-00001.safetensors").stat().st_mtime_ns == first, "it was taken up"
    quantize(source, by, tmp_path / "straight")
    assert content(out) == content(tmp_path / "straight")


def test_only_a_result_is_replaced_and_only_if_that_is_meant(hf_folder, lowbit, tmp_path):
    folder, out = hf_folder("llama"), tmp_path / "out"
    command = "quantize", folder, "--method", "rtn", "--out"
    assert lowbit(*command, out).returncode == 0
    again = lowbit(*command, out)
    assert again.returncode == 2 and "--force" in again.stderr and again.stderr.count("\n") == 1
    done = lowbit(*command, out, "--force", "--bits", 8, "--json")
    assert done.returncode == 0 and lowbit_dist.open(out).method.grid == "int8", done.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    for other in (tmp_path / "mine", folder, folder / "inside", tmp_path, tmp_path / "mine" / "letter"):
        refused = lowbit(*command, other, "--force")
        assert refused.returncode == 2 and "--out" in refused.stderr, (other, refused.stderr)
    assert (tmp_path / "mine" / "letter").read_text() == "dear"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "mine", "out"]


WRONG = {
    "no such method": (
        ["--method", "gptk"],
        "--method (gptk) must be one of rtn, gptq, ptqtp; did you mean 'gptq'?",
    ),
    "bits that no grid has": (["--method", "rtn", "--bits", "5"], "--bits (5) must be one of 2, 3, 4, 6, 8"),
    "an option of another method": (
        ["--method", "gptq", "--planes", "2", "--data", "DATA"],
        "--planes (2) is an option of ptqtp, not of gptq",
    ),
    "planes": (["--method", "ptqtp", "--planes", "4"], "--planes (4) must be one of 1, 2, 3"),
    "damping": (
        ["--method", "gptq", "--damping", "0", "--data", "DATA"],
        "--damping (0.0) must be more than 0",
    ),
    "a group that is no plane": (
        ["--method", "rtn", "--group", "100"],
        "--group (100) must be a multiple of 64",
    ),
    "a group that does not divide": (
        ["--method", "rtn", "--group", "192"],
        "cannot be packed: a group of 192 does not divide a row of 256",
        "write --group 64",
    ),
    "no workers": (["--method", "rtn", "--workers", "0"], "--workers (0) must be at least 1"),
    "no data": (["--method", "gptq"], "write --data, a folder made by `lowbit data prepare`"),
    "data that is not looked at": (["--method", "rtn", "--data", "DATA"], "looks at weights alone"),
    "samples of nothing": (["--method", "gptq", "--samples", "3"], "--samples and --seed are of --data"),
    "data that is none": (["--method", "gptq", "--data", "."], "--data (.) has no manifest.json"),
    "more samples than there are": (
        ["--method", "gptq", "--data", "DATA", "--samples", "9999999"],
        "--samples (9,999,999) must be from 1 to",
    ),
    "a seed below zero": (
        ["--method", "gptq", "--data", "DATA", "--seed", "-1"],
        "--seed (-1) must be at least 0",
    ),
    "too few tokens": (
        ["--method", "gptq", "--data", "DATA", "--samples", "7"],
        "448 calibration tokens, fewer than the 512 inputs of the model's widest layer",
    ),
    "another tokenizer": (["--method", "gptq", "--data", "DATA"], "was prepared with another tokenizer"),
    "no linear layers": (["--method", "rtn"], "has no linear layers to quantise: those of GPT2LMHeadModel"),
    "inputs that are no numbers": (
        ["--method", "gptq", "--data", "DATA", "--samples", "8"],
        "model.layers.1.mlp.down_proj.weight of",
        "stays singular",
    ),
    "a run that diverged": (
        ["--method", "rtn"],
        "model.layers.1.input_layernorm.weight of",
        "has numbers that are not finite",
    ),
    "a folder of nobody's": (["--method", "rtn"], "neither a run"),
    "a full disk": (["--method", "rtn"], "--out (OUT) needs", "free space there"),
}


def broken(folder, times=1e38):
    """A layer of its last block is given what is no number."""
    norm = "model.layers.1.input_layernorm.weight"
    hf_folders.rewrite(folder, lambda weights: weights.update({norm: weights[norm] * times}))
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line_and_leaves_nothing(case, hf_folder, corpus, lowbit, tmp_path, monkeypatch):
    folder = hf_folder("gpt2" if case == "no linear layers" else "llama")
    if case == "another tokenizer":
        (folder / "tokenizer.model").unlink()
    if case == "inputs that are no numbers":
        broken(folder)
    if case == "a run that diverged":
        broken(folder, times=torch.inf)
    if case == "a folder of nobody's":
        (folder / "config.json").unlink()
    if case == "a full disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**5))
    arguments, *words = WRONG[case]
    out = tmp_path / "out"
    arguments = [str(corpus) if word == "DATA" else word for word in arguments]
    done = lowbit("quantize", folder, *arguments, "--out", out)
    said = [line for line in done.stderr.splitlines() if not line.startswith("lowbit: quantising")]
    assert done.returncode == 2 and len(said) == 1, done.stderr
    for part in words:
        assert part.replace("OUT", str(out)) in said[0]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_checkpoint_that_fails_its_hashes_is_refused(dense, lowbit, tmp_path):
    folder = shutil.copytree(dense.path, tmp_path / "copy")
    (shard,) = folder.glob("shard-*")
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    done = lowbit("quantize", folder, "--method", "rtn", "--out", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert shard.name in done.stderr and [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_low_bit_weights_are_refused(few_steps, tmp_path):
    source = lowbit_dist.open(few_steps(method={"name": "dqt"})["checkpoint"])
    with pytest.raises(ConfigError, match="has low-bit weights already"):
        quantize(source, RTN(), tmp_path / "out")


def test_micro_batches_are_of_one_size():
    assert [tuple(batch.shape) for batch in micro_batches(torch.zeros(9, 512))] == [(3, 512)] * 3
    assert [tuple(batch.shape) for batch in micro_batches(torch.zeros(3, 4096))] == [(1, 4096)] * 3
    assert [tuple(batch.shape) for batch in micro_batches(torch.zeros(7, 1024))] == [(1, 1024)] * 7
