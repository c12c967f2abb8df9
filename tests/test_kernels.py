"""The Triton kernels give the reference's bytes: interpreted on the CPU, and on a GPU where there is one.

Without a GPU they are also compiled for sm_90 by the very calls that a GPU would get.
"""

import ctypes
import functools
import multiprocessing
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from op_cases import (
    ACCUMULATORS,
    COMBINATIONS,
    GRANULARITIES,
    RULES,
    assert_equal,
    assert_equal_state,
    copy_of,
    generator,
    heavy_tailed_grad,
    now,
    part,
    random_codes,
    random_residual,
    zeros,
)

from lowbit_dist.grid import BLOCK, GRIDS, Grid
from lowbit_dist.ops import STATES, Codes, Residual, Rule, Weights, reference
from lowbit_dist.optim import AdamW

pytest.importorskip("triton", reason="Triton is not installed: torch built for CPUs alone does not bring it")

import triton
import triton.language as tl
from sass import Cost, cost_of

from lowbit_dist.ops import kernels, native, product_kernels, token_kernels

pytestmark = pytest.mark.integration  # its interpreter and its compiler are other processes
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
every_states = pytest.mark.parametrize("states", STATES)
every_rule = pytest.mark.parametrize("rule", RULES)
UNUSUAL = AdamW(eps=1e-12)
# Some of all combinations of the three stand for the others: every grid, rule and precision is among them.
SHOWN = {
    ("adamw", "fp32", "ternary"),
    ("adamw", "bf16", "int4"),
    ("lion", "int8", "ternary"),
    ("lion", "bf16", "int8"),
}
each_update = pytest.mark.parametrize(
    ("rule", "grid", "states"),
    [
        pytest.param(
            rule, grid, states, id=f"{rule}-{states}-{grid.name}",
            marks=[] if (rule, states) == ("adamw", "int8") or (rule, states, grid.name) in SHOWN
            else [pytest.mark.slow],
        )
        for rule in RULES for states in STATES for grid in GRIDS.values()
    ],
)  # fmt: skip
every_float = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter is on: nothing is compiled")


@functools.cache
def _interpreter() -> ProcessPoolExecutor:
    """A process whose Triton interprets kernels on the CPU, which must be decided before its import."""
    pool = ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        pool.submit(os.getpid).result()
    return pool


def _call(name: str, arguments: dict[str, Any]) -> None:
    globals()[name](**arguments)


def on_each_device(test: Callable[..., None]) -> Callable[..., None]:
    """Run the test once with the interpreter, in its own process, and once on the GPU, if there is one."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        if arguments["device"] == "cpu" and not INTERPRETED:
            _interpreter().submit(_call, test.__name__, arguments).result()
        else:
            test(**arguments)

    no_gpu = pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="there is no CUDA GPU")
    devices = [pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="gpu", marks=no_gpu)]
    return pytest.mark.parametrize("device", devices)(run)


def codes_on(device: str, *arguments: Any, **named: Any) -> Codes:
    codes = random_codes(*arguments, **named)
    return Codes(
        codes.codes.to(device),
        codes.scale.to(device),
        codes.scale_every,
        codes.grid,
        codes.tensor,
        codes.first_block,
    )


def compare_two_shards(
    device: str,
    rule: Rule,
    grid: Grid,
    states: str,
    scale_every: int,
    *,
    n_steps: int,
    dtype: torch.dtype,
    first_block: int,
) -> None:
    """On both sides of the cut, the last program's last blocks are beyond the shard."""
    n_blocks, cut = 13, 11
    place = {"first_block": first_block, "tensor": (1 << 28) | 7}
    theirs, ours = (
        random_codes(grid, n_blocks, scale_every, **place),
        codes_on(device, grid, n_blocks, scale_every, **place),
    )
    state = zeros(rule, n_blocks * BLOCK, states)
    our_state = copy_of(state, device)
    for number in range(1, n_steps + 1):
        gradient = heavy_tailed_grad(n_blocks * BLOCK, number, dtype)
        flips = reference.step_(theirs, gradient, state, rule=rule, now=now(number))
        our_flips = torch.zeros(1, dtype=torch.int64)
        for first, last in ((0, cut), (cut, n_blocks)):
            shard = ours.part(first * BLOCK, last * BLOCK)
            of_shard = gradient[first * BLOCK : last * BLOCK].to(device)
            our_flips += kernels.step_(
                shard, of_shard, part(our_state, first, last), rule=rule, now=now(number)
            ).cpu()
        assert_equal(ours.codes, theirs.codes, f"codes after step {number}")
        assert_equal_state(our_state, state, f"after step {number}")
        assert_equal(our_flips, flips, f"flips in step {number}")
        assert flips > 0, "the case must move some codes"


