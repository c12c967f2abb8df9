"""The ops: C against the reference byte for byte, the reference against mathematics in float64 and numpy."""

import logging
import math
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lowbit_dist import ops
from lowbit_dist.grid import BLOCK, GRIDS
from lowbit_dist.ops import AdamWStep, Moments, cpu, reference, rng

needs_compiler = pytest.mark.skipif(not cpu.available(), reason="no C compiler")
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
every_state = pytest.mark.parametrize("states", ops.STATES)
both_backends = pytest.mark.parametrize(
    "backend", [reference, pytest.param(cpu, marks=needs_compiler)], ids=["reference", "c"]
)


def step(number=1, **changes):
    numbers = {
        "lr": 3e-3,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "seed": 0x1234567890ABCDEF,
    }
    return AdamWStep(**(numbers | {"step": number, "grad_scale": 0.7} | changes))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_codes(grid, n_blocks, seed=0):
    levels = torch.randint(
        grid.low, grid.high + 1, (n_blocks * BLOCK,), dtype=torch.int8, generator=generator(seed)
    )
    return reference.pack(levels, grid=grid)


def heavy_tailed_grad(n, seed, dtype=torch.float32):
    """Gradients of very different sizes, with blocks of zeros and of numbers near the smallest."""
    g = generator(seed)
    grad = torch.randn(n, generator=g) * torch.rand(n, generator=g) ** 3 * 1e-3
    grad[BLOCK : 2 * BLOCK] = 0
    grad[2 * BLOCK : 3 * BLOCK] *= 1e-18
    grad[3 * BLOCK : 4 * BLOCK] *= 1e12
    grad[7::13] = 0
    return grad.to(dtype)


def copy_of(moments):
    return Moments(*(tensor.clone() for tensor in moments.tensors))


def random_moments(n, states, seed=0):
    """What a few steps leave."""
    moments = Moments.zeros(n, states)
    weight = torch.zeros(n)
    for number in (1, 2, 3):
        reference.adamw_weights_(weight, heavy_tailed_grad(n, seed + number), moments, now=step(number))
    return moments


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


# ---- codes


@every_grid
@both_backends
@pytest.mark.parametrize("n_blocks", [0, 1, 3, 37, 700])
def test_packing_round_trips(grid, backend, n_blocks):
    levels = torch.randint(
        grid.low, grid.high + 1, (n_blocks * BLOCK,), dtype=torch.int8, generator=generator(3)
    )
    codes = backend.pack(levels, grid=grid)
    assert codes.dtype == torch.uint8 and len(codes) == n_blocks * grid.bytes_per_block
    assert torch.equal(backend.unpack(codes, grid=grid), levels)
    assert torch.equal(codes, reference.pack(levels, grid=grid))


