"""Products in 8-bit floats against transcriptions in Python floats; where they are refused.

PyTorch computes on CPUs what GPUs compute, so equations are tested anywhere.
"""

import math

import pytest
import torch
from test_methods import case, layer_of, rounded_tokens
from torch import nn

from lowbit_dist import configfile, float8
from lowbit_dist.config import ConfigError
from lowbit_dist.convert import convert_
from lowbit_dist.linear import plain_product
from lowbit_dist.methods import DQT, BitNet, Dense

FORMATS = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}  # bits of mantissa, least exponent, top


def in_fp8(x, format):
    """x as it is multiplied, in float64."""
    mantissa, least, top = FORMATS[format]
    one = x.abs().max().item() / top

    def rounded(v):
        exponent = max(math.frexp(abs(v))[1] - 1, least)
        unit = 2.0 ** (exponent - mantissa)
        return min(max(round(v / unit) * unit, -top), top)

    return torch.tensor([[rounded(v / one) * one for v in row] for row in x.double().tolist()]).double()


@pytest.mark.parametrize(("of_gradient", "format"), [(False, "e4m3"), (True, "e5m2")])
@pytest.mark.parametrize(("m", "n", "k"), [(5, 7, 40), (16, 32, 48), (1, 3, 1)])
def test_a_product_is_that_of_its_rounded_factors(m, n, k, of_gradient, format):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(m, k, generator=g) * 1e-4, torch.randn(n, k, generator=g)
    found = float8.product(a, b, of_gradient=of_gradient)
    expected = in_fp8(a, format) @ in_fp8(b, "e4m3").t()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-8)
    if k > 1:
        assert (found - a @ b.t()).abs().max() > 1e-6, "the case must show the rounding"
    transposed = float8.product(a.t().contiguous().t(), b.t().contiguous().t(), of_gradient=of_gradient)
    assert torch.equal(transposed, found) and found.is_contiguous()
    in_bf16 = float8.product(a.bfloat16(), b.bfloat16(), of_gradient=of_gradient)
    assert in_bf16.dtype == torch.bfloat16


def test_ternary_factors_of_one_scale_lose_nothing():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, (n, 64), generator=g) * scale for n, scale in ((8, 0.7), (24, 0.013)))
    torch.testing.assert_close(float8.product(a, b), a @ b.t(), rtol=1e-5, atol=1e-7)


def test_zeros_nothing_and_what_is_not_finite():
    b = torch.ones(4, 32)
    assert torch.equal(float8.product(torch.zeros(3, 32), b), torch.zeros(3, 4))
    assert torch.equal(float8.product(torch.zeros(0, 32), b), torch.zeros(0, 4))
    assert torch.equal(float8.product(torch.zeros(3, 0), torch.zeros(4, 0)), torch.zeros(3, 4))
    for bad in (math.inf, math.nan):
        a = torch.ones(3, 32)
        a[1, 1] = bad
        assert not torch.isfinite(float8.product(a, b)).all()


@pytest.mark.parametrize("method", [Dense(), BitNet()])
def test_a_layer_multiplies_three_times(method):
    x, weight, dy = case(out=6)
    dy = dy[:, :6]
    layer = layer_of(method, weight)
    layer.product = float8.product
    w, xq = weight.double(), x.double()
    if method.name == "bitnet":
        gamma = w.abs().mean()
        w, xq = gamma * (w / gamma).round().clamp(-1, 1), rounded_tokens(x)
    w, xq = in_fp8(w, "e4m3"), in_fp8(xq, "e4m3")
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    dy = in_fp8(dy, "e5m2")
    torch.testing.assert_close(y.double(), xq @ w.t(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), dy @ w, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad.double(), dy.t() @ xq, rtol=1e-4, atol=1e-4)


def test_codes_are_decoded_and_multiplied_likewise():
    torch.manual_seed(0)
    method, plain = DQT(grid="int4"), nn.Sequential(nn.Linear(256, 64, bias=False))
    weight = plain[0].weight.detach().clone()
    packed = convert_(plain, method)[0]
    dense = layer_of(method, method.quantize(weight).dequantize(torch.float32))
    packed.product = dense.product = float8.product
    x = torch.randn(5, 256)
    assert torch.equal(packed(x), dense(x))
    dense.product = plain_product
    assert not torch.equal(packed(x), dense(x))


