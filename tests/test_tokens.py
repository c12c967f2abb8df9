"""Tokens in integers: their bytes in every backend, what layers keep of them, that they are rounded once."""

import pytest
import torch
from op_cases import assert_equal, generator
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lowbit_dist import ops
from lowbit_dist.linear import IntPerToken, Linear, linear
from lowbit_dist.ops import cpu, reference

needs_compiler = pytest.mark.skipif(not cpu.available(), reason="no C compiler")
every_float = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
both_backends = pytest.mark.parametrize(
    "backend", [reference, pytest.param(cpu, marks=needs_compiler)], ids=["reference", "c"]
)


def published(x, bits=8):
    """The straight transcription of the formula in PyTorch, which kept no integers."""
    top = 2 ** (bits - 1) - 1
    a = top / x.abs().amax(-1, keepdim=True).float().clamp(min=1e-5)
    return (x * a).round().clamp(-top - 1, top) / a, a


def rows(n_tokens, k, dtype, seed=0):
    """Of all sizes, with ties, zeros of both signs and subnormals."""
    x = torch.randn(n_tokens, k, generator=generator(seed)) * torch.logspace(-8, 37, n_tokens)[:, None]
    x[1] = 1e-40
    x[2] = torch.arange(k) / 2 - k // 4  # the largest is a power of two for k = 512: ties
    x[3] = 0.0
    x[4, ::2], x[4, 1::2] = -0.0, -1e-3
    x[5] = 3.38e38
    return x.to(dtype)


@both_backends
@every_float
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("k", [1, 77, 512, 1281])
def test_rounded_tokens_stand_for_the_formulas_numbers(backend, dtype, bits, k):
    x = rows(40, k, dtype)
    levels, per_unit = backend.round_tokens(x, bits)
    expected, a = published(x, bits)
    assert levels.dtype == torch.int8 and levels.shape == x.shape
    assert_equal(per_unit, a.squeeze(1), "integers per 1")
    assert k < 512 or levels.unique().numel() == 2**bits - 1, "the case must have all levels"
    for of in (torch.float32, torch.bfloat16):
        assert_equal(backend.token_values(levels, per_unit, of), expected.to(of), f"values in {of}")
    at_once = backend.rounded_tokens(x, bits)
    for ours, theirs in zip(at_once, (levels, per_unit, expected.to(dtype)), strict=True):
        assert_equal(ours, theirs, "at once")


@both_backends
@every_float
def test_a_gradient_is_rounded_whatever_its_size(backend, dtype):
    """By the tokens of a batch its elements are divided, and those of an input are not."""
    x = torch.randn(6, 300, generator=generator(3)).to(dtype)
    levels, per_unit = backend.round_tokens(x, least=ops.LEAST_OF_GRADIENT)
    small, units = backend.round_tokens(x * 2.0**-60, least=ops.LEAST_OF_GRADIENT)
    assert_equal(small, levels, "levels")
    assert_equal(units, per_unit * 2.0**60, "integers per 1")
    assert not backend.round_tokens(x * 2.0**-60)[0].any(), "of an input so small nothing is left"
    zeros, units = backend.round_tokens(x * 0.0, least=ops.LEAST_OF_GRADIENT)
    assert not zeros.any() and units.isfinite().all()


@both_backends
@every_float
def test_a_token_that_is_not_finite_is_nan_and_no_other(backend, dtype):
    x = rows(40, 300, dtype)
    before = backend.round_tokens(x)
    bad = {7: torch.nan, 8: torch.inf, 9: -torch.inf}
    for row, value in bad.items():
        x[row, 5 * row] = value
    levels, per_unit = backend.round_tokens(x)
    values = backend.token_values(levels, per_unit, dtype)
    assert values[list(bad)].isnan().all() and published(x)[0][list(bad)].isnan().all()
    assert not levels[list(bad)].any()
    others = [row for row in range(40) if row not in bad]
    assert_equal(levels[others], before[0][others], "levels")
    assert_equal(per_unit[others], before[1][others], "integers per 1")


@needs_compiler
def test_a_product_in_double_is_the_quotient_in_float():
    """Each level by 100,000 numbers of all sizes, from the smallest to the largest that occur."""
    bits = torch.randint(0x02FC0000, 0x4B41C1F0, (100_000,), generator=generator(1), dtype=torch.int32)
    per_unit = bits.view(torch.float32)
    levels = torch.arange(-127, 128, dtype=torch.int8).expand(len(bits), 255).contiguous()
    assert_equal(
        cpu.token_values(levels, per_unit, torch.float32),
        reference.token_values(levels, per_unit, torch.float32),
        "values",
    )


