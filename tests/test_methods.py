"""Methods against transcriptions of their papers in float64 that share no code with the package."""

import math

import pytest
import torch
from torch import nn

from lowbit_dist.linear import IntPerToken, Linear, linear
from lowbit_dist.methods import DQT, BitNet, Dense
from lowbit_dist.methods.method import RMS_RANGE
from lowbit_dist.packed import PackedTensor

GRIDS = {
    "ternary": (-1, 1),
    "int2": (-2, 1),
    "int3": (-4, 3),
    "int4": (-8, 7),
    "int6": (-32, 31),
    "int8": (-128, 127),
}


def case(n=5, out=7, inputs=256, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, inputs, generator=g)
    weight = torch.randn(out, inputs, generator=g) * 0.02
    return x, weight, torch.randn(n, out, generator=g)


def rounded_tokens(x, bits=8):
    """Python floats, one token at a time (arXiv 2402.17764; round half to even, as torch.round)."""
    top = 2 ** (bits - 1) - 1
    rows = []
    for row in x.double().tolist():
        a = top / max(max(abs(v) for v in row), 1e-5)
        rows.append([min(max(round(v * a), -top - 1), top) / a for v in row])
    return torch.tensor(rows, dtype=torch.float64)


def layer_of(method, weight, **kwargs):
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    plain.weight = nn.Parameter(weight.clone())
    return method.linear(plain, **{"name": "q_proj", "is_head": False, "norm_eps": 1e-5} | kwargs)


