"""The Triton kernels give the reference's bytes: interpreted on the CPU, and on a GPU where there is one.

Without a GPU they are also compiled for sm_90 by the very calls that a GPU would get.
"""

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lowbit_dist.grid import BLOCK, GRIDS, Grid
from lowbit_dist.ops import reference
from lowbit_dist.ops.reference import STATES, AdamWStep, Moments

pytest.importorskip("triton", reason="Triton is not installed: torch built for CPUs alone does not bring it")

import triton.language as tl

from lowbit_dist.ops import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
every_states = pytest.mark.parametrize("states", STATES)
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


def a_step(number: int, **other: Any) -> AdamWStep:
    numbers: dict[str, Any] = {
        "lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1,
        "seed": 0xFEDCBA9876543210, "grad_scale": 0.7,
    }  # fmt: skip
    return AdamWStep(step=number, **(numbers | other))


def some_codes(grid: Grid, n_blocks: int) -> Tensor:
    levels = torch.randint(grid.low, grid.high + 1, (n_blocks * BLOCK,)).to(torch.int8)
    return reference.pack(levels, grid=grid)


def a_gradient(n: int, dtype: torch.dtype) -> Tensor:
    """Heavy-tailed, with a block of zeros and blocks whose moments underflow in one format or another."""
    gradient = torch.randn(n) * torch.rand(n) ** 3 * 1e-3
    for block, factor in ((1, 0.0), (2, 1e-14), (3, 1e-20), (4, 1e-36)):
        gradient[block * BLOCK : (block + 1) * BLOCK] *= factor
    return gradient.to(dtype)


def copied(moments: Moments, device: str) -> Moments:
    """Copies, so that in-place changes of one backend stay its own."""
    return Moments(*(tensor.to(device, copy=True) for tensor in moments.tensors))


def part(moments: Moments, first: int, last: int) -> Moments:
    """The moments of blocks `first..last - 1`, sharing memory."""
    elements, blocks = slice(first * BLOCK, last * BLOCK), slice(first, last)
    scales = (moments.m_scale, moments.v_scale)
    return Moments(moments.m[elements], moments.v[elements], *(s if s is None else s[blocks] for s in scales))


def assert_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    actual = actual.cpu()
    assert actual.dtype == expected.dtype, what
    n = int((actual != expected).sum())
    assert n == 0, f"{what}: {n} of {expected.numel()} differ"


def assert_equal_moments(actual: Moments, expected: Moments, what: str) -> None:
    for i, (a, e) in enumerate(zip(actual.tensors, expected.tensors, strict=True)):
        assert_equal(a, e, f"{('m', 'v', 'm_scale', 'v_scale')[i]} {what}")