@every_grid
def test_each_element_has_the_bits_that_the_layout_names(grid):
    """The layout of grid.py, read element by element."""
    codes = random_codes(grid, 2)
    levels = reference.unpack(codes, grid=grid)
    for element in range(2 * BLOCK):
        block, j = divmod(element, BLOCK)
        of_block = codes[block * grid.bytes_per_block :].tolist()
        if grid.bits == 8:
            code = of_block[j]
        elif grid.bits == 4:
            code = of_block[j % 128] >> 4 * (j // 128) & 15
        else:
            code = of_block[j % 64] >> 2 * (j // 64) & 3
            if grid.bits == 3:
                code |= (of_block[64 + j % 32] >> j // 32 & 1) << 2
        assert levels[element] == code + grid.low


@every_grid
@both_backends
def test_code_counts_are_the_histogram_of_the_levels(grid, backend):
    codes = random_codes(grid, 37)
    counts = backend.code_counts(codes, grid=grid)
    assert counts.tolist() == [
        int((reference.unpack(codes, grid=grid) == level).sum()) for level in range(grid.low, grid.high + 1)
    ]


@every_grid
@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_is_the_rounded_product_of_scale_and_level(grid, backend, dtype):
    codes = random_codes(grid, 700)
    scale = torch.rand(10, generator=generator(1)) + 0.01
    out = torch.empty(700 * BLOCK, dtype=dtype)
    result = backend.decode(codes, scale, grid=grid, first_block=75, blocks_per_scale=80, out=out)
    row = (75 + np.arange(700)) // 80
    levels = reference.unpack(codes, grid=grid).numpy().reshape(700, BLOCK)
    # A product of a float32 and a short integer is exact in float64, so this rounds once, as IEEE says.
    product = (scale.numpy()[row].astype(np.float64)[:, None] * levels).astype(np.float32)
    assert result is out
    assert torch.equal(out, torch.from_numpy(product).view(-1).to(dtype))


@every_grid
def test_quantizing_takes_the_nearest_level_and_the_even_one_of_two(grid):
    weight = torch.linspace(1.3 * grid.low, 1.3 * grid.high + 1, BLOCK - 8).repeat(2)
    ties = torch.tensor([-2.5, -1.5, -0.5, -0.0, 0.0, 0.5, 1.5, 2.5]).repeat(2)
    weight = torch.cat([weight, ties])
    scale = torch.tensor([0.25, 0.5])  # powers of two: the products below are exact
    rows = torch.cat([weight[:BLOCK] * 0.25, weight[BLOCK:] * 0.5])
    levels = ops.quantize(rows, scale, grid=grid, first_block=0, blocks_per_scale=1)
    assert levels.dtype == torch.int8
    assert np.array_equal(levels.numpy(), np.clip(np.rint(weight.double().numpy()), grid.low, grid.high))
    # A later shard has the scales of its own rows.
    later = ops.quantize(rows[BLOCK:], scale, grid=grid, first_block=1, blocks_per_scale=1)
    assert torch.equal(later, levels[BLOCK:])


# ---- C against the reference


@needs_compiler
@every_grid
@every_state
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_c_steps_codes_as_the_reference_does(grid, states, dtype, granularity):
    n_blocks = 37
    n = n_blocks * BLOCK
    scale = torch.rand(1 if granularity == "tensor" else 10, generator=generator(5)) * 0.02 + 1e-4
    blocks_per_scale = 10**9 if granularity == "tensor" else 4
    expected, actual = random_codes(grid, n_blocks), random_codes(grid, n_blocks)
    expected_moments, actual_moments = Moments.zeros(n, states), Moments.zeros(n, states)
    for number in range(1, 21):
        grad = heavy_tailed_grad(n, number, dtype)
        place = {"tensor": 7, "first_block": 3, "blocks_per_scale": blocks_per_scale}
        arguments = {"grid": grid, "now": step(number), **place}
        before = reference.unpack(actual, grid=grid)
        expected_flips = reference.adamw_codes_(expected, scale, grad, expected_moments, **arguments)
        flips = cpu.adamw_codes_(actual, scale, grad, actual_moments, **arguments)
        assert torch.equal(actual, expected)
        assert_same(actual_moments, expected_moments)
        assert torch.equal(flips, expected_flips)
        assert flips.item() == (before != reference.unpack(actual, grid=grid)).sum() > 0


@needs_compiler
@every_state
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("n", [1, 255, 256, 999, 37 * BLOCK + 77])
def test_c_steps_weights_as_the_reference_does(states, dtype, n):
    expected = torch.randn(n, generator=generator(1))
    actual = expected.clone()
    expected_moments, actual_moments = Moments.zeros(n, states), Moments.zeros(n, states)
    for number in range(1, 21):
        grad = heavy_tailed_grad(n, number, dtype)
        reference.adamw_weights_(expected, grad, expected_moments, now=step(number))
        cpu.adamw_weights_(actual, grad, actual_moments, now=step(number))
        assert torch.equal(actual, expected)
        assert_same(actual_moments, expected_moments)


@needs_compiler
def test_the_number_of_threads_does_not_change_a_byte(monkeypatch):
    grid = GRIDS["int3"]
    n = 1100 * BLOCK
    grad = heavy_tailed_grad(n, 1)
    results = []
    for n_threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n_threads=n_threads: n_threads)
        codes, moments = random_codes(grid, 1100), random_moments(n, "int8")
        weight = torch.ones(n)
        place = {"tensor": 1, "first_block": 0, "blocks_per_scale": 10**9}
        flips = cpu.adamw_codes_(codes, torch.tensor([0.01]), grad, moments, grid=grid, now=step(4), **place)
        cpu.adamw_weights_(weight, grad, moments, now=step(5))
        results.append((codes, flips, weight, *moments.tensors))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- the position alone decides the random bits


@every_grid
@every_state
@both_backends
def test_any_cut_of_a_tensor_gives_the_bytes_of_the_whole(grid, states, backend):
    n_blocks = 23
    first = 2**26 - 11  # the Philox counter crosses 2**32 inside
    scale = torch.rand(n_blocks, generator=generator(2)) * 0.02 + 1e-3
    grad = heavy_tailed_grad(n_blocks * BLOCK, 4)
    whole, pieces = random_codes(grid, n_blocks), random_codes(grid, n_blocks)
    whole_moments = random_moments(n_blocks * BLOCK, states)
    piece_moments = copy_of(whole_moments)
    # One scale for every 2**26 // 16 blocks or so: the shard's own rows are the last ones.
    arguments = {"grid": grid, "now": step(4), "tensor": 3, "blocks_per_scale": 2**22}
    flips = backend.adamw_codes_(whole, scale, grad, whole_moments, first_block=first, **arguments)
    flips_of_pieces = torch.zeros_like(flips)
    for start, stop in ((0, 1), (1, 13), (13, 13), (13, 23)):
        elements, blocks = slice(start * BLOCK, stop * BLOCK), slice(start, stop)
        moments = Moments(
            piece_moments.m[elements],
            piece_moments.v[elements],
            None if piece_moments.m_scale is None else piece_moments.m_scale[blocks],
            None if piece_moments.v_scale is None else piece_moments.v_scale[blocks],
        )
        codes = pieces[start * grid.bytes_per_block : stop * grid.bytes_per_block]
        flips_of_pieces += backend.adamw_codes_(
            codes, scale, grad[elements], moments, first_block=first + start, **arguments
        )
    assert flips.item() > 0, "the case must move some codes"
    assert torch.equal(pieces, whole)
    assert_same(piece_moments, whole_moments)
    assert torch.equal(flips_of_pieces, flips)


@both_backends
@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"seed": 1 << 40}, {"step": 2}, {"tensor": 8}, {"first_block": 1}], ids=str
)
def test_another_seed_step_tensor_or_place_draws_other_bits(backend, change):
    assert not torch.equal(rounded(backend, 0.5), rounded(backend, 0.5, **change))


