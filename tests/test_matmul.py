"""Integers of 8 bits times packed codes: the C gives the reference's bytes, and that is our forward pass."""

import pytest
import torch
from op_cases import generator

from lowbit_dist import ops
from lowbit_dist.grid import GRIDS
from lowbit_dist.linear import IntPerToken
from lowbit_dist.ops import cpu, reference

needs_compiler = pytest.mark.skipif(not cpu.available(), reason="there is no C compiler")
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)

# Rows, their length, and what shares a scale: rows begin on blocks, on planes, and anywhere.
SHAPES = {
    "tensor": (8, 512, 8 * 512),
    "tensor, rows from any plane": (9, 256 * 5 + 64 * 3, None),
    "tensor, rows from anywhere": (128, 110, 128 * 110),
    "tensor, fewer rows than a tile": (2, 384, 2 * 384),
    "rows": (6, 512, 512),
    "rows from any plane": (12, 576, 576),
    "groups of 64": (7, 768, 64),
    "groups of 192": (4, 576, 192),
    "long rows, several panels": (70, 8192, 8192),
}


def case(grid, shape, tokens=5, dtype=torch.float32, seed=0):
    n, k, every = SHAPES[shape]
    if every is None:
        n = 64 * n  # whole blocks
        every = n * k
    made = generator(seed)
    levels = torch.randint(grid.low, grid.high + 1, (n * k,), dtype=torch.int8, generator=made)
    scale = torch.rand(n * k // every, generator=made) + 0.01
    x = torch.randn(tokens, k, generator=made) * torch.logspace(-3, 3, tokens)[:, None]
    weight = {
        "codes": ops.pack(levels, grid=grid),
        "scale": scale,
        "grid": grid,
        "scale_every": every,
        "n": n,
    }
    return x.to(dtype), weight


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@every_grid
def test_the_c_gives_the_references_bytes(grid, shape, dtype):
    for tokens in (1, 2, 3, 4, 11):
        x, weight = case(grid, shape, tokens, dtype)
        expected = reference.matmul(x, **weight)
        assert expected.count_nonzero() > 0.8 * expected.numel(), "the case must give numbers"
        assert expected.dtype == dtype
        assert torch.equal(ops.matmul(x, **weight), expected)


@pytest.mark.parametrize("shape", SHAPES)
@every_grid
def test_the_reference_is_the_forward_pass_in_exact_sums(grid, shape):
    x, weight = case(grid, shape)
    levels = ops.unpack(weight["codes"], grid=grid).double()
    dense = levels.view(-1, weight["scale_every"]) * weight["scale"].double()[:, None]
    rounded = IntPerToken(8)(x)
    expected = rounded.double() @ dense.view(weight["n"], -1).t()
    y = reference.matmul(x, **weight)
    assert (y - expected).abs().max() <= 1e-6 * (
        rounded.abs().double() @ dense.view(weight["n"], -1).abs().t()
    ).max()


@every_grid
def test_extreme_integers_do_not_overflow(grid):
    """As long a row as may be, of the levels and the inputs that are farthest from 0."""
    k = 2**17 - 128
    for level in (grid.low, grid.high):
        codes = ops.pack(torch.full((2 * k,), level, dtype=torch.int8), grid=grid)
        x = torch.tensor([-1.0, 1.0])[:, None].expand(2, k).contiguous()
        y = ops.matmul(x, codes, torch.ones(1), grid=grid, scale_every=2 * k, n=2)
        assert torch.equal(y, x[:, :2] * level * k)


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_token_that_is_not_finite_stays_so_and_others_are_as_they_were(value, dtype):
    x, weight = case(GRIDS["ternary"], "rows", 6, dtype)
    expected = ops.matmul(x, **weight)
    x[3, 7] = value
    for backend in (ops, reference):
        y = backend.matmul(x, **weight)
        assert y[3].isnan().all()
        assert torch.equal(torch.cat([y[:3], y[4:]]), torch.cat([expected[:3], expected[4:]]))


def test_tokens_of_zeros_and_none_at_all():
    x, weight = case(GRIDS["int3"], "groups of 64")
    assert torch.equal(ops.matmul(x * 0, **weight), torch.zeros(5, weight["n"]))
    assert ops.matmul(x[:0], **weight).shape == (0, weight["n"])


@needs_compiler
def test_the_number_of_threads_changes_no_bit():
    x, weight = case(GRIDS["int4"], "long rows, several panels", 9)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.matmul(x, **weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 512, dtype=torch.float16)}, "x is torch.float16"),
        ({"x": torch.zeros(512, 2).t()}, "must be contiguous"),
        ({"n": 5}, "codes has"),
        ({"scale": torch.ones(2)}, "there are 2"),
        ({"scale_every": 320, "scale": torch.ones(10)}, "320 elements, which do not divide a row of 512"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    x, weight = case(GRIDS["ternary"], "rows")
    given = {"x": x, **weight} | changes
    with pytest.raises(ValueError, match=message):
        ops.matmul(given.pop("x"), **given)


def test_a_row_that_32_bits_do_not_hold_is_refused():
    k = 2**17
    codes = torch.zeros(k // 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="131,072 elements; sums of more than 131,071"):
        ops.matmul(torch.zeros(1, k), codes, torch.ones(1), grid=GRIDS["ternary"], scale_every=k, n=1)