@on_each_device
@each_update
def test_two_shards_of_codes_equal_the_whole_of_the_reference(
    device: str, rule: str, grid: Grid, states: str
) -> None:
    k = 3 * list(GRIDS).index(grid.name) + STATES.index(states) + 2 * list(RULES).index(rule)
    granularity = list(GRANULARITIES)[k % len(GRANULARITIES)]
    # With one scale the counters pass 2^32 within the tensor.
    first_block = (1 << 26) - 5 if granularity == "tensor" else 5
    n_steps = 20 if states == "int8" and rule == "adamw" else 4
    dtype = (torch.float32, torch.bfloat16)[k % 2]
    compare_two_shards(
        device, RULES[rule], grid, states, GRANULARITIES[granularity],
        n_steps=n_steps, dtype=dtype, first_block=first_block,
    )  # fmt: skip


@on_each_device
@every_grid
@pytest.mark.parametrize("kept", ACCUMULATORS)
def test_residuals_equal_the_reference(device: str, grid: Grid, kept: str) -> None:
    n_blocks, (accumulator, options), rule = 11, ACCUMULATORS[kept], RULES["adamw"]
    scale_every = (2**40, 64, 896, 512, 576, 128)[list(GRIDS).index(grid.name)]
    residual = random_residual(accumulator, n_blocks * BLOCK, generator(0))
    our_residual = Residual(residual.values.to(device, copy=True), accumulator)
    theirs = replace(random_codes(grid, n_blocks, scale_every), residual=residual)
    ours = replace(codes_on(device, grid, n_blocks, scale_every), residual=our_residual)
    state = zeros(rule, n_blocks * BLOCK, "int8")
    our_state, moved = copy_of(state, device), 0
    for number in (1, 2, 3):
        numbers = now(number, lr=0.01, **options)
        gradient = heavy_tailed_grad(n_blocks * BLOCK, number)
        flips = reference.step_(theirs, gradient, state, rule=rule, now=numbers)
        assert_equal(kernels.step_(ours, gradient.to(device), our_state, rule=rule, now=numbers), flips)
        u = torch.randn(n_blocks * BLOCK, generator=generator(number))
        flips += reference.apply_(theirs, u, now=numbers)
        kernels.apply_(ours, u.to(device), now=numbers)
        assert_equal(ours.codes, theirs.codes, f"codes after step {number}")
        assert_equal(our_residual.values, residual.values, f"residuals after step {number}")
        assert_equal_state(our_state, state, f"after step {number}")
        moved += flips.item()
    assert moved > 0


@on_each_device
@every_grid
@pytest.mark.parametrize("nearest", [0.3, 1.0])
def test_rounding_towards_the_nearest_equals_the_reference(device: str, grid: Grid, nearest: float) -> None:
    n_blocks, rule = 11, RULES["adamw"]
    theirs, ours = random_codes(grid, n_blocks, 896), codes_on(device, grid, n_blocks, 896)
    state = zeros(rule, n_blocks * BLOCK, "int8")
    our_state = copy_of(state, device)
    for number in (1, 2, 3):
        numbers = now(number, lr=0.03, nearest=nearest)
        gradient = heavy_tailed_grad(n_blocks * BLOCK, number)
        flips = reference.step_(theirs, gradient, state, rule=rule, now=numbers)
        assert_equal(kernels.step_(ours, gradient.to(device), our_state, rule=rule, now=numbers), flips)
        assert_equal(ours.codes, theirs.codes, f"codes after step {number}")
        assert flips > 0