# ---- rounding


def rounded(backend, d, grid=GRIDS["int8"], level=0, n_blocks=64, **changes):
    """The levels that a step of `d` levels makes of `level`: [n_blocks, BLOCK] int8."""
    place = {"seed": 0, "step": 1, "tensor": 7, "first_block": 0} | changes
    n = n_blocks * BLOCK
    codes = reference.pack(torch.full((n,), level, dtype=torch.int8), grid=grid)
    # Without memory (beta 0) the update is the gradient's sign.
    numbers = {"beta1": 0.0, "beta2": 0.0, "eps": 0.0, "weight_decay": 0.0, "grad_scale": 1.0, "lr": abs(d)}
    now = step(place["step"], seed=place["seed"], **numbers)
    grad = torch.full((n,), math.copysign(1.0, -d))
    backend.adamw_codes_(
        codes,
        torch.ones(1),
        grad,
        Moments.zeros(n, "bf16"),
        grid=grid,
        now=now,
        tensor=place["tensor"],
        first_block=place["first_block"],
        blocks_per_scale=10**9,
    )
    return reference.unpack(codes, grid=grid).view(n_blocks, BLOCK)


def fastest():
    return cpu if cpu.available() else reference


@every_grid
@pytest.mark.parametrize("d", [0.3, -0.3, 0.01, -0.97])
def test_rounding_is_unbiased(grid, d):
    level = -1 if d > 0 else 1  # an inner level, from which every grid has room for d
    mean = rounded(fastest(), d, grid, level, n_blocks=4000).double().mean().item()
    standard_error = math.sqrt(abs(d) * (1 - abs(d)) / (4000 * BLOCK))
    assert abs(mean - (level + d)) < 5 * standard_error