@needs_compiler
@every_float
def test_threads_share_the_rows(dtype):
    x = rows(300, 1024, dtype)
    alone, n_threads = ops.round_tokens(x), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        shared = ops.round_tokens(x)
        assert_equal(ops.token_values(*shared, dtype), ops.token_values(*alone, dtype), "values")
    finally:
        torch.set_num_threads(n_threads)
    for ours, theirs in zip(shared, alone, strict=True):
        assert_equal(ours, theirs, "tokens")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_tokens_of_other_floats_are_rounded_in_their_own_precision(dtype):
    x = torch.randn(5, 64, generator=generator(2)).to(dtype)
    rounded = IntPerToken()(x)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, published(x)[0].to(dtype))


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(ValueError, match=r"bits is 9; tokens are rounded to integers of 2 to 8 bits"):
        IntPerToken(9)
    with pytest.raises(ValueError, match="must be contiguous"):
        ops.round_tokens(torch.ones(4, 8).t())


def test_tokens_without_values_have_shapes():
    with FakeTensorMode():
        x = torch.empty(3, 0, 512, dtype=torch.bfloat16)
        assert IntPerToken()(x).shape == x.shape
        levels, per_unit = ops.round_tokens(torch.empty(6, 512))
        assert (levels.shape, levels.dtype, per_unit.shape) == ((6, 512), torch.int8, (6,))
    assert [t.numel() for t in ops.round_tokens(torch.empty(0, 512))] == [0, 0]


# Layers


@pytest.fixture
def counted(monkeypatch):
    """How often tokens were rounded, and numbers made of them."""
    counts = {"rounded_tokens": 0, "token_values": 0}

    def counting(name, original):
        def call(*args):
            counts[name] += 1
            return original(*args)

        return call

    for name in counts:
        monkeypatch.setattr(ops, name, counting(name, getattr(ops, name)))
    return counts


def layers(n, k=512):
    torch.manual_seed(0)
    return [Linear(nn.Linear(k, 64, bias=False), activation=IntPerToken()) for _ in range(n)]


@every_float
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_has_the_bits_of_one_whose_inputs_are_rounded_before(dtype, autocast):
    (layer,) = layers(1)
    layer = layer.to(dtype)
    dy = torch.randn(2, 9, 64, generator=generator(1)).to(dtype)
    found = []
    for rounds_before in (True, False):
        x = rows(18, 512, dtype)[6:].clamp(-1e3, 1e3).view(2, 6, 512).requires_grad_()
        layer.weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = linear(layer.activation(x), layer.weight) if rounds_before else layer(x)
        y.backward(dy[:, :6].to(y.dtype))
        found.append((y.detach(), x.grad, layer.weight.grad))
    for name, ours, theirs in zip(("y", "dx", "dW"), found[1], found[0], strict=True):
        assert_equal(ours, theirs, name)
        assert ours.count_nonzero()


def test_autograd_keeps_integers_and_a_number_for_each_token():
    kept = []
    x = torch.randn(6, 512, dtype=torch.bfloat16, requires_grad=True)
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = [layer.to(torch.bfloat16)(x) for layer in layers(2)]
    assert [(t.dtype, tuple(t.shape)) for t in kept] == 2 * [(torch.int8, (6, 512)), (torch.float32, (6,))]
    assert kept[0].data_ptr() == kept[2].data_ptr(), "both layers keep the same"
    sum(y).sum().backward()
    assert x.grad.isfinite().all()


def test_readers_of_one_tensor_round_it_once_until_it_changes_or_dies(counted):
    q, k, v = layers(3)
    x = torch.randn(6, 512)
    y = q(x)
    # As DeepSpeed's hooks do.
    assert torch.equal(k(x.detach().view(2, 3, 512)).view(6, 64), linear(IntPerToken()(x), k.weight))
    assert counted == {"rounded_tokens": 2, "token_values": 0}
    assert v(x[:3]).shape == (3, 64) and counted["rounded_tokens"] == 3, "a part is another tensor"
    x.mul_(2)
    torch.testing.assert_close(q(x), 2 * y)
    assert counted["rounded_tokens"] == 4
    with torch.inference_mode():
        first, second = q(x + 1), q(x + 1)
    assert torch.equal(first, second) and counted["rounded_tokens"] == 6


def test_readers_make_numbers_of_the_integers_once_in_the_backward_pass(counted):
    q, k, v = layers(3)
    x = torch.randn(6, 512, requires_grad=True) * 1.0
    y = q(x) + k(x) + v(x)
    assert counted == {"rounded_tokens": 1, "token_values": 0}
    y.sum().backward()
    assert counted == {"rounded_tokens": 1, "token_values": 1}
    del x, y
    from lowbit_dist import linear as module

    for latest in (module._recent.rounded, module._recent.values):
        assert latest.entry == (None, None, None), "what was computed lives no longer than its source"