@on_each_device
def test_an_unusual_eps_changes_nothing(device: str) -> None:
    """It is so small that quotients leave the range in which they are right without guards."""
    compare_two_shards(
        device, UNUSUAL, GRIDS["ternary"], "int8", 10**12, n_steps=2, dtype=torch.bfloat16, first_block=3
    )


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize(("rule", "grid", "states", "granularity"), COMBINATIONS, ids=str)
def test_all_combinations_equal_the_reference(
    device: str, rule: str, grid: str, states: str, granularity: str
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        compare_two_shards(
            device, RULES[rule], GRIDS[grid], states, GRANULARITIES[granularity],
            n_steps=3, dtype=dtype, first_block=3,
        )  # fmt: skip


@on_each_device
@pytest.mark.parametrize(("scale_every", "n_scales"), [(3 * BLOCK, 6), (320, 14)], ids=["blocks", "planes"])
def test_rows_have_their_own_scales_wherever_a_shard_begins(
    device: str, scale_every: int, n_scales: int
) -> None:
    """Scales that differ by much; the shard begins in the middle of a row.

    The steps of one row are beyond all integers: its codes go to the ends of the grid.
    """
    rule, grid, n_blocks, first_block = RULES["adamw"], GRIDS["int4"], 10, 7
    numbers = now(weight_decay=0.0)
    codes = random_codes(grid, n_blocks).codes
    gradient = heavy_tailed_grad(n_blocks * BLOCK, 1)
    state = zeros(rule, n_blocks * BLOCK, "fp32")
    ours, our_state = codes.to(device, copy=True), copy_of(state, device)
    before = reference.unpack(codes, grid=grid)
    scale = torch.tensor([1e30, 1e30, 0.003, 0.1, 1e-30, 0.03, 0.3]).repeat(2)[:n_scales]
    place = (scale_every, grid, 0, first_block)
    reference.step_(Codes(codes, scale, *place), gradient, state, rule=rule, now=numbers)
    kernels.step_(
        Codes(ours, scale.to(device), *place), gradient.to(device), our_state, rule=rule, now=numbers
    )
    assert_equal(ours, codes, "codes")
    element = torch.arange(first_block * BLOCK, (first_block + n_blocks) * BLOCK)
    levels, of_element = reference.unpack(codes, grid=grid), scale[element // scale_every]
    tiny = (of_element == 1e-30) & (gradient.abs() > 1e-9)
    assert set(levels[tiny].tolist()) <= {grid.low, grid.high} and tiny.any()
    assert torch.equal(levels[of_element == 1e30], before[of_element == 1e30])


@on_each_device
@every_rule
@every_states
@pytest.mark.parametrize("n", [1, 999, 1024])
def test_weights_equal_the_reference(device: str, rule: str, states: str, n: int) -> None:
    of_rule = RULES[rule]
    weight = torch.randn(n, generator=generator(n))
    state = zeros(of_rule, n, states)
    ours, our_state, before = weight.to(device, copy=True), copy_of(state, device), weight.clone()
    for number in range(1, 21 if n == 999 else 4):
        gradient = heavy_tailed_grad(n, number, (torch.float32, torch.bfloat16)[number % 2])
        flips = kernels.step_(Weights(ours), gradient.to(device), our_state, rule=of_rule, now=now(number))
        reference.step_(Weights(weight), gradient, state, rule=of_rule, now=now(number))
        assert_equal(ours, weight, f"weights after step {number}")
        assert_equal_state(our_state, state, f"after step {number}")
        assert flips.tolist() == [0]
    assert not torch.equal(before, weight)


@on_each_device
@every_grid
def test_directions_that_are_given_move_codes_and_weights_as_the_reference_says(
    device: str, grid: Grid
) -> None:
    scale_every = (2**40, 64, 896, 512, 576, 128)[list(GRIDS).index(grid.name)]
    theirs, ours = random_codes(grid, 11, scale_every), codes_on(device, grid, 11, scale_every)
    weight = torch.randn(999, generator=generator(1))
    our_weight = weight.to(device, copy=True)
    for number in (1, 2):
        u = torch.randn(11 * BLOCK, generator=generator(number)) * 5
        flips = reference.apply_(theirs, u, now=now(number))
        assert_equal(kernels.apply_(ours, u.to(device), now=now(number)), flips, "flips")
        assert_equal(ours.codes, theirs.codes, "codes")
        assert flips > 0
        reference.apply_(Weights(weight), u[:999], now=now(number))
        kernels.apply_(Weights(our_weight), u[:999].to(device), now=now(number))
        assert_equal(our_weight, weight, "weights")


@on_each_device
@pytest.mark.parametrize("error", [0.0, 1e-6, -1e-6])
def test_8_bit_slots_round_exactly_at_their_thresholds(device: str, error: float) -> None:
    """Though the root behind the first guess be inexact, as a GPU's is: the interpreter's is given an error.

    With both betas 0 the slots are g and g * g; the largest of each block makes its scale 1.
    """

    def inexact(x: Any) -> Any:
        return tl.math.sqrt(x) * (1 + error)

    rule = AdamW(betas=(0.0, 0.0))
    k = torch.arange(1, 256).float()
    at = (k - 0.5) ** 2  # thresholds of m; their squares are those of v
    below = torch.nextafter(at, torch.zeros(()))
    for gradient, expected_m, expected_v in (
        (torch.cat([at[:127], -below[:127], torch.tensor([127.0**2, 0])]), (k[:127], 1 - k[:127]), None),
        (torch.cat([at, torch.tensor([255.0**2])]), None, k),
        (torch.cat([below, torch.tensor([255.0**2])]), None, (k - 1).clamp(min=1)),
    ):
        m, v = zeros(rule, BLOCK, "int8", device)
        weights = Weights(torch.zeros(BLOCK, device=device))
        with mock.patch.object(tl, "sqrt", inexact) if device == "cpu" else nullcontext():
            kernels.step_(weights, gradient.to(device), [m, v], rule=rule, now=now(grad_scale=1.0))
        if expected_m is not None:
            assert_equal(m.values[:254], torch.cat(expected_m).to(torch.int8), "m")
        if expected_v is not None:
            assert_equal(v.values[:255], expected_v.to(torch.uint8), "v")
            assert v.values[255] == 255


@triton.jit
def _near_roots(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + at, tl.rsqrt(tl.load(x_ptr + at)))


@functools.cache
def quotients() -> ctypes.CDLL:
    """quotients.c, compiled."""
    if (compiler := native._compiler()) is None:
        pytest.skip("there is no C compiler")
    options = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(__file__).with_name("quotients.c"), Path(folder, "quotients.so")
        subprocess.run([compiler, *options, source, "-o", library, "-lm"], check=True)
        opened = ctypes.CDLL(str(library))
    for name in ("wrong_roots", "wrong_quotients", "wrong_values"):
        getattr(opened, name).restype = ctypes.c_int64
    return opened


ONE_TO_FOUR = torch.arange(0x3F800000, 0x40800000, dtype=torch.int32).view(torch.float32)  # all floats
ONE_TO_TWO = ONE_TO_FOUR[: 1 << 23]


@on_each_device
def test_roots_and_quotients_without_guards_are_correctly_rounded(device: str) -> None:
    """For every mantissa of either, with the approximate roots of this device."""
    for wrong, x in (("wrong_roots", ONE_TO_FOUR), ("wrong_quotients", ONE_TO_TWO * ONE_TO_TWO)):
        near, n = torch.empty_like(x, device=device), 1 << (20 if device == "cpu" else 10)
        _near_roots[(x.numel() // n,)](x.to(device), near, N=n)
        near = near.cpu()
        assert getattr(quotients(), wrong)(ctypes.c_void_p(near.data_ptr())) == 0, wrong


@pytest.mark.parametrize("off", range(-2, 3))
def test_quotients_without_guards_are_correctly_rounded_for_any_root_that_ptx_allows(off: int) -> None:
    """Its error, 2^-22.9, is two units in the last place."""
    near = (1 / ONE_TO_TWO.double()).float().view(torch.int32).add(off).view(torch.float32)
    assert quotients().wrong_quotients(ctypes.c_void_p(near.data_ptr())) == 0


def test_values_of_rounded_tokens_are_correctly_rounded() -> None:
    assert quotients().wrong_values() == 0


@pytest.mark.parametrize("divisor", [np.float32(127**2), np.float32(255**4)])
def test_scales_of_blocks_are_correctly_rounded_without_a_division(divisor: np.float32) -> None:
    """For every mantissa, and where scales begin to be usable, in the steps of block_scale()."""
    inverse, one = np.float32(1 / np.longdouble(divisor)), np.float32(1).view(np.int32)
    smallest = (np.float32(2.0**-126) * divisor).view(np.int32)
    for first in (one, smallest - (1 << 21)):
        x = np.arange(first, first + (1 << 23), dtype=np.int32).view(np.float32)
        scale = x * inverse
        rest = (x - np.longdouble(divisor) * scale).astype(np.float32)
        scale = (scale + rest * np.longdouble(inverse)).astype(np.float32)
        usable = (scale >= 2.0**-126) | (x / divisor >= 2.0**-126)
        assert usable.any() and np.array_equal(scale[usable], (x / divisor)[usable])


@on_each_device
@every_grid
@every_float
def test_decoded_weights_equal_the_reference(device: str, grid: Grid, dtype: torch.dtype) -> None:
    n_blocks, first_block = 11, 5
    codes = random_codes(grid, n_blocks).codes
    # One row so small that its weights are subnormal, in bfloat16 too.
    for scale, scale_every in (
        (torch.tensor([3.0, 0.3, 0.017, 1e-39]), 4 * BLOCK),
        (torch.tensor([3.0, 0.3, 0.017, 1e-39, 2.0]), 896),
        (torch.rand(64, generator=generator(1)), 64),
        (torch.tensor([0.7]), 2**40),
    ):
        out = torch.full((n_blocks * BLOCK,), torch.nan, dtype=dtype)
        our_out = out.to(device, copy=True)
        same: dict[str, Any] = {"grid": grid, "first_block": first_block, "scale_every": scale_every}
        reference.decode(codes, scale, out=out, **same)
        returned = kernels.decode(codes.to(device), scale.to(device), out=our_out, **same)
        assert returned is our_out
        assert_equal(our_out, out, f"weights with a scale for each {scale_every}")


@on_each_device
@every_float
@pytest.mark.parametrize("k", [1, 77, 512, 5000])
def test_tokens_are_rounded_as_the_reference_does(device: str, dtype: torch.dtype, k: int) -> None:
    """Of all sizes, with ties and zeros, and some that are not finite."""
    x = torch.randn(9, k, generator=generator(k)) * torch.logspace(-8, 37, 9)[:, None]
    x[1], x[2], x[3] = torch.arange(k) / 2 - k // 4, 1e-40, -0.0
    x[4, k // 2], x[5, k // 3] = torch.nan, -torch.inf
    x = x.to(dtype)
    for bits in (8, 4):
        expected, actual = reference.round_tokens(x, bits), kernels.round_tokens(x.to(device), bits)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_equal(ours.nan_to_num(-1.0), theirs.nan_to_num(-1.0), f"{bits} bits")
        for of in (torch.float32, torch.bfloat16):
            values = kernels.token_values(*actual, of)
            if of == dtype:
                at_once = kernels.rounded_tokens(x.to(device), bits)
                for ours, theirs in zip(at_once, (*actual, values), strict=True):
                    assert_equal(ours.nan_to_num(-1.0), theirs.cpu().nan_to_num(-1.0), "at once")
            wanted = reference.token_values(*expected, of)
            assert_equal(values.nan_to_num(-1.0), wanted.nan_to_num(-1.0), f"values in {of}")
            assert values[4:6].isnan().all() and not values[:4].isnan().any()
    small = torch.where(x.isfinite(), x, 0) * 1e-30
    for theirs, ours in zip(
        reference.round_tokens(small, 8, 1e-30), kernels.round_tokens(small.to(device), 8, 1e-30), strict=True
    ):
        assert_equal(ours, theirs, "gradients")
    assert [t.numel() for t in kernels.round_tokens(x[:0].to(device))] == [0, 0]


@on_each_device
@every_grid
def test_levels_equal_the_reference(device: str, grid: Grid) -> None:
    codes = random_codes(grid, 19).codes
    assert_equal(kernels.unpack(codes.to(device), grid=grid), reference.unpack(codes, grid=grid), "levels")
    assert kernels.unpack(codes[:0].to(device), grid=grid).numel() == 0
    counts = reference.code_counts(codes, grid=grid)
    assert_equal(kernels.code_counts(codes.to(device), grid=grid), counts, "counts")
    assert not kernels.code_counts(codes[:0].to(device), grid=grid).any()


@on_each_device
@every_float
@pytest.mark.parametrize(("t", "n", "k"), [(3, 5, 128), (130, 260, 77), (1, 1, 300)])
def test_products_of_integers_equal_the_reference(
    device: str, dtype: torch.dtype, t: int, n: int, k: int
) -> None:
    """In more than one program, of rows that do not fill the last piece; one token is not finite."""
    levels, weight = (
        torch.randint(-128, 128, (m, k), generator=generator(m), dtype=torch.int8) for m in (t, n)
    )
    levels[0], weight[0] = -128, -128
    per_unit = torch.rand(t, generator=generator(1)) * 1e3 + 1
    per_unit[1:2] = torch.nan
    for scale in (torch.tensor([0.017]), torch.rand(n, generator=generator(2)) + 1e-3):
        expected = reference.int8_product(levels, per_unit, weight, scale, dtype)
        ours = [x.to(device) for x in (levels, per_unit, weight, scale)]
        actual = kernels.int8_product(*ours, dtype)
        assert_equal(actual.nan_to_num(-1.0), expected.nan_to_num(-1.0), f"{len(scale)} scales")
        by_columns = kernels.int8_product(*ours[:2], ours[2].t().contiguous().t(), ours[3], dtype)
        assert_equal(by_columns.nan_to_num(-1.0), expected.nan_to_num(-1.0), "by columns")
        assert actual[1:2].isnan().all() and not actual[:1].isnan().any()
    assert kernels.int8_product(ours[0][:0], ours[1][:0], *ours[2:], dtype).shape == (0, n)


@on_each_device
@every_float
def test_the_sums_of_a_norm_equal_the_reference(device: str, dtype: torch.dtype) -> None:
    """Of tensors that fill some of the programs, all, and each several times; one begins anywhere."""
    sizes = (1, 4096, 0, 9001, 4 * token_kernels.SUM_BLOCK)
    gradients = [(torch.randn(n, generator=generator(n)) ** 3).to(dtype) for n in sizes]
    ours = [g.to(device) for g in gradients]
    gradients += [gradients[3][1:5000], gradients[0].to(torch.float32)]
    ours += [ours[3][1:5000], ours[0].to(torch.float32)]
    assert ours[5].data_ptr() % 16, "it begins between those that are loaded at once"
    most = reference.largest(gradients)
    for n_programs in (1, 3, token_kernels.PROGRAMS):
        with mock.patch.object(token_kernels, "PROGRAMS", n_programs):
            assert_equal(kernels.largest(ours), most, "largest")
            for unit in (2.0**55, 2.0**40):
                expected = reference.square_sum(gradients, most, unit)
                actual = kernels.square_sum(ours, most.to(device), unit)
                assert_equal(actual, expected, f"{n_programs} programs, sum in units of {unit}")
            for at in range(len(ours)):  # each element of each tensor is seen
                if ours[at].numel():
                    last, ours[at][-1] = ours[at][-1].clone(), 1e4
                    assert kernels.largest(ours).tolist() == [torch.tensor(1e4).to(ours[at].dtype).item()]
                    ours[at][-1] = last
    for bad in (torch.nan, torch.inf, -torch.inf):
        ours[3][8999] = bad
        assert kernels.largest(ours).tolist() == [torch.inf]


@on_each_device
def test_flips_are_added_where_the_target_says(device: str) -> None:
    """So that they need no number of their own; of a part of a target they do."""
    grid, n = GRIDS["ternary"], 4 * BLOCK
    codes = reference.pack(torch.randint(-1, 2, (n,), generator=generator(0), dtype=torch.int8), grid=grid)
    u, scale = torch.randn(n, generator=generator(1)), torch.tensor([0.02])
    target = Codes(codes.clone(), scale, n, grid, tensor=3, first_block=0)
    expected = reference.apply_(target, u, now=now())
    counts = torch.tensor([5, 7], device=device)
    ours = Codes(codes.to(device), scale.to(device), n, grid, tensor=3, first_block=0, flips=counts[1:])
    flips = kernels.apply_(ours, u.to(device), now=now())
    assert flips is ours.flips and expected.item() > 0
    assert_equal(counts, torch.tensor([5, 7 + expected.item()]), "flips")
    assert_equal(ours.codes, target.codes, "codes")
    assert ours.part(0, BLOCK).flips is None


def test_an_empty_shard_launches_nothing() -> None:
    grid, empty, rule = GRIDS["ternary"], torch.empty(0), RULES["adamw"]
    target = Codes(torch.empty(0, dtype=torch.uint8), torch.ones(3), 64, grid, 0, 9)
    for each in (target, Weights(empty)):
        assert kernels.step_(each, empty, zeros(rule, 0, "int8"), rule=rule, now=now()).tolist() == [0]
        assert kernels.apply_(each, empty, now=now()).tolist() == [0]
    place: dict[str, Any] = {"grid": grid, "first_block": 9, "scale_every": 64}
    assert kernels.decode(target.codes, torch.ones(3), out=empty, **place) is empty


class _PaperGPU:
    """As much of a Triton driver as a launch asks before it compiles."""

    def get_current_device(self) -> int:
        return 1000  # whose compiled kernels no real device will take for its own

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, request: pytest.FixtureRequest
) -> Iterator[list[Any]]:
    """Launches only compile, for sm_90; the list of what they made. A parameter adds launch options."""
    from triton.runtime import driver

    made: list[Any] = []
    options = getattr(request, "param", {})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", _PaperGPU())
    for module, name in (
        *((kernels, name) for name in ("_step_codes", "_step_weights", "_decode")),
        *((token_kernels, name) for name in ("_round_tokens", "_token_values", "_largest", "_square_sum")),
        *((product_kernels, name) for name in ("_unpack", "_count", "_int8_product", "_turn")),
    ):
        kernel = getattr(module, name)

        def compile_only(*args: Any, grid: Any, warmup: bool, run: Any = kernel.run, **named: Any) -> None:
            made.append(run(*args, grid=grid, warmup=True, **(named | options)))

        monkeypatch.setattr(kernel, "run", compile_only)
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    yield made


def compile_codes(rule: str, grid: Grid, states: str, scale_every: int) -> None:
    """With numbers of every width: Triton compiles anew for a seed, a block or a tensor of 64 bits."""
    n, one = 7 * BLOCK, scale_every >= 7 * BLOCK
    codes = torch.zeros(7 * grid.bytes_per_block, dtype=torch.uint8)
    scale = torch.ones(1 if one else n // scale_every)
    tensor, first_block = (1, 0) if one else (1 << 31, 0)
    target = Codes(codes, scale, scale_every, grid, tensor, first_block)
    numbers = now(seed=0 if one else (1 << 63) + 5)
    if rule == "apply":
        kernels.apply_(target, torch.zeros(n), now=numbers)
    else:
        grad = torch.zeros(n, dtype=torch.float32 if one else torch.bfloat16)
        kernels.step_(target, grad, zeros(RULES[rule], n, states), rule=RULES[rule], now=numbers)


def assert_rounds_each_operation(kernel: Any, n_fma: int = 0) -> None:
    """What the bytes rest on: no fusing (LLVM's or ptxas'), no flushing of subnormals, exact quotients.

    `n_fma` fused multiply-adds were asked for.
    """
    ptx = kernel.asm["ptx"]
    assert len(kernel.asm["cubin"]) > 1000
    assert not kernel.metadata.enable_fp_fusion, "ptxas would fuse what LLVM did not"
    assert ptx.count("fma.rn.f32") == ptx.count("fma") == n_fma
    for operation in ("add", "sub", "mul", "div", "sqrt.rn"):
        assert f"{operation}.ftz" not in ptx and f"{operation}.rn.ftz" not in ptx
    assert "div.full" not in ptx and "div.approx" not in ptx


@needs_compiler
@each_update
def test_codes_compile_for_sm_90_without_fused_multiply_adds(
    compiled: list[Any], rule: str, grid: Grid, states: str
) -> None:
    # One scale, scales of whole blocks, scales of planes.
    scale_every = (10**12, BLOCK, 64)[(grid.bits + STATES.index(states) + len(rule)) % 3]
    compile_codes(rule, grid, states, scale_every)
    (kernel,) = compiled
    # Two for the scale of each 8-bit slot, one for the decay of each of 16 elements with small levels, six
    # for the direction of each.
    n_slots = len(zeros(RULES[rule], BLOCK, states)) if states == "int8" else 0
    n_fma = 2 * n_slots + 16 * (grid.high <= 2) + (96 if rule == "adamw" else 0)
    assert_rounds_each_operation(kernel, n_fma)
    assert "sqrt.rn.f32" not in kernel.asm["ptx"]


@needs_compiler
def test_what_is_unusual_compiles_with_guards(compiled: list[Any]) -> None:
    target = Codes(torch.zeros(64 * 7, dtype=torch.uint8), torch.ones(1), 7 * BLOCK, GRIDS["ternary"], 1, 0)
    state = zeros(UNUSUAL, 7 * BLOCK, "int8")
    kernels.step_(target, torch.zeros(7 * BLOCK), state, rule=UNUSUAL, now=now())
    assert_rounds_each_operation(compiled[0], 4 + 16)
    assert compiled[0].asm["ptx"].count("sqrt.rn.f32") >= 16


@needs_compiler
@every_grid
@pytest.mark.parametrize(
    "scale_every",
    [10**12, pytest.param(BLOCK, marks=pytest.mark.slow), 64],
    ids=["tensor", "blocks", "planes"],
)
def test_directions_that_are_given_compile_for_sm_90(
    compiled: list[Any], grid: Grid, scale_every: int
) -> None:
    compile_codes("apply", grid, "fp32", scale_every)
    kernels.apply_(Weights(torch.zeros(999)), torch.zeros(999), now=now())
    assert len(compiled) == 2
    for kernel, n_fma in zip(compiled, (16 * (grid.high <= 2), 0), strict=True):
        assert_rounds_each_operation(kernel, n_fma)


@needs_compiler
@every_rule
@every_states
def test_weights_compile_for_sm_90_without_fused_multiply_adds(
    compiled: list[Any], rule: str, states: str
) -> None:
    for n in (1, 999, 1024):  # Triton compiles anew for 1 and for multiples of 16
        state, grad = zeros(RULES[rule], n, states), torch.zeros(n, dtype=torch.bfloat16)
        kernels.step_(Weights(torch.zeros(n)), grad, state, rule=RULES[rule], now=now())
    assert len({id(kernel) for kernel in compiled}) == 3
    for kernel in compiled:
        assert_rounds_each_operation(kernel, 2 * len(state) if states == "int8" else 0)  # of slots' scales


@needs_compiler
@every_grid
def test_decoding_compiles_for_sm_90(compiled: list[Any], grid: Grid) -> None:
    codes = torch.zeros(7 * grid.bytes_per_block, dtype=torch.uint8)
    for dtype, scale_every in ((torch.float32, 2**40), (torch.bfloat16, BLOCK), (torch.bfloat16, 64)):
        out = torch.zeros(7 * BLOCK, dtype=dtype)
        scale = torch.ones((7 * BLOCK - 1) // scale_every + 1)
        kernels.decode(codes, scale, grid=grid, first_block=0, scale_every=scale_every, out=out)
    assert len(compiled) == 3
    for kernel in compiled:
        assert_rounds_each_operation(kernel)


def accesses(cost: Cost, kind: str) -> Counter[str]:
    """How often a thread reads or writes memory, by width."""
    return Counter({name: n for name, n in cost.instructions.items() if name.startswith(kind)})


@needs_compiler
@pytest.mark.parametrize("kept", [None, *ACCUMULATORS])
def test_what_is_not_rounded_by_chance_alone_compiles_for_sm_90(
    compiled: list[Any], tmp_path: Any, kept: str | None
) -> None:
    n, grid, rule = 1024 * BLOCK, GRIDS["int4"], RULES["adamw"]
    target = Codes(torch.zeros(n // 2, dtype=torch.uint8), torch.ones(1), n, grid, 7, 0)
    numbers = now(nearest=0.5)
    if kept is not None:
        accumulator, options = ACCUMULATORS[kept]
        target = replace(target, residual=random_residual(accumulator, n, generator(0)))
        numbers = now(**options)
    state, gradient = zeros(rule, n, "int8"), torch.zeros(n, dtype=torch.bfloat16)
    kernels.step_(target, gradient, state, rule=rule, now=numbers)
    assert_rounds_each_operation(compiled[0], 4)
    assert cost_of(compiled[0], tmp_path).stack == 0


@needs_compiler
@pytest.mark.parametrize(
    ("rule", "grid", "states", "most"),
    [("adamw", "ternary", "int8", 100), ("adamw", "int8", "int8", 99), ("lion", "ternary", "int8", 67)],
)
def test_an_update_stays_within_its_budget_on_sm_90(
    compiled: list[Any], tmp_path: Any, rule: str, grid: str, states: str, most: float
) -> None:
    """It is bound by instructions, not by memory; each one more for an element takes a percent more time."""
    n, of_grid = 1024 * BLOCK, GRIDS[grid]
    codes = torch.zeros(1024 * of_grid.bytes_per_block, dtype=torch.uint8)
    target = Codes(codes, torch.ones(1), n, of_grid, 7, 0)
    state = zeros(RULES[rule], n, states)
    kernels.step_(target, torch.zeros(n, dtype=torch.bfloat16), state, rule=RULES[rule], now=now())
    cost = cost_of(compiled[0], tmp_path)
    assert cost.stack == 0 and cost.registers <= 96, "five programs have room beside each other"
    assert cost.per_element(kernels.CODE_BLOCKS * BLOCK / 128) <= most
    # Words are drawn where they are used, with no exchange between threads.
    assert not any(name.startswith(("STSM", "LDSM")) for name in cost.instructions)


@needs_compiler
@every_grid
def test_decoding_stays_within_its_budget_on_sm_90(compiled: list[Any], tmp_path: Any, grid: Grid) -> None:
    """It is bound by memory, which it reads and writes in pieces as wide as they come."""
    n = 1024 * BLOCK
    codes, out = torch.zeros(1024 * grid.bytes_per_block, dtype=torch.uint8), torch.zeros(n).bfloat16()
    kernels.decode(codes, torch.ones(1), grid=grid, first_block=0, scale_every=n, out=out)
    cost = cost_of(compiled[0], tmp_path)
    assert cost.stack == 0 and cost.registers <= 64
    assert cost.per_element(kernels.DECODE_BLOCKS * BLOCK / 128) <= (13.5 if grid.bits in (3, 6) else 10)
    assert accesses(cost, "STG") == {"STG.E.128": 4}
    assert accesses(cost, "LDG")["LDG.E.64"] >= 1


@needs_compiler
@every_float
@pytest.mark.parametrize("k", [5120, pytest.param(300, marks=pytest.mark.slow)])
def test_tokens_and_norms_compile_for_sm_90(
    compiled: list[Any], dtype: torch.dtype, k: int, tmp_path: Path
) -> None:
    """Without spills, in loads and stores of 16 bytes where rows begin at multiples of them."""
    x = torch.zeros(3, k, dtype=dtype)
    tokens = kernels.round_tokens(x)
    kernels.token_values(*tokens, dtype)
    most = kernels.largest([x])
    kernels.square_sum([x], most, 2.0**40)
    kernels.rounded_tokens(x)
    rounding, values, largest, squares, both = compiled
    for kernel, n_fma in ((rounding, 0), (values, 32), (both, 32)):  # 16 elements a thread
        assert_rounds_each_operation(kernel, n_fma)
        assert "div.rn.f32" in kernel.asm["ptx"]
    for kernel in compiled:
        cost = cost_of(kernel, tmp_path)
        # Of the two results of a row that begins anywhere, each byte is written by itself.
        assert cost.stack == 0 and cost.registers <= (96 if kernel is both and k % 16 else 64)
        assert k % 16 or kernel is values or "ld.global.v4.b32" in kernel.asm["ptx"]
    assert "div.rn.f64" in squares.asm["ptx"] and "fma.rn.f32" not in squares.asm["ptx"]
    assert "red" in largest.asm["ptx"] or "atom" in largest.asm["ptx"]


@needs_compiler
@every_grid
def test_levels_stay_within_their_budget_on_sm_90(compiled: list[Any], tmp_path: Path, grid: Grid) -> None:
    """A byte an element: it is written in pieces of 16."""
    codes = torch.zeros(1024 * grid.bytes_per_block, dtype=torch.uint8)
    kernels.unpack(codes, grid=grid)
    kernels.code_counts(codes, grid=grid)
    assert cost_of(compiled[1], tmp_path).stack == 0
    cost = cost_of(compiled[0], tmp_path)
    assert cost.stack == 0 and cost.registers <= 64
    assert cost.per_element(product_kernels.UNPACK_BLOCKS * BLOCK / 128) <= 12
    assert accesses(cost, "STG") == {"STG.E.128": 4}


@needs_compiler
@every_float
@pytest.mark.parametrize(("k", "n_scales"), [(2048, 1), (2048, 5120), (2000, 1)])
def test_products_of_integers_stay_within_their_budget_on_sm_90(
    compiled: list[Any], tmp_path: Path, dtype: torch.dtype, k: int, n_scales: int
) -> None:
    """Tensor cores multiply them: each of two groups of warps 64 of 128 tokens, 32 elements at a time."""
    levels, weight = (torch.zeros(n, k, dtype=torch.int8) for n in (2048, 5120))
    kernels.int8_product(levels, torch.ones(2048), weight, torch.ones(n_scales), dtype)
    (kernel,) = compiled
    assert_rounds_each_operation(kernel)
    cost = cost_of(kernel, tmp_path)
    assert cost.stack == 0 and cost.registers <= 255 and kernel.metadata.shared <= 227 * 1024
    assert cost.instructions["IGMMA.64"] == 8, "a pass of the loop, of 128 elements"
    assert cost.instructions.total() <= 2100, "of which 105 are a pass's"
    assert {*accesses(cost, "STG"), *accesses(cost, "LDGSTS")} == {"STG.E.128", "LDGSTS.E.BYPASS.128"}


@needs_compiler
def test_a_weight_is_laid_by_columns_within_its_budget_on_sm_90(compiled: list[Any], tmp_path: Path) -> None:
    """It is read and written in pieces of 16 bytes; the product of what comes of it is that of any weight."""
    levels, weight = torch.zeros(2048, 5120, dtype=torch.int8), torch.zeros(5120, 2048, dtype=torch.int8)
    kernels.int8_product(levels, torch.ones(2048), weight.t(), torch.ones(1), torch.bfloat16)
    turning, product = compiled
    cost = cost_of(turning, tmp_path)
    assert cost.stack == 0 and cost.registers <= 96
    assert cost.per_element(product_kernels.TURNED**2 / 256) <= 6
    assert {*accesses(cost, "STG"), *accesses(cost, "LDG")} == {"STG.E.128", "LDG.E.128"}
    assert cost_of(product, tmp_path).instructions["IGMMA.64"] == 8


@needs_compiler
@pytest.mark.parametrize("compiled", [{"enable_fp_fusion": True}], indirect=True, ids=["fusing"])
def test_the_check_would_see_fused_multiply_adds(compiled: list[Any]) -> None:
    compile_codes("adamw", GRIDS["ternary"], "int8", 10**12)
    (kernel,) = compiled
    assert "fma.rn.f32" in kernel.asm["ptx"]