@pytest.mark.parametrize("d", [3.7, -20.25, 100.5])
def test_steps_of_many_levels_are_unbiased(d):
    level = -50 if d > 0 else 50
    levels = rounded(fastest(), d, GRIDS["int8"], level, n_blocks=4000).double()
    fraction = abs(d) % 1
    assert set((levels - level).unique().tolist()) == {math.floor(d), math.ceil(d)}
    standard_error = math.sqrt(fraction * (1 - fraction) / (4000 * BLOCK))
    assert abs(levels.mean().item() - (level + d)) < 5 * standard_error


@pytest.mark.parametrize(("grid", "level"), [("int8", 100), ("int8", -100), ("int4", 5), ("ternary", -1)])
def test_steps_below_float32_resolution_still_count(grid, level):
    """100 + 3e-6 is 100 in float32; of 16 million such steps some 50 must move a code."""
    assert np.float32(100) + np.float32(3e-6) == np.float32(100)
    n_blocks = 2**16 if cpu.available() else 2**13
    d = 3e-6 if cpu.available() else 2.4e-5
    moved = (rounded(fastest(), d, GRIDS[grid], level, n_blocks) != level).sum().item()
    expected = n_blocks * BLOCK * d
    assert abs(moved - expected) < 5 * math.sqrt(expected)


@both_backends
def test_a_step_of_zero_never_moves_and_one_of_the_32nd_bit_can(backend):
    """Where the random word is 0, of all words: a threshold of 1 is above it, one of 0 is not."""
    place = {"step": 94, "first_block": 62897, "n_blocks": 1}
    assert rng.block_words(0, tensor=7, **place)[0, 24] == 0
    assert rounded(backend, 0.0, **place).count_nonzero() == 0
    assert rounded(backend, 2.0**-32, **place).nonzero().tolist() == [[0, 24]]


@both_backends
@every_grid
def test_levels_saturate_at_the_ends_of_the_grid(grid, backend):
    for d in (0.5, 3.0, 700.0, 1e6, 1e30):
        assert (rounded(backend, d, grid, grid.high, n_blocks=3) == grid.high).all()
        assert (rounded(backend, -d, grid, grid.low, n_blocks=3) == grid.low).all()
    for d in (700.0, 1e6, 1e30):
        assert (rounded(backend, d, grid, grid.low, n_blocks=3) == grid.high).all()
        assert (rounded(backend, -d, grid, grid.high, n_blocks=3) == grid.low).all()


def assert_moves_are_independent(a, b, p):
    """Chi-square, 3 degrees of freedom, of the 2 x 2 table of two elements' moves; the bound is at 1e-6."""
    table = torch.bincount((a.int() * 2 + b.int()).view(-1), minlength=4).double()
    expected = torch.tensor([(1 - p) ** 2, p * (1 - p), p * (1 - p), p * p]).double() * a.numel()
    assert ((table - expected) ** 2 / expected).sum().item() < 30.7


def test_moves_of_neighbours_tensors_and_steps_are_not_correlated():
    p = 0.3
    moves = rounded(fastest(), p, n_blocks=2000) != 0
    for distance in (1, 2, 64, 128):
        assert_moves_are_independent(moves[:, :-distance], moves[:, distance:], p)
    assert_moves_are_independent(moves[:-1], moves[1:], p)
    for change in ({"tensor": 8}, {"step": 2}, {"seed": 1}):
        assert_moves_are_independent(moves, rounded(fastest(), p, n_blocks=2000, **change) != 0, p)


# ---- the update