@pytest.mark.parametrize(
    ("capabilities", "words"),
    [([], "here has none"), ([(8, 0)], "one of 8.0"), ([(9, 0), (8, 6)], "one of 8.6")],
)
def test_gpus_that_cannot_are_refused(capabilities, words):
    answer = rf"^precision \(fp8\) .* 8\.9 or more .*{words}; write precision: bf16$"
    with pytest.raises(ConfigError, match=answer):
        float8.check(capabilities, "here")
    float8.check([(8, 9)], "here")
    float8.check([(9, 0), (10, 0)], "here")


@pytest.mark.skipif(bool(float8.gpus()), reason="this machine has GPUs")
def test_workers_without_gpus_are_refused_before_they_start_and_when_they_do(small, ranks):
    from test_train import train

    from lowbit_dist.cluster import checks

    content = small(precision="fp8", cluster={"workers": 1}, train={"batch_tokens": 128, "micro_batch": 2})
    config = configfile.from_dict(content)
    with pytest.raises(ConfigError, match=r"precision \(fp8\)"):
        checks.check_workers(config, cpus=8, gpus=0, place="here")
    assert checks.check_workers(config, cpus=8, gpus=1, place="here") == 1
    with pytest.raises(AssertionError, match=r"ConfigError: precision \(fp8\) .* worker 0 has none"):
        ranks(1).run(train, content)


def losses(content):
    from lowbit_dist import model, ops
    from lowbit_dist.zero import Engine

    config = configfile.from_dict(content)
    built = model.build(config.model, 512, config.method, model.DTYPES[config.precision.compute])
    initial = model.InitialWeights(built, config.method, 0, None)
    engine = Engine(config, built, initial, model.low_bit_names(built, config.method))
    products = {name: m.product for name, m in engine.module.named_modules() if hasattr(m, "product")}
    tokens, found = torch.arange(32).view(2, 16) % 7, []
    for step in range(1, 13):
        with engine.step(ops.Now(lr=3e-3, weight_decay=0.0, step=step, seed=0)) as passes:
            found.append(passes.backward(tokens).item())
    engine.close()
    return found, {name.rpartition(".")[2]: product is float8.product for name, product in products.items()}


@pytest.mark.parametrize(
    "method", [{"name": "dense"}, {"name": "bitnet"}, {"name": "dqt", "grid": "int8"}], ids=str
)
def test_a_model_trains_in_it(method, small, ranks):
    content = small(
        # Small, for some processors multiply 8-bit floats one by one.
        model={"hidden_size": 64, "intermediate_size": 64, "layers": 1, "heads": 2, "kv_heads": 1},
        method=method, precision="bf16", cluster={"workers": 1},
        train={"batch_tokens": 128, "micro_batch": 2},
    )  # fmt: skip
    in_bf16, _ = ranks(1).run(losses, content)[0]
    in_fp8, layers = ranks(1).run(losses, content | {"precision": "fp8"})[0]
    assert in_fp8 != in_bf16 and in_fp8[0] == pytest.approx(in_bf16[0], rel=0.02)
    assert in_fp8[-1] < 0.9 * in_fp8[0]
    assert layers.pop("lm_head") is False and all(layers.values()) and len(layers) == 7


def test_the_plan_is_that_of_bf16_with_the_copies_of_a_product(small):
    from lowbit_dist.memory.plan import planned

    configs = [configfile.from_dict(small(precision=of, model={"layers": 1})) for of in ("bf16", "fp8")]
    in_bf16, in_fp8 = (planned(config, 512, 1) for config in configs)
    key = "resident_bytes_per_worker"
    assert in_fp8[key] == in_bf16[key]
    assert in_fp8["peak_bytes_per_worker"] >= in_bf16["peak_bytes_per_worker"]


@pytest.mark.skipif(
    not float8.gpus() or min(float8.gpus()) < float8.LEAST, reason="no GPU that multiplies 8-bit floats"
)
@pytest.mark.parametrize("of_gradient", [False, True])
def test_a_gpu_computes_what_a_cpu_does(of_gradient):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 200, generator=g).bfloat16() for n in (37, 70))
    on_gpu = float8.product(a.cuda(), b.cuda(), of_gradient=of_gradient).cpu()
    expected = float8.product(a, b, of_gradient=of_gradient)
    torch.testing.assert_close(on_gpu, expected, rtol=0.02, atol=0.02)  # sums of the forward pass are fast
