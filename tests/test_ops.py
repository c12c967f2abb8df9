"""What the ops mean: against mathematics in float64 and numpy, whatever the backend; and what they refuse."""

import math

import numpy as np
import pytest
import torch
from op_cases import (
    GRANULARITIES,
    RULES,
    Momentum,
    assert_equal,
    assert_equal_state,
    copy_of,
    generator,
    heavy_tailed_grad,
    now,
    random_codes,
    random_levels,
    used_state,
    zeros,
)

from lowbit_dist import ops
from lowbit_dist.grid import BLOCK, GRIDS
from lowbit_dist.ops import Codes, Now, Stored, Weights, cpu, fused, reference, rng
from lowbit_dist.optim import AdamW, Lion

needs_compiler = pytest.mark.skipif(not cpu.available(), reason="no C compiler")
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
every_state = pytest.mark.parametrize("states", ops.STATES)
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
every_granularity = pytest.mark.parametrize("scale_every", GRANULARITIES.values(), ids=GRANULARITIES.keys())
both_backends = pytest.mark.parametrize(
    "backend", [reference, pytest.param(cpu, marks=needs_compiler)], ids=["reference", "c"]
)


@every_grid
@both_backends
@pytest.mark.parametrize("n_blocks", [0, 1, 3, 37, 700])
def test_packing_round_trips(grid, backend, n_blocks):
    levels = random_levels(grid, n_blocks, seed=3)
    codes = backend.pack(levels, grid=grid)
    assert codes.dtype == torch.uint8 and len(codes) == n_blocks * grid.bytes_per_block
    assert torch.equal(backend.unpack(codes, grid=grid), levels)
    assert torch.equal(codes, reference.pack(levels, grid=grid))