@both_backends
@every_grid
def test_one_update_agrees_with_adamw_and_its_rounding_in_float64(grid, backend):
    """AdamW (arXiv:1711.05101) and stochastic rounding to the grid (DQT, arXiv:2412.04787), transcribed
    in numpy.

    All blocks hold the same 256 cases: the share of each level among the blocks is compared with its
    probability.
    """
    n_blocks = 4000
    now = step(7, lr=0.02, weight_decay=0.3, grad_scale=0.5)
    scale = torch.tensor([0.03 if grid.bits < 8 else 0.004])
    level = torch.randint(grid.low, grid.high + 1, (BLOCK,), dtype=torch.int8, generator=generator(1))
    grad, m = (torch.randn(BLOCK, generator=generator(seed)) * 1e-3 for seed in (2, 3))
    v = torch.rand(BLOCK, generator=generator(4)) * 1e-6

    moments = Moments(m.repeat(n_blocks), v.repeat(n_blocks))
    codes = reference.pack(level.repeat(n_blocks), grid=grid)
    place = {"tensor": 2, "first_block": 5, "blocks_per_scale": 10**9}
    backend.adamw_codes_(codes, scale, grad.repeat(n_blocks), moments, grid=grid, now=now, **place)
    observed = reference.unpack(codes, grid=grid).view(n_blocks, BLOCK).numpy()

    w, g, m64, v64 = (
        x.double().numpy() for x in (scale.double() * level, grad.double() * now.grad_scale, m, v)
    )
    m64 = now.beta1 * m64 + (1 - now.beta1) * g
    v64 = now.beta2 * v64 + (1 - now.beta2) * g * g
    m_hat, v_hat = m64 / (1 - now.beta1**now.step), v64 / (1 - now.beta2**now.step)
    w = w - now.lr * (m_hat / (np.sqrt(v_hat) + now.eps) + now.weight_decay * w)
    target = w / scale.item()

    assert np.allclose(moments.m[:BLOCK].numpy(), m64, rtol=1e-5, atol=1e-10)
    assert np.allclose(moments.v[:BLOCK].numpy(), v64, rtol=1e-5, atol=1e-16)
    assert torch.equal(moments.m.view(n_blocks, BLOCK), moments.m[:BLOCK].expand(n_blocks, BLOCK))

    probability = np.zeros((grid.n_levels, BLOCK))
    below = np.floor(target)
    for end, share in ((below, 1 - (target - below)), (below + 1, target - below)):
        index = np.clip(end, grid.low, grid.high).astype(int) - grid.low
        probability[index, np.arange(BLOCK)] += share
    share = np.stack([(observed == k).mean(axis=0) for k in range(grid.low, grid.high + 1)])
    # 1e-5: float32 arithmetic of d. 3 / n_blocks: where a handful is expected the counts are not Gaussian.
    bound = 5 * np.sqrt(probability * (1 - probability) / n_blocks) + 3 / n_blocks + 1e-5 * (1 + abs(target))
    assert (abs(share - probability) < bound)[probability > 0].all()
    certain = probability > 1 - 1e-9
    assert (share[certain] == 1).all()
    impossible = (probability == 0) & (abs(target - np.rint(target)) > 1e-3)
    assert (share[impossible] == 0).all()
    assert ((probability > 0.05) & (probability < 0.95)).any() and certain.any(), "it must test both kinds"


@both_backends
def test_weights_follow_the_adamw_of_torch(backend):
    n = 999
    weight = torch.randn(n, generator=generator(1))
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    moments = Moments.zeros(n, "fp32")
    for number in range(1, 21):
        grad = heavy_tailed_grad(n, number)
        parameter.grad = grad.clone()
        optimizer.step()
        backend.adamw_weights_(weight, grad, moments, now=step(number, grad_scale=1.0))
    torch.testing.assert_close(weight, parameter.detach(), rtol=1e-5, atol=1e-6)
    assert (weight - torch.randn(n, generator=generator(1))).abs().max() > 0.01, "the weights must have moved"


@both_backends
@every_state
def test_the_gradient_scale_multiplies_the_gradient(states, backend):
    n = 999
    results = []
    for grad_scale, factor in ((0.5, 1.0), (1.0, 0.5)):
        weight, moments = torch.ones(n), Moments.zeros(n, states)
        backend.adamw_weights_(
            weight, heavy_tailed_grad(n, 1) * factor, moments, now=step(grad_scale=grad_scale)
        )
        results.append((weight, *moments.tensors))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- stored moments


def stored(backend, grad, states):
    """Moments that hold m = grad and v = grad^2, as the backend stores them."""
    moments = Moments.zeros(len(grad), states)
    now = step(beta1=0.0, beta2=0.0, grad_scale=1.0)
    backend.adamw_weights_(torch.zeros(len(grad)), grad, moments, now=now)
    return moments