def test_bitnet_forward_and_gradients_agree_with_a_float64_transcription():
    x, weight, dy = case()
    layer, x = layer_of(BitNet(), weight), x.requires_grad_()
    y = layer(x)
    y.backward(dy)

    w = weight.double()
    gamma = max(w.abs().mean().item(), 1e-5)
    forward_weight = gamma * torch.tensor(
        [[min(max(round(v / gamma), -1), 1) for v in row] for row in w.tolist()]
    )
    xq = rounded_tokens(x.detach())
    torch.testing.assert_close(y.double(), xq @ forward_weight.double().t(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), dy.double() @ forward_weight.double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(layer.weight.grad.double(), dy.double().t() @ xq, rtol=1e-5, atol=1e-5)
    assert set(torch.unique(forward_weight / gamma).round().tolist()) == {-1.0, 0.0, 1.0}


def test_bitnet_normalises_the_inputs_that_llama_does_not():
    x, weight, _ = case()
    plain, inner = layer_of(BitNet(), weight), layer_of(BitNet(), weight, name="mlp.down_proj")
    assert plain.norm is None
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(inner(x), plain(normed))
    assert layer_of(BitNet(sub_norms=False), weight, name="mlp.down_proj").norm is None


def test_the_head_is_an_ordinary_layer_under_every_method():
    x, weight, _ = case()
    for method in (DQT, BitNet, Dense):
        assert torch.equal(layer_of(method(), weight, is_head=True)(x), x @ weight.t())


def test_a_linear_with_bias_has_the_gradients_of_torch():
    x, weight, dy = case()
    bias = torch.randn(7)
    ours = [t.clone().requires_grad_() for t in (x, weight, bias)]
    theirs = [t.clone().requires_grad_() for t in (x, weight, bias)]
    linear(*ours).backward(dy)
    nn.functional.linear(*theirs).backward(dy)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("bits", [8, 4])
def test_activations_are_rounded_per_token_straight_through(bits):
    x, weight, dy = case()
    x.requires_grad_()
    y = linear(IntPerToken(bits)(x), weight)
    torch.testing.assert_close(
        y.double(), rounded_tokens(x.detach(), bits) @ weight.double().t(), rtol=1e-5, atol=1e-6
    )
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ weight)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("granularity", "size", "inputs"),
    [({"granularity": "tensor"}, 6 * 512, 512), ({"granularity": "row"}, 512, 512),
     ({"granularity": "group"}, 128, 512),
     ({"granularity": "group", "group": 64}, 64, 512), ({"granularity": "group", "group": 256}, 256, 512),
     ({"granularity": "tensor"}, 8 * 576, 576), ({"granularity": "row"}, 576, 576),
     ({"granularity": "row"}, 896, 896),
     ({"granularity": "group"}, 128, 896), ({"granularity": "group", "group": 448}, 448, 896)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("scale", ["absmean", "absmax", "rms"])
def test_initial_codes_and_scales_follow_the_formulas(grid, granularity, size, inputs, scale):
    low, high = GRIDS[grid]
    every = size
    _, weight, _ = case(out=6 if inputs == 512 else 8, inputs=inputs)
    packed = DQT(grid=grid, scale=scale, **granularity).quantize(weight)
    assert packed.scale_every == every
    rows = weight.double().reshape(-1, every)
    if scale == "absmean":
        size = rows.abs().mean(1) / high
    elif scale == "absmax":
        size = rows.abs().amax(1) / high
    else:
        size = (rows**2).mean(1).sqrt() * 2 * RMS_RANGE[grid] / (high - low)
    size = size.half().double()
    assert torch.equal(packed.scale.double(), size)
    levels = (rows / size.view(-1, 1)).round().clamp(low, high).view(weight.shape)
    near_tie = ((rows / size.view(-1, 1)).frac().abs() - 0.5).abs().view(weight.shape) < 1e-5
    assert torch.equal(packed.levels().double()[~near_tie], levels[~near_tie])
    decoded = packed.levels().view(-1, every) * packed.scale.view(-1, 1)
    assert torch.equal(packed.dequantize(torch.float32), decoded.view(weight.shape))


def test_scales_survive_float16_and_no_tensor_is_without_one():
    zeros = DQT().quantize(torch.zeros(2, 256))
    assert zeros.scale.item() > 0
    assert torch.equal(zeros.scale.half().float(), zeros.scale)
    assert math.isfinite(DQT(grid="int8").quantize(torch.full((2, 256), 1e6)).scale.item())


def test_a_packed_tensor_needs_whole_blocks():
    with pytest.raises(ValueError, match=r"multiple of 256 elements, not 300 \(3, 100\)"):
        PackedTensor.quantize(torch.zeros(3, 100), torch.ones(1), DQT().stored)


@pytest.mark.parametrize(
    ("shape", "every"), [((256, 256), 512), ((4, 576), 128), ((4, 576), 32), ((2, 256), 100)]
)
def test_a_scale_serves_the_tensor_or_divides_a_row(shape, every):
    from lowbit_dist.packed import check_shape

    check_shape(shape, math.prod(shape)) if math.prod(shape) % 256 == 0 else None
    with pytest.raises(ValueError, match=r"divides a row|multiple of 256"):
        check_shape(shape, every)


def test_a_group_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a group of 512 does not divide a row of 256"):
        DQT(granularity="group", group=512).quantize(torch.zeros(4, 256))


def test_which_tensors_are_low_bit():
    assert DQT().is_low_bit(True)
    assert not DQT().is_low_bit(False)
    assert DQT(tensors="all").is_low_bit(False)
    assert isinstance(layer_of(DQT(), case()[1]), Linear)


def test_the_readmes_method_in_one_file_runs_as_it_stands(small):
    """Its code, the value of its entry point, one layer's forward and backward pass, its levels."""
    import re
    from importlib.metadata import EntryPoint
    from pathlib import Path

    import lowbit_dist

    text = (Path(lowbit_dist.__file__).parent / "methods" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, flags=re.S)[1]
    scope = {"__name__": "readme"}
    exec(code, scope)
    method = scope["SignWeights"]()
    value = re.search(r'sign-weights = "(.*?)"', text)[1]
    assert EntryPoint("sign-weights", value, "lowbit_dist.methods").attr == type(method).__name__

    x, weight, dy = case()
    layer, x = layer_of(method, weight), x.requires_grad_()
    layer(x).backward(dy)
    signs = torch.where(weight < 0, -1.0, 1.0).double() * weight.double().abs().mean()
    torch.testing.assert_close(x.grad.double(), dy.double() @ signs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        layer.weight.grad.double(), dy.double().t() @ rounded_tokens(x.detach()), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(method.levels(weight).double(), signs.sign())
    assert method.stored is None and method.forward_grid.n_levels == 3
    answers = [
        line.split("`")[1].partition("(")[0]
        for line in text.split("| default |")[1].splitlines()
        if "`" in line
    ]
    for answer in answers[: answers.index("finished") + 1]:
        assert hasattr(lowbit_dist.methods.Method, answer), answer


def test_a_rule_that_changes_anothers_update_is_computed_itself():
    """Not by the fused kernel of the rule that it derives from."""
    from lowbit_dist import ops
    from lowbit_dist.optim import AdamW

    class Still(AdamW):
        def update(self, g, *slots, step):
            return torch.zeros_like(g), *slots

    assert Still.fused is None and AdamW.fused == "adamw"
    rule, weight = Still(weight_decay=0.0), torch.ones(300)
    state = [ops.Stored.zeros(slot, 300, "fp32") for slot in rule.slots]
    now = ops.Now(lr=0.1, weight_decay=0.0, step=1, seed=0)
    ops.step_(ops.Weights(weight), torch.ones(300), state, rule=rule, now=now)
    assert torch.equal(weight, torch.ones(300))


def test_a_layer_that_hides_its_weight_is_found_by_it_and_one_that_lost_it_is_refused():
    from lowbit_dist.model import replace_linears

    class Wrapped(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.inner = layer

    class Wrapping(DQT):
        def linear(self, layer, **_):
            return Wrapped(layer)

    class Losing(DQT):
        def linear(self, layer, **_):
            return nn.Linear(256, 7)

    plain = nn.Sequential(nn.Linear(256, 7))
    assert replace_linears(plain, Wrapping(), is_head=lambda _: False) == ["0.inner.weight"]
    with pytest.raises(TypeError, match="in the place of 0 that has not its weight"):
        replace_linears(nn.Sequential(nn.Linear(256, 7)), Losing(), is_head=lambda _: False)