@every_grid
def test_each_element_has_the_bits_that_the_layout_names(grid):
    """The layout of grid.py, read element by element."""
    codes = random_codes(grid, 2).codes
    levels = reference.unpack(codes, grid=grid)
    for element in range(2 * BLOCK):
        block, j = divmod(element, BLOCK)
        of_block = codes[block * grid.bytes_per_block :].tolist()
        if grid.bits == 8:
            code = of_block[j]
        elif grid.bits in (4, 6):
            code = of_block[j % 128] >> 4 * (j // 128) & 15
            if grid.bits == 6:
                code |= (of_block[128 + j % 64] >> 2 * (j // 64) & 3) << 4
        else:
            code = of_block[j % 64] >> 2 * (j // 64) & 3
            if grid.bits == 3:
                code |= (of_block[64 + j % 32] >> j // 32 & 1) << 2
        assert levels[element] == code + grid.low


@every_grid
@both_backends
def test_code_counts_are_the_histogram_of_the_levels(grid, backend):
    codes = random_codes(grid, 37).codes
    counts = backend.code_counts(codes, grid=grid)
    assert counts.tolist() == [
        int((reference.unpack(codes, grid=grid) == level).sum()) for level in range(grid.low, grid.high + 1)
    ]


def scale_of_elements(scale, n, first_block, scale_every):
    """Element by element, as the contract says it: [n] float32."""
    element = np.arange(first_block * BLOCK, first_block * BLOCK + n)
    return scale.numpy()[element // scale_every]


@every_grid
@both_backends
@every_granularity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_decoding_is_the_rounded_product_of_scale_and_level(grid, backend, scale_every, dtype):
    codes = random_codes(grid, 200, scale_every, first_block=75)
    out = torch.empty(200 * BLOCK, dtype=dtype)
    result = backend.decode(
        codes.codes, codes.scale, grid=grid, first_block=75, scale_every=scale_every, out=out
    )
    levels = reference.unpack(codes.codes, grid=grid).numpy()
    # A product of a float32 and a short integer is exact in float64, so this rounds once, as IEEE says.
    exact = scale_of_elements(codes.scale, len(out), 75, scale_every).astype(np.float64) * levels
    assert result is out
    assert torch.equal(out, torch.from_numpy(exact.astype(np.float32)).to(dtype))


@every_grid
def test_quantizing_takes_the_nearest_level_and_the_even_one_of_two(grid):
    weight = torch.linspace(1.3 * grid.low, 1.3 * grid.high + 1, BLOCK - 8).repeat(2)
    ties = torch.tensor([-2.5, -1.5, -0.5, -0.0, 0.0, 0.5, 1.5, 2.5]).repeat(2)
    weight = torch.cat([weight, ties])
    # Powers of two, so that the products below are exact; a row of 192 ends inside each block.
    scale = torch.tensor([0.25, 0.5, 2.0])
    rows = weight * torch.from_numpy(scale_of_elements(scale, 2 * BLOCK, 0, 192))
    codes = ops.encode(rows, scale, grid=grid, scale_every=192)
    levels = ops.unpack(codes, grid=grid)
    assert np.array_equal(levels.numpy(), np.clip(np.rint(weight.double().numpy()), grid.low, grid.high))
    # A later shard has the scales of its own rows.
    later = ops.encode(rows[BLOCK:], scale, grid=grid, first_block=1, scale_every=192)
    assert torch.equal(later, codes[grid.bytes_per_block :])


def rounded(backend, d, grid=GRIDS["int8"], level=0, n_blocks=64, **changes):
    """The levels that a step of `d` levels makes of `level`: [n_blocks, BLOCK] int8."""
    place = {"seed": 0, "step": 1, "tensor": 7, "first_block": 0} | changes
    n = n_blocks * BLOCK
    codes = reference.pack(torch.full((n,), level, dtype=torch.int8), grid=grid)
    target = Codes(codes, torch.ones(1), n + 2**40, grid, place["tensor"], place["first_block"])
    numbers = Now(lr=abs(d), weight_decay=0.0, step=place["step"], seed=place["seed"])
    backend.apply_(target, torch.full((n,), math.copysign(1.0, -d)), now=numbers)
    return reference.unpack(codes, grid=grid).view(n_blocks, BLOCK)


def fastest():
    return cpu if cpu.available() else reference


@both_backends
@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"seed": 1 << 40}, {"step": 2}, {"tensor": 8}, {"first_block": 1}], ids=str
)
def test_another_seed_step_tensor_or_place_draws_other_bits(backend, change):
    assert not torch.equal(rounded(backend, 0.5), rounded(backend, 0.5, **change))


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


def rounded_in_numpy(target, u, numbers):
    """The rounding that reference.py describes, element by element in numpy's float32: [N] int8."""
    f = np.float32
    n, grid = target.numel, target.grid
    scale = scale_of_elements(target.scale, n, target.first_block, target.scale_every)
    level = reference.unpack(target.codes, grid=grid).numpy().astype(np.int64)
    d = -((f(numbers.lr) / scale) * u.numpy()) - f(numbers.decay) * level.astype(f)
    a = np.minimum(np.abs(d), f(65536))
    whole = np.floor(a)
    words = rng.block_words(
        numbers.seed,
        step=numbers.step,
        tensor=target.tensor,
        first_block=target.first_block,
        n_blocks=n // BLOCK,
    )
    size = whole.astype(np.int64) + (words.view(-1).numpy() < ((a - whole) * f(2**32)).astype(np.int64))
    return np.clip(level + np.where(d < 0, -size, size), grid.low, grid.high)


@every_grid
@both_backends
@every_granularity
def test_a_direction_moves_codes_as_the_rounding_says(grid, backend, scale_every):
    target = random_codes(grid, 140, scale_every)  # more than a chunk of the reference
    before = reference.unpack(target.codes, grid=grid).numpy()
    for number in (1, 2):
        u = torch.randn(target.numel, generator=generator(number)) * 5
        u[::7] *= 1e4
        expected = rounded_in_numpy(target, u, now(number))
        flips = backend.apply_(target, u, now=now(number))
        levels = reference.unpack(target.codes, grid=grid).numpy()
        assert np.array_equal(levels, expected)
        assert flips.item() == (levels != before).sum() > 0
        before = levels


@both_backends
@pytest.mark.parametrize("n", [1, 255, 256, 999, 40_000])
def test_a_direction_moves_weights_by_the_learning_rate_and_their_decay(backend, n):
    weight, u = (torch.randn(n, generator=generator(seed)) for seed in (1, 2))
    f = np.float32
    expected = weight.numpy() * f(1 - 3e-3 * 0.1) - u.numpy() * f(3e-3)
    flips = backend.apply_(Weights(weight), u, now=now())
    assert np.array_equal(weight.numpy(), expected)
    assert flips.tolist() == [0]


@every_rule
@every_state
@every_grid
@both_backends
def test_a_direction_is_the_last_half_of_a_step(rule, states, grid, backend):
    target, other = random_codes(grid, 9, 576), random_codes(grid, 9, 576)
    weight = torch.randn(999, generator=generator(1))
    other_weight = weight.clone()
    grad = heavy_tailed_grad(9 * BLOCK, 4, torch.bfloat16)
    state = used_state(rule, 9 * BLOCK, states)
    expected_state, of_weights = copy_of(state), used_state(rule, 999, states)

    expected = backend.step_(target, grad, expected_state, rule=rule, now=now(4))
    u = reference.direction(grad, state, 0, 9 * BLOCK, rule=rule, now=now(4))
    assert_equal(backend.apply_(other, u, now=now(4)), expected)
    assert_equal(other.codes, target.codes)
    assert_equal_state(state, expected_state)

    u = reference.direction(grad[:999], copy_of(of_weights), 0, 999, rule=rule, now=now(4))
    backend.step_(Weights(weight), grad[:999], of_weights, rule=rule, now=now(4))
    backend.apply_(Weights(other_weight), u, now=now(4))
    assert_equal(other_weight, weight)


def adamw_in_float64(g, m, v, step):
    """arXiv 1711.05101, algorithm 2, lines 7 to 12."""
    m, v = 0.9 * m + (1 - 0.9) * g, 0.95 * v + (1 - 0.95) * g * g
    return (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8), m, v


def lion_in_float64(g, m, step):
    """arXiv 2302.06675, algorithm 2."""
    c = 0.9 * m + (1 - 0.9) * g
    return np.sign(c), 0.99 * m + (1 - 0.99) * g


@both_backends
@every_grid
@pytest.mark.parametrize("name", RULES)
def test_one_update_agrees_with_the_paper_and_its_rounding_in_float64(name, grid, backend):
    """The rule, and stochastic rounding to the grid (DQT, arXiv:2412.04787), transcribed in numpy.

    All blocks hold the same 256 cases: the share of each level among the blocks is compared with its
    probability.
    """
    n_blocks, rule = 4000, RULES[name]
    paper = {"adamw": adamw_in_float64, "lion": lion_in_float64}[name]
    numbers = now(7, lr=0.02, weight_decay=0.3, grad_scale=0.5)
    scale = torch.tensor([0.03 if grid.bits < 8 else 0.004])
    level = random_levels(grid, 1, seed=1)
    grad, m = (torch.randn(BLOCK, generator=generator(seed)) * 1e-3 for seed in (2, 3))
    slots = (m, torch.rand(BLOCK, generator=generator(4)) * 1e-6)[: len(rule.slots)]

    state = [Stored(slot, x.repeat(n_blocks)) for slot, x in zip(rule.slots, slots, strict=True)]
    target = Codes(reference.pack(level.repeat(n_blocks), grid=grid), scale, 2**40, grid, 2, 5)
    backend.step_(target, grad.repeat(n_blocks), state, rule=rule, now=numbers)
    observed = reference.unpack(target.codes, grid=grid).view(n_blocks, BLOCK).numpy()

    w = (scale.double() * level).numpy()
    u, *moved = paper(grad.double().numpy() * 0.5, *(x.double().numpy() for x in slots), 7)
    w = w - numbers.lr * (u + numbers.weight_decay * w)
    levels = w / scale.item()

    for stored, expected in zip(state, moved, strict=True):
        assert np.allclose(
            stored.values[:BLOCK].numpy(), expected, rtol=1e-5, atol=1e-16 + 1e-10 * stored.slot.signed
        )
        assert torch.equal(stored.values.view(n_blocks, BLOCK), stored.values[:BLOCK].expand(n_blocks, BLOCK))

    probability = np.zeros((grid.n_levels, BLOCK))
    below = np.floor(levels)
    for end, share in ((below, 1 - (levels - below)), (below + 1, levels - below)):
        index = np.clip(end, grid.low, grid.high).astype(int) - grid.low
        probability[index, np.arange(BLOCK)] += share
    share = np.stack([(observed == k).mean(axis=0) for k in range(grid.low, grid.high + 1)])
    # 1e-5: float32 arithmetic of d. 3 / n_blocks: where a handful is expected the counts are not Gaussian.
    bound = 5 * np.sqrt(probability * (1 - probability) / n_blocks) + 3 / n_blocks + 1e-5 * (1 + abs(levels))
    assert (abs(share - probability) < bound)[probability > 0].all()
    certain = probability > 1 - 1e-9
    assert (share[certain] == 1).all()
    impossible = (probability == 0) & (abs(levels - np.rint(levels)) > 1e-3)
    assert (share[impossible] == 0).all()
    assert ((probability > 0.05) & (probability < 0.95)).any() and certain.any(), "it must test both kinds"


@both_backends
def test_weights_follow_the_adamw_of_torch(backend):
    n = 999
    weight = torch.randn(n, generator=generator(1))
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    rule = RULES["adamw"]
    state = zeros(rule, n, "fp32")
    for number in range(1, 21):
        grad = heavy_tailed_grad(n, number)
        parameter.grad = grad.clone()
        optimizer.step()
        backend.step_(Weights(weight), grad, state, rule=rule, now=now(number, grad_scale=1.0))
    torch.testing.assert_close(weight, parameter.detach(), rtol=1e-5, atol=1e-6)
    assert (weight - torch.randn(n, generator=generator(1))).abs().max() > 0.01, "the weights must have moved"


@both_backends
def test_weights_follow_the_lion_of_its_paper(backend):
    n, rule = 999, RULES["lion"]
    weight = torch.randn(n, generator=generator(1))
    before, expected, m = weight.clone(), weight.double().numpy(), np.zeros(n)
    state = zeros(rule, n, "fp32")
    for number in range(1, 21):
        grad = heavy_tailed_grad(n, number)
        u, m = lion_in_float64(grad.double().numpy(), m, number)
        expected = expected - 3e-3 * (u + 0.1 * expected)
        backend.step_(Weights(weight), grad, state, rule=rule, now=now(number, grad_scale=1.0))
        if number == 1:
            still = weight == before * np.float32(1 - 3e-4)
            assert torch.equal(still, grad == 0) and still.any(), "the sign of 0 is 0: only decay moves these"
    assert np.allclose(weight.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert (weight - before).abs().max() > 0.01, "the weights must have moved"


@both_backends
@every_rule
@every_state
def test_the_gradient_scale_multiplies_the_gradient(rule, states, backend):
    n = 999
    results = []
    for grad_scale, factor in ((0.5, 1.0), (1.0, 0.5)):
        weight, state = torch.ones(n), zeros(rule, n, states)
        grad = heavy_tailed_grad(n, 1) * factor
        backend.step_(Weights(weight), grad, state, rule=rule, now=now(grad_scale=grad_scale))
        results.append((weight, *(tensor for slot in state for tensor in slot.tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_rule_from_outside_moves_weights_as_a_plain_loop_does():
    n = 70_000  # some chunks, the last one short
    weight = torch.randn(n, generator=generator(1))
    expected, m = weight.clone(), torch.zeros(n)
    rule = Momentum()
    state = zeros(rule, n, "fp32")
    for number in range(1, 6):
        grad = heavy_tailed_grad(n, number)
        m = m * 0.9 + grad * 0.7
        expected = expected * (1 - 3e-3 * 0.1) - m * 3e-3
        assert ops.step_(Weights(weight), grad, state, rule=rule, now=now(number)).tolist() == [0]
        assert_equal(weight, expected, f"weights after step {number}")
        assert_equal(state[0].values, m, f"momentum after step {number}")


@every_grid
@every_state
def test_a_rule_from_outside_moves_codes_as_a_plain_loop_does(grid, states):
    n_blocks, rule = 140, Momentum()
    target = random_codes(grid, n_blocks, 896)
    state, m = zeros(rule, target.numel, states), torch.zeros(target.numel)
    for number in range(1, 4):
        grad = torch.randn(target.numel, generator=generator(number)).bfloat16()
        m = m * 0.9 + grad.float() * 0.7
        expected = rounded_in_numpy(target, m, now(number))
        before = reference.unpack(target.codes, grid=grid).numpy()
        flips = ops.step_(target, grad, state, rule=rule, now=now(number))
        assert np.array_equal(reference.unpack(target.codes, grid=grid).numpy(), expected)
        assert flips.item() == (expected != before).sum() > 0
        kept = zeros(rule, target.numel, states)
        kept[0].store(0, target.numel, m)
        assert_equal_state(state, kept)
        m = state[0].load(0, target.numel).clone()


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_a_rule_that_sees_more_than_elements_is_sent_to_apply(scope):
    rule = Momentum()
    rule.scope = scope
    with pytest.raises(ValueError, match=rf"Momentum sees a whole {scope} at once.*ops\.apply_"):
        ops.step_(Weights(torch.zeros(5)), torch.zeros(5), zeros(rule, 5, "fp32"), rule=rule, now=now())


@pytest.mark.parametrize(
    "update",
    [
        lambda g, m, step: m,
        lambda g, m, step: (m,),
        lambda g, m, step: (m, m, m),
        lambda g, m, step: (m[1:], m),
        lambda g, m, step: (m, m.double()),
    ],
    ids=["a tensor", "no slots", "too many slots", "another shape", "another precision"],
)
def test_a_rule_that_gives_something_else_is_named_with_what_it_gave(update):
    rule = Momentum()
    rule.update = update
    with pytest.raises(ValueError, match=r"Momentum\.update gave .*it must give a direction and 1 slot"):
        ops.step_(Weights(torch.zeros(5)), torch.zeros(5), zeros(rule, 5, "fp32"), rule=rule, now=now())


@every_grid
@both_backends
def test_an_empty_shard_is_a_shard(grid, backend):
    none, rule = torch.empty(0), RULES["adamw"]
    target = Codes(torch.empty(0, dtype=torch.uint8), torch.ones(3), 64, grid, 0, 5)
    assert backend.step_(target, none, zeros(rule, 0, "int8"), rule=rule, now=now()).tolist() == [0]
    assert backend.step_(Weights(none), none, zeros(rule, 0, "int8"), rule=rule, now=now()).tolist() == [0]
    assert backend.apply_(target, none, now=now()).tolist() == [0]
    place = {"grid": grid, "first_block": 5, "scale_every": 64}
    assert backend.decode(target.codes, torch.ones(3), out=none, **place).numel() == 0


def call(**changes):
    grid = GRIDS["ternary"]
    place = {
        "codes": torch.zeros(2 * grid.bytes_per_block, dtype=torch.uint8),
        "scale": torch.ones(1),
        "scale_every": 2 * BLOCK,
        "grid": grid,
        "tensor": 0,
        "first_block": 0,
    }
    target = Codes(**{name: changes.pop(name, value) for name, value in place.items()})
    rule = changes.pop("rule", RULES["adamw"])
    arguments = {"grad": torch.zeros(2 * BLOCK), "state": zeros(rule, 2 * BLOCK, "int8")} | changes
    ops.apply_(target, arguments["grad"].float(), now=now())
    return ops.step_(target, **arguments, rule=rule, now=now())


def adamw_state(n=512, states="int8", **changes):
    m, v = zeros(RULES["adamw"], n, states)
    return [Stored(**(vars(m) | changes)), v]


def fused_as(name):
    rule = Momentum()
    rule.fused = name
    return rule


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(128)}, "codes is torch.float32"),
        ({"codes": torch.zeros(127, dtype=torch.uint8)}, "codes has 127 bytes"),
        ({"codes": torch.zeros(256, dtype=torch.uint8)[::2]}, "contiguous"),
        ({"grad": torch.zeros(500)}, "whole blocks of 256"),
        ({"grad": torch.zeros(512, dtype=torch.float16)}, "grad is torch.float16"),
        ({"scale": torch.ones(1, dtype=torch.float64)}, "scale is torch.float64"),
        ({"first_block": 1}, "element 767 needs scale number 1, but there are 1"),
        ({"scale_every": 320}, "element 511 needs scale number 1, but there are 1"),
        ({"first_block": -1}, "first_block is -1"),
        ({"scale_every": 0}, "scale_every 0"),
        ({"scale_every": 96, "scale": torch.ones(9)}, "scale_every 96; .* a multiple of 64"),
        ({"tensor": 2**32}, "tensor is 4294967296"),
        ({"state": zeros(RULES["adamw"], 256, "int8")}, "slot m has 256 elements; 512"),
        ({"state": []}, r"state has no slots; AdamW has the slots m \(signed\), v \(unsigned\)"),
        ({"state": zeros(RULES["lion"], 512, "int8")}, r"state has the slots m \(signed\); AdamW has"),
        ({"rule": RULES["lion"], "state": zeros(RULES["adamw"], 512, "int8")}, "Lion has the slots m"),
        (
            {"state": [*zeros(RULES["lion"], 512, "fp32"), adamw_state()[1]]},
            "kept in int8 and slot m in fp32",
        ),
        ({"state": adamw_state(values=torch.zeros(512, dtype=torch.uint8))}, "slot m is torch.uint8"),
        ({"state": adamw_state(scale=None)}, "slot m of torch.int8 needs scales"),
        (
            {"state": adamw_state(states="fp32", scale=torch.zeros(2))},
            "slot m of torch.float32 has no scales",
        ),
        (
            {"state": adamw_state(scale=torch.zeros(3))},
            "the scale of slot m has 3 elements; 512 weights take 2",
        ),
        ({"rule": fused_as("sgd")}, "Momentum says that it is fused as 'sgd', which is none of adamw, lion"),
        ({"rule": fused_as("adamw")}, "other slots; a rule without a kernel has fused = None"),
        ({"grad": torch.zeros(512, device="meta")}, "one device"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_calls_are_refused_with_the_numbers(changes, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_a_direction_is_float32_and_as_long_as_what_it_moves():
    with pytest.raises(ValueError, match=r"u is torch\.bfloat16"):
        ops.apply_(Weights(torch.zeros(5)), torch.zeros(5, dtype=torch.bfloat16), now=now())
    with pytest.raises(ValueError, match="weight has 5 elements and u 6"):
        ops.apply_(Weights(torch.zeros(5)), torch.zeros(6), now=now())


def test_weights_and_gradients_must_be_as_many():
    rule = RULES["adamw"]
    with pytest.raises(ValueError, match="weight has 5 elements and grad 6"):
        ops.step_(Weights(torch.zeros(5)), torch.zeros(6), zeros(rule, 5, "fp32"), rule=rule, now=now())


@pytest.mark.parametrize("changes", [{"number": 0}, {"seed": -1}, {"seed": 2**64}], ids=str)
def test_impossible_steps_are_refused(changes):
    with pytest.raises(ValueError, match=r"must be|count from 1"):
        now(**changes)


def test_the_rules_of_this_package_have_a_kernel_each():
    """Their slots are those that the kernels move; what they compute is compared in test_backends.py."""
    assert {rule.fused: tuple(slot.signed for slot in rule.slots) for rule in (AdamW, Lion)} == fused.SLOTS
    assert list(fused.RULES) == [*fused.SLOTS, None]