@both_backends
def test_8_bit_codes_count_the_thresholds_they_reach(backend):
    n = 40 * BLOCK
    grad = heavy_tailed_grad(n, 1)
    moments = stored(backend, grad, "int8")
    half = np.float32(0.5)
    for value, code, scale, top, power in (
        (grad.abs(), moments.m.abs(), moments.m_scale, 127, 2),
        (grad * grad, moments.v, moments.v_scale, 255, 4),
    ):
        blocks = value.numpy().reshape(-1, BLOCK)
        expected_scale = blocks.max(axis=1) / np.float32(top**power)
        expected_scale[expected_scale < np.finfo(np.float32).tiny] = 0
        assert np.array_equal(scale.numpy(), expected_scale)
        with np.errstate(divide="ignore"):
            inverse = np.where(expected_scale > 0, np.float32(1) / expected_scale, np.float32(0))
        y = blocks * inverse[:, None].astype(np.float32)
        expected = np.zeros(y.shape, dtype=int)
        for k in range(1, top + 1):
            threshold = (np.float32(k) - half) ** 2
            expected += y >= (threshold if power == 2 else threshold * threshold)
        if power == 4:
            expected = np.maximum(expected, 1)
        assert np.array_equal(code.numpy().reshape(-1, BLOCK), expected)
    assert torch.equal(moments.m.sign()[moments.m != 0].float(), grad.sign()[moments.m != 0])


@both_backends
@pytest.mark.parametrize(("top", "power"), [(127, 2), (255, 4)])
def test_8_bit_codes_are_right_on_and_beside_every_threshold(backend, top, power):
    """Values a few units in the last place around each threshold, where an approximate root could err."""
    squares = (np.arange(1, top + 1, dtype=np.float32) - np.float32(0.5)) ** 2
    thresholds = squares if power == 2 else squares * squares
    near = [squares, squares, squares]  # gradients: m is one of them, or v is its square
    for _ in range(3):
        near += [np.nextafter(near[-2], np.float32(0)), np.nextafter(near[-1], np.float32(np.inf))]
    grad = np.zeros((len(near), BLOCK), dtype=np.float32)
    grad[:, :top] = near
    grad[:, -1] = top**2  # the scale is then 1
    moments = stored(backend, torch.from_numpy(grad).view(-1), "int8")
    code, scale = (moments.m, moments.m_scale) if power == 2 else (moments.v, moments.v_scale)
    assert (scale == 1).all()
    y = grad if power == 2 else grad * grad
    expected = (y[..., None] >= thresholds).sum(axis=-1)
    assert np.array_equal(
        code.numpy().reshape(grad.shape), expected if power == 2 else np.maximum(expected, 1)
    )


@both_backends
def test_8_bit_moments_are_close_and_v_is_never_zero(backend):
    n = 400 * BLOCK
    grad = heavy_tailed_grad(n, 3)
    m, v = ops.moments_to_float(stored(backend, grad, "int8"))
    blocks = grad.double().view(-1, BLOCK)
    m_top, v_top = (x.amax(dim=1, keepdim=True) for x in (blocks.abs(), blocks * blocks))
    live = (v_top / 255**4 >= torch.finfo(torch.float32).tiny).view(-1)
    assert 0 < (~live).sum() < 10, "a few blocks are too small to store, most are not"

    # Half a code: in the root's units, 1 / (2 * 127) and 1 / (2 * 255) of the block's largest root.
    root_error = m.double().view(-1, BLOCK).abs().sqrt() - blocks.abs().sqrt()
    assert (root_error.abs() <= m_top.sqrt() * (0.5 / 127 + 1e-6))[live].all()
    fourth, stored_fourth = blocks.abs().sqrt(), v.double().view(-1, BLOCK).sqrt().sqrt()
    error = (stored_fourth - fourth).abs()
    floor = v_top.sqrt().sqrt() / 255
    assert (error <= floor * (0.5 + 1e-4))[live.unsqueeze(1) & (fourth > floor)].all()
    assert (error <= floor * (1 + 1e-4))[live].all()

    assert (v.view(-1, BLOCK)[live] > 0).all()
    assert (v.view(-1, BLOCK)[~live] == 0).all()


@both_backends
def test_bf16_moments_are_rounded_to_nearest_even(backend):
    n = 999
    grad = heavy_tailed_grad(n, 3)
    moments = stored(backend, grad, "bf16")
    assert torch.equal(moments.m, grad.bfloat16())
    assert torch.equal(moments.v, (grad * grad).bfloat16())
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3.0e38])
    assert torch.equal(stored(backend, ties, "bf16").m, ties.bfloat16())