def test_checkpointing_changes_no_bit_of_shared_tokens(counted):
    q, k, inner = layers(3)
    inner = Linear(nn.Linear(64, 8, bias=False), activation=IntPerToken())
    dy, found = torch.randn(6, 8, generator=generator(1)), []

    def block(x):
        normed = nn.functional.rms_norm(x, (512,))
        return inner(q(normed) * k(normed).sigmoid())

    for checkpointed in (False, True):
        x = rows(12, 512, torch.float32)[6:].clamp(-1e3, 1e3).requires_grad_()
        for layer in (q, k, inner):
            layer.weight.grad = None
        y = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        y.backward(dy)
        found.append([y.detach(), x.grad, *(layer.weight.grad for layer in (q, k, inner))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert counted["rounded_tokens"] == 2 + 4, "two in each forward pass"


# The exact sums behind a gradient's norm


def gradients(dtypes):
    sizes = (0, 1, 255, 70_001, 300)
    return [
        (torch.randn(n, generator=generator(n)) ** 3).to(dtype)
        for n, dtype in zip(sizes, (dtypes * 5)[:5], strict=True)
    ]


@needs_compiler
@pytest.mark.parametrize(
    "dtypes",
    [[torch.float32], [torch.bfloat16], [torch.float32, torch.bfloat16], [torch.float64]],
    ids=["fp32", "bf16", "both", "fp64"],
)
@pytest.mark.parametrize("unit", [2.0**55, 2.0**45, 2.0**30])
def test_sums_of_a_norm_have_the_bits_of_the_reference(dtypes, unit):
    given = gradients(dtypes)
    most = reference.largest(given)
    expected = reference.square_sum(given, most, unit)
    assert_equal(ops.largest(given), most, "largest")
    assert ops.largest(given).dtype == torch.float64
    n_threads = torch.get_num_threads()
    for n in (1, 3):
        torch.set_num_threads(n)
        try:
            assert_equal(ops.square_sum(given, most, unit), expected, f"sum of {n} threads")
        finally:
            torch.set_num_threads(n_threads)
    exact = sum((g.double() / most).square().sum() for g in given)
    assert expected.item() / unit == pytest.approx(exact.item(), rel=1e-6)


@both_backends
@every_float
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_largest_of_what_is_not_finite_is_infinite(backend, dtype, bad):
    given = gradients([dtype])
    assert backend.largest(given).isfinite()
    given[3][69_999] = bad
    assert backend.largest(given).tolist() == [torch.inf]
    assert backend.largest([torch.zeros(3, dtype=dtype), given[0]]).tolist() == [0.0]


# ------------------------------------------------------------------ the first operand of a weight's gradient


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (8, 8), (33, 40), (40, 33), (257, 513), (2048, 1280)])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_matrix_is_laid_out_by_columns(shape, n_threads):
    bits = torch.arange(shape[0] * shape[1]).mul_(40_503).to(torch.int16).view(shape)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        found = cpu.transposed(bits.view(torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.int16), reference.transposed(bits))


@pytest.mark.parametrize("t", [200, 8192], ids=["small", "large"])
def test_the_gradient_of_a_weight_is_that_of_its_operands_by_rows(t):
    """In bfloat16, whatever the layout of the output's gradient."""
    tokens, weight = torch.randn(t, 96), torch.randn(72, 96)
    dy = torch.randn(t, 72, dtype=torch.bfloat16)
    for given in (dy, dy.t().contiguous().t(), dy[:1].expand(t, 72)):
        x, w = (t.bfloat16().requires_grad_() for t in (tokens, weight))
        linear(x, w).backward(given)
        by_rows = given.t().contiguous() @ x.detach()
        assert torch.equal(w.grad, by_rows)
        exact = given.double().t() @ x.detach().double()
        assert (exact - w.grad.double()).abs().max() <= 2**-8 * exact.abs().max()


def test_tokens_are_rows_of_a_matrix():
    """Of more dimensions, the last would be read as one token with the one before it."""
    x = torch.ones(2, 3, 32)
    levels, per_unit = ops.round_tokens(x.view(6, 32))
    for call in (
        lambda: ops.round_tokens(x),
        lambda: ops.rounded_tokens(x[0, 0]),
        lambda: ops.token_values(levels.view(2, 3, 32), per_unit, torch.float32),
    ):
        with pytest.raises(ValueError, match=r"it must be \[tokens, numbers of each\]"):
            call()