@on_each_device
@every_grid
@every_states
def test_two_shards_of_codes_equal_the_whole_of_the_reference(device: str, grid: Grid, states: str) -> None:
    n_blocks, cut = 13, 11  # on both sides of the cut, the last program's last blocks are beyond the shard
    k = 3 * list(GRIDS).index(grid.name) + STATES.index(states)
    dtype = (torch.float32, torch.bfloat16)[k % 2]
    # Counters pass 2^32 within the tensor; with a scale per row, a row ends between blocks 3 and 4.
    first_block = (1 << 26) - 5
    blocks_per_scale = ((1 << 26) // 3, 10**12)[k // 2 % 2]
    torch.manual_seed(k)
    scale = (0.01 + 0.02 * torch.rand(4 if blocks_per_scale < first_block else 1)) / 2 ** (grid.bits - 2)

    codes = some_codes(grid, n_blocks)
    moments = Moments.zeros(n_blocks * BLOCK, states)
    ours, our_moments, before = codes.to(device, copy=True), copied(moments, device), codes.clone()
    for step in range(1, 21 if states == "int8" else 6):
        gradient = a_gradient(n_blocks * BLOCK, dtype)
        same: dict[str, Any] = {
            "grid": grid, "now": a_step(step), "tensor": (1 << 28) | 7, "blocks_per_scale": blocks_per_scale
        }  # fmt: skip
        flips = reference.adamw_codes_(codes, scale, gradient, moments, first_block=first_block, **same)
        our_flips = torch.zeros(1, dtype=torch.int64)
        for first, last in ((0, cut), (cut, n_blocks)):
            our_flips += kernels.adamw_codes_(
                ours[first * grid.bytes_per_block : last * grid.bytes_per_block],
                scale.to(device),
                gradient[first * BLOCK : last * BLOCK].to(device),
                part(our_moments, first, last),
                first_block=first_block + first,
                **same,
            ).cpu()
        assert_equal(ours, codes, f"codes after step {step}")
        assert_equal_moments(our_moments, moments, f"after step {step}")
        assert_equal(our_flips, flips, f"flips in step {step}")
        assert flips > 0, "the case must move some codes"
    assert not torch.equal(before, codes)


@on_each_device
def test_rows_have_their_own_scales_wherever_a_shard_begins(device: str) -> None:
    """Rows of 3 blocks whose scales differ by much; the shard begins in the middle of the third row.

    The fifth row's steps are beyond all integers: its codes go to the ends of the grid.
    """
    grid, n_blocks, first_block = GRIDS["int4"], 10, 7
    torch.manual_seed(0)
    codes, gradient = some_codes(grid, n_blocks), a_gradient(n_blocks * BLOCK, torch.float32)
    moments = Moments.zeros(n_blocks * BLOCK, "fp32")
    ours, our_moments = codes.to(device, copy=True), copied(moments, device)
    scale = torch.tensor([1e30, 1e30, 0.003, 0.1, 1e-30, 0.03])
    same: dict[str, Any] = {
        "grid": grid, "now": a_step(1), "tensor": 0, "first_block": first_block, "blocks_per_scale": 3
    }  # fmt: skip
    reference.adamw_codes_(codes, scale, gradient, moments, **same)
    kernels.adamw_codes_(ours, scale.to(device), gradient.to(device), our_moments, **same)
    assert_equal(ours, codes, "codes")


@on_each_device
@every_states
@pytest.mark.parametrize("n", [1, 999, 1024])
def test_weights_equal_the_reference(device: str, states: str, n: int) -> None:
    torch.manual_seed(n)
    weight = torch.randn(n)
    moments = Moments.zeros(n, states)
    ours, our_moments, before = weight.to(device, copy=True), copied(moments, device), weight.clone()
    for step in range(1, 21 if n == 999 else 4):
        gradient = torch.randn(n) if n == 1 else a_gradient(n, (torch.float32, torch.bfloat16)[step % 2])
        reference.adamw_weights_(weight, gradient, moments, now=a_step(step))
        kernels.adamw_weights_(ours, gradient.to(device), our_moments, now=a_step(step))
        assert_equal(ours, weight, f"weights after step {step}")
        assert_equal_moments(our_moments, moments, f"after step {step}")
    assert not torch.equal(before, weight)


@on_each_device
@pytest.mark.parametrize("error", [0.0, 1e-6, -1e-6])
def test_8_bit_moments_round_exactly_at_their_thresholds(device: str, error: float) -> None:
    """Though the root behind the first guess be inexact, as a GPU's is: the interpreter's is given an error.

    With both betas 0 the moments are g and g * g; the largest of each block makes its scale 1.
    """

    def inexact(x: Any) -> Any:
        return tl.math.sqrt(x) * (1 + error)

    k = torch.arange(1, 256).float()
    at = (k - 0.5) ** 2  # thresholds of m; their squares are those of v
    below = torch.nextafter(at, torch.zeros(()))
    for gradient, expected_m, expected_v in (
        (torch.cat([at[:127], -below[:127], torch.tensor([127.0**2, 0])]), (k[:127], 1 - k[:127]), None),
        (torch.cat([at, torch.tensor([255.0**2])]), None, k),
        (torch.cat([below, torch.tensor([255.0**2])]), None, (k - 1).clamp(min=1)),
    ):
        moments = Moments.zeros(BLOCK, "int8", device)
        now = a_step(1, beta1=0.0, beta2=0.0, grad_scale=1.0)
        with mock.patch.object(tl, "sqrt", inexact) if device == "cpu" else nullcontext():
            kernels.adamw_weights_(torch.zeros(BLOCK, device=device), gradient.to(device), moments, now=now)
        if expected_m is not None:
            assert_equal(moments.m[:254], torch.cat(expected_m).to(torch.int8), "m")
        if expected_v is not None:
            assert_equal(moments.v[:255], expected_v.to(torch.uint8), "v")
            assert moments.v[255] == 255


@on_each_device
@every_grid
@every_float
def test_decoded_weights_equal_the_reference(device: str, grid: Grid, dtype: torch.dtype) -> None:
    n_blocks, first_block = 11, 5
    torch.manual_seed(0)
    codes = some_codes(grid, n_blocks)
    # One row so small that its weights are subnormal, in bfloat16 too.
    for scale, blocks_per_scale in (
        (torch.tensor([3.0, 0.3, 0.017, 1e-39]), 4),
        (torch.tensor([0.7]), 10**12),
    ):
        out = torch.full((n_blocks * BLOCK,), torch.nan, dtype=dtype)
        our_out = out.to(device, copy=True)
        same: dict[str, Any] = {
            "grid": grid,
            "first_block": first_block,
            "blocks_per_scale": blocks_per_scale,
        }
        reference.decode(codes, scale, out=out, **same)
        returned = kernels.decode(codes.to(device), scale.to(device), out=our_out, **same)
        assert returned is our_out
        assert_equal(our_out, out, "weights")


@on_each_device
@every_grid
def test_code_counts_equal_the_reference(device: str, grid: Grid) -> None:
    torch.manual_seed(0)
    codes = some_codes(grid, 11)
    actual = kernels.code_counts(codes.to(device), grid=grid)
    assert_equal(actual, reference.code_counts(codes, grid=grid), "counts")


def test_an_empty_shard_launches_nothing() -> None:
    grid, empty = GRIDS["ternary"], torch.empty(0)
    none = torch.empty(0, dtype=torch.uint8)
    place: dict[str, Any] = {"grid": grid, "first_block": 9, "blocks_per_scale": 3}
    moments = Moments.zeros(0, "int8")
    flips = kernels.adamw_codes_(none, torch.ones(3), empty, moments, now=a_step(1), tensor=0, **place)
    assert flips.tolist() == [0]
    kernels.adamw_weights_(empty, empty, moments, now=a_step(1))
    assert kernels.decode(none, torch.ones(3), out=empty, **place) is empty
    assert kernels.code_counts(none, grid=grid).tolist() == [0, 0, 0]


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
    for name in ("_adamw_codes", "_adamw_weights", "_decode", "_code_counts"):
        kernel = getattr(kernels, name)

        def compile_only(*args: Any, grid: Any, warmup: bool, run: Any = kernel.run, **named: Any) -> None:
            made.append(run(*args, grid=grid, warmup=True, **(named | options)))

        monkeypatch.setattr(kernel, "run", compile_only)
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    yield made


def compile_codes(grid: Grid, states: str, n_scales: int) -> None:
    """With numbers of every width: Triton compiles anew for a seed, a block or a tensor of 64 bits."""
    wide = n_scales > 1
    kernels.adamw_codes_(
        torch.zeros(7 * grid.bytes_per_block, dtype=torch.uint8),
        torch.ones(n_scales),
        torch.zeros(7 * BLOCK, dtype=torch.bfloat16 if wide else torch.float32),
        Moments.zeros(7 * BLOCK, states),
        grid=grid,
        now=a_step(1, seed=(1 << 63) + 5 if wide else 0),
        tensor=1 << 31 if wide else 1,
        first_block=1 << 34 if wide else 0,
        blocks_per_scale=1 << 32 if wide else 10**12,
    )


def assert_rounds_each_operation(kernel: Any) -> None:
    """What the bytes rest on: no fusing (LLVM's or ptxas'), no flushing of subnormals, exact quotients."""
    ptx = kernel.asm["ptx"]
    assert len(kernel.asm["cubin"]) > 1000
    assert not kernel.metadata.enable_fp_fusion, "ptxas would fuse what LLVM did not"
    assert "fma" not in ptx
    for operation in ("add", "sub", "mul", "div", "sqrt.rn"):
        assert f"{operation}.ftz" not in ptx and f"{operation}.rn.ftz" not in ptx
    assert "div.full" not in ptx and "div.approx" not in ptx


@needs_compiler
@every_grid
@every_states
def test_codes_compile_for_sm_90_without_fused_multiply_adds(
    compiled: list[Any], grid: Grid, states: str
) -> None:
    n_scales = 10 if (grid.bits + STATES.index(states)) % 2 else 1
    compile_codes(grid, states, n_scales)
    (kernel,) = compiled
    assert_rounds_each_operation(kernel)
    assert kernel.asm["ptx"].count("div.rn.f32") >= 4 and kernel.asm["ptx"].count("sqrt.rn.f32") >= 4


@needs_compiler
@every_states
def test_weights_compile_for_sm_90_without_fused_multiply_adds(compiled: list[Any], states: str) -> None:
    for n in (1, 999, 1024):  # Triton compiles anew for 1 and for multiples of 16
        moments = Moments.zeros(n, states)
        kernels.adamw_weights_(torch.zeros(n), torch.zeros(n, dtype=torch.bfloat16), moments, now=a_step(1))
    assert len({id(kernel) for kernel in compiled}) == 3
    for kernel in compiled:
        assert_rounds_each_operation(kernel)


@needs_compiler
@every_grid
def test_decode_and_code_counts_compile_for_sm_90(compiled: list[Any], grid: Grid) -> None:
    codes = torch.zeros(7 * grid.bytes_per_block, dtype=torch.uint8)
    for dtype, scales in ((torch.float32, 1), (torch.bfloat16, 7)):
        out = torch.zeros(7 * BLOCK, dtype=dtype)
        kernels.decode(
            codes,
            torch.ones(scales),
            grid=grid,
            first_block=0,
            blocks_per_scale=1 if scales > 1 else 99,
            out=out,
        )
    kernels.code_counts(codes, grid=grid)
    assert len(compiled) == 3
    for kernel in compiled:
        assert_rounds_each_operation(kernel)


@needs_compiler
@pytest.mark.parametrize("compiled", [{"enable_fp_fusion": True}], indirect=True, ids=["fusing"])
def test_the_check_would_see_fused_multiply_adds(compiled: list[Any]) -> None:
    compile_codes(GRIDS["ternary"], "int8", 1)
    (kernel,) = compiled
    assert "fma.rn.f32" in kernel.asm["ptx"]