@every_state
def test_moments_take_the_bytes_they_promise(states):
    n = 40 * BLOCK
    moments = Moments.zeros(n, states)
    assert moments.states == states
    assert moments.nbytes / n == {"fp32": 8, "bf16": 4, "int8": 2 + 8 / BLOCK}[states]
    assert all((x == 0).all() for x in ops.moments_to_float(moments))
    assert Moments.zeros(1, "int8").m_scale.numel() == 1


@every_grid
@both_backends
def test_an_empty_shard_is_a_shard(grid, backend):
    none = torch.empty(0)
    codes = torch.empty(0, dtype=torch.uint8)
    place = {"grid": grid, "first_block": 5, "blocks_per_scale": 1}
    moments = Moments.zeros(0, "int8")
    flips = backend.adamw_codes_(codes, torch.ones(3), none, moments, now=step(), tensor=0, **place)
    assert flips.tolist() == [0]
    assert backend.decode(codes, torch.ones(3), out=none, **place).numel() == 0


# ---- the contract


def call(**changes):
    grid = GRIDS["ternary"]
    arguments = {
        "codes": torch.zeros(2 * grid.bytes_per_block, dtype=torch.uint8),
        "scale": torch.ones(1),
        "grad": torch.zeros(2 * BLOCK),
        "moments": Moments.zeros(2 * BLOCK, "int8"),
        "grid": grid,
        "now": step(),
        "tensor": 0,
        "first_block": 0,
        "blocks_per_scale": 2,
    } | changes
    return ops.adamw_codes_(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(128)}, "codes is torch.float32"),
        ({"codes": torch.zeros(127, dtype=torch.uint8)}, "codes has 127 bytes"),
        ({"codes": torch.zeros(256, dtype=torch.uint8)[::2]}, "contiguous"),
        ({"grad": torch.zeros(500)}, "whole blocks of 256"),
        ({"grad": torch.zeros(512, dtype=torch.float16)}, "grad is torch.float16"),
        ({"scale": torch.ones(1, dtype=torch.float64)}, "scale is torch.float64"),
        ({"first_block": 1}, "needs scale number 1, but there are 1"),
        ({"first_block": -1}, "first_block is -1"),
        ({"blocks_per_scale": 0}, "blocks_per_scale 0"),
        ({"tensor": 2**32}, "tensor is 4294967296"),
        ({"moments": Moments.zeros(256, "int8")}, "moments.m has 256 elements; 512"),
        ({"moments": Moments(torch.zeros(512), torch.zeros(512, dtype=torch.bfloat16))}, "both float32"),
        ({"moments": Moments(*Moments.zeros(512, "int8").tensors[:2])}, "need scales"),
        ({"grad": torch.zeros(512, device="meta")}, "one device"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_calls_are_refused_with_the_numbers(changes, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("changes", [{"number": 0}, {"seed": -1}, {"seed": 2**64}], ids=str)
def test_impossible_steps_are_refused(changes):
    with pytest.raises(ValueError, match=r"must be|count from 1"):
        step(**changes)


def test_unknown_states_are_refused():
    with pytest.raises(ValueError, match="int4"):
        Moments.zeros(256, "int4")


def test_weights_and_gradients_must_be_as_many():
    with pytest.raises(ValueError, match="weight has 5 elements and grad 6"):
        ops.adamw_weights_(torch.zeros(5), torch.zeros(6), Moments.zeros(5, "fp32"), now=step())


# ---- building the C source


@pytest.fixture
def fresh_library(monkeypatch, tmp_path):
    """An empty cache, and no library loaded yet; afterwards the usual one is."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    cpu._library.cache_clear()
    yield tmp_path / "code"
    cpu._library.cache_clear()


def one_step_by_dispatch():
    grid = GRIDS["int3"]
    codes, moments = random_codes(grid, 5), Moments.zeros(5 * BLOCK, "int8")
    place = {"tensor": 1, "first_block": 0, "blocks_per_scale": 10**9}
    grad = heavy_tailed_grad(5 * BLOCK, 1)
    flips = ops.adamw_codes_(codes, torch.tensor([0.01]), grad, moments, grid=grid, now=step(), **place)
    return codes, flips, ops.unpack(codes, grid=grid), ops.code_counts(codes, grid=grid), *moments.tensors


def test_without_a_compiler_the_bytes_are_the_same_and_one_warning_says_so(
    fresh_library, monkeypatch, caplog
):
    expected = one_step_by_dispatch()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    cpu._library.cache_clear()
    with caplog.at_level(logging.WARNING):
        actual = one_step_by_dispatch()
        one_step_by_dispatch()
    assert not cpu.available()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    (record,) = caplog.records
    assert "no C compiler" in record.getMessage() and "times slower" in record.getMessage()


def test_a_compiler_that_fails_is_named_in_the_warning(fresh_library, monkeypatch, caplog, tmp_path):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert not cpu.available()
    assert "broken-cc" in caplog.text and "no such header" in caplog.text
    assert list(fresh_library.iterdir()) == []


@needs_compiler
def test_the_library_is_built_once_into_a_private_folder(fresh_library):
    assert cpu.available()
    (built,) = fresh_library.iterdir()
    assert stat.S_IMODE(fresh_library.stat().st_mode) == 0o700
    before = built.stat()
    cpu._library.cache_clear()
    assert cpu.available()
    assert [path.stat().st_ino for path in fresh_library.iterdir()] == [before.st_ino]


@needs_compiler
def test_a_damaged_library_is_built_anew(fresh_library):
    compiler = cpu._compiler()
    fresh_library.mkdir(mode=0o700)
    path = fresh_library / f"cpu-{cpu._fingerprint(compiler)}.so"
    path.write_bytes(b"not a library")
    path.chmod(0o700)
    assert cpu.available()
    assert path.stat().st_size > 1000


@needs_compiler
def test_a_folder_that_others_can_write_to_is_not_trusted(fresh_library):
    fresh_library.mkdir()
    fresh_library.chmod(0o777)
    planted = fresh_library / f"cpu-{cpu._fingerprint(cpu._compiler())}.so"
    planted.write_bytes(b"planted by somebody else")
    assert cpu.available(), "it is built elsewhere"
    assert planted.read_bytes() == b"planted by somebody else"
    assert [path.name for path in fresh_library.iterdir()] == [planted.name]


@needs_compiler
def test_workers_that_start_at_once_do_not_disturb_each_other(fresh_library):
    compiler = cpu._compiler()
    with ThreadPoolExecutor(3) as pool:
        libraries = list(pool.map(cpu._open, [compiler] * 3))
    assert all(library.lowbit_pack for library in libraries)
    assert len(os.listdir(fresh_library)) == 1


@needs_compiler
@pytest.mark.parametrize("tuning", [[], ["-march=x86-64-v3"], ["-march=native", "-fopenmp"]], ids=str)
def test_code_for_other_cpus_gives_the_same_bytes(fresh_library, monkeypatch, tuning):
    """With the baseline's vector extensions only, with AVX2, and with all that this machine has."""
    if "-march=x86-64-v3" in tuning and " avx2 " not in cpu._cpu():
        pytest.skip("this CPU has no AVX2")
    monkeypatch.setattr(cpu, "_TUNINGS", [tuning])
    cpu._library.cache_clear()
    assert cpu.available()
    for grid in GRIDS.values():
        expected, actual = random_codes(grid, 9), random_codes(grid, 9)
        expected_moments, actual_moments = Moments.zeros(9 * BLOCK, "int8"), Moments.zeros(9 * BLOCK, "int8")
        place = {"tensor": 1, "first_block": 2**26 - 4, "blocks_per_scale": 10**9}
        for number in (1, 2, 3):
            grad = heavy_tailed_grad(9 * BLOCK, number)
            arguments = {"grid": grid, "now": step(number), **place}
            reference.adamw_codes_(expected, torch.tensor([0.01]), grad, expected_moments, **arguments)
            cpu.adamw_codes_(actual, torch.tensor([0.01]), grad, actual_moments, **arguments)
        assert torch.equal(actual, expected)
        assert_same(actual_moments, expected_moments)
