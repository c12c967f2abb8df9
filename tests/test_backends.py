"""C against the reference, byte for byte; shards against the whole; and how the C source is built.

Triton against the reference is test_kernels.py.
"""

import logging
import math
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from cases import slow
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
    used_state,
    zeros,
)
from test_matmul import SHAPES, case

from lowbit_dist import ops
from lowbit_dist.grid import BLOCK, GRIDS
from lowbit_dist.ops import Codes, Weights, cpu, native, reference

needs_compiler = pytest.mark.skipif(not cpu.available(), reason="no C compiler")
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
every_state = pytest.mark.parametrize("states", ops.STATES)
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
both_backends = pytest.mark.parametrize(
    "backend", [reference, pytest.param(cpu, marks=needs_compiler)], ids=["reference", "c"]
)


@needs_compiler
@pytest.mark.parametrize(("rule", "grid", "states", "granularity"), COMBINATIONS, ids=str)
def test_c_steps_codes_as_the_reference_does(rule, grid, states, granularity):
    rule, grid, scale_every = RULES[rule], GRIDS[grid], GRANULARITIES[granularity]
    n_blocks = 37
    expected, actual = (random_codes(grid, n_blocks, scale_every) for _ in range(2))
    expected_state, actual_state = (zeros(rule, n_blocks * BLOCK, states) for _ in range(2))
    for number in range(1, 21 if granularity == "tensor" else 7):
        for dtype in (torch.float32, torch.bfloat16):
            grad = heavy_tailed_grad(n_blocks * BLOCK, number, dtype)
            before = reference.unpack(actual.codes, grid=grid)
            expected_flips = reference.step_(expected, grad, expected_state, rule=rule, now=now(number))
            flips = cpu.step_(actual, grad, actual_state, rule=rule, now=now(number))
            assert_equal(actual.codes, expected.codes, f"codes after step {number}")
            assert_equal_state(actual_state, expected_state, f"after step {number}")
            assert torch.equal(flips, expected_flips)
            assert flips.item() == (before != reference.unpack(actual.codes, grid=grid)).sum() > 0


@needs_compiler
@every_rule
@every_grid
@pytest.mark.parametrize("states", ["int8", "fp32"])
@pytest.mark.parametrize("kept", ACCUMULATORS)
def test_c_steps_codes_with_residuals_as_the_reference_does(rule, grid, states, kept):
    n_blocks, (kept, options) = 9, ACCUMULATORS[kept]
    expected, actual = (
        replace(
            random_codes(grid, n_blocks, 192), residual=random_residual(kept, n_blocks * BLOCK, generator(0))
        )
        for _ in range(2)
    )
    expected_state, actual_state = (zeros(rule, n_blocks * BLOCK, states) for _ in range(2))
    flips = 0
    for number in range(1, 5):
        grad = heavy_tailed_grad(n_blocks * BLOCK, number)
        numbers = now(number, lr=0.01, **options)
        expected_flips = reference.step_(expected, grad, expected_state, rule=rule, now=numbers)
        assert_equal(ops.step_(actual, grad, actual_state, rule=rule, now=numbers), expected_flips, "flips")
        assert_equal(actual.codes, expected.codes, f"codes after step {number}")
        assert_equal(actual.residual.values, expected.residual.values, f"residuals after step {number}")
        assert_equal_state(actual_state, expected_state, f"after step {number}")
        flips += expected_flips.item()
    assert flips > 0


@needs_compiler
@every_rule
@every_grid
@pytest.mark.parametrize("nearest", [1e-9, 0.3, 0.9, 1.0])
def test_c_rounds_towards_the_nearest_as_the_reference_does(rule, grid, nearest):
    n_blocks = 12
    expected, actual = (random_codes(grid, n_blocks, 192) for _ in range(2))
    expected_state, actual_state = (zeros(rule, n_blocks * BLOCK, "int8") for _ in range(2))
    for number in range(1, 5):
        grad = heavy_tailed_grad(n_blocks * BLOCK, number)
        numbers = now(number, lr=0.03, nearest=nearest)
        flips = reference.step_(expected, grad, expected_state, rule=rule, now=numbers)
        assert_equal(ops.step_(actual, grad, actual_state, rule=rule, now=numbers), flips, "flips")
        assert_equal(actual.codes, expected.codes, f"codes after step {number}")
        assert flips > 0


@needs_compiler
@every_grid
@pytest.mark.parametrize("scale_every", [64, 192, 2**40])
def test_c_encodes_as_the_reference_does(grid, scale_every):
    n, first_block = 600 * BLOCK, 5
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand((n + first_block * BLOCK) // scale_every + 1, generator=generator) + 0.1
    weight = torch.randn(n, generator=generator) * grid.high / 2
    weight[:8] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, -1e30, 1e-40])
    weight[256:768] = (torch.arange(512) - 255.5) * scale[first_block * BLOCK // scale_every]  # ties
    place = {"grid": grid, "scale_every": scale_every, "first_block": first_block}
    codes = cpu.encode(weight, scale, **place)
    assert torch.equal(codes, reference.encode(weight, scale, **place))
    assert len(reference.unpack(codes, grid=grid).unique()) == grid.n_levels


@needs_compiler
@every_grid
def test_c_moves_codes_by_any_number_of_levels_as_the_reference_does(grid):
    """By less than the smallest fraction, by some levels, and beyond all integers, in the same vectors."""
    n_blocks = 12
    scale = torch.tensor([3.0, 0.05, 1e-4, 1e-12, 1e-27, 1e-36]).repeat(8)
    sizes = 10.0 ** (torch.rand(n_blocks * BLOCK, generator=generator(1)) * 16 - 10)
    u = sizes * torch.randn(n_blocks * BLOCK, generator=generator(2)).sign()
    u[::9] = 0
    for scale_every, weight_decay in ((64, 0.1), (512, 0.0), (1024, 0.1)):
        codes = [random_codes(grid, n_blocks).codes for _ in range(2)]
        expected, actual = (Codes(each, scale, scale_every, grid, 1, 0) for each in codes)
        for number in (1, 2):
            numbers = now(number, weight_decay=weight_decay)
            flips = reference.apply_(expected, u, now=numbers)
            assert torch.equal(cpu.apply_(actual, u, now=numbers), flips)
            assert_equal(actual.codes, expected.codes, f"codes after step {number}")
            assert flips > 0, "the case must move some codes"
            u = -u


@needs_compiler
@every_rule
@every_state
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("n", [1, 255, 256, 999, 37 * BLOCK + 77])
def test_c_steps_weights_as_the_reference_does(rule, states, dtype, n):
    expected = torch.randn(n, generator=generator(1))
    actual = expected.clone()
    expected_state, actual_state = (zeros(rule, n, states) for _ in range(2))
    for number in range(1, 21):
        grad = heavy_tailed_grad(n, number, dtype)
        reference.step_(Weights(expected), grad, expected_state, rule=rule, now=now(number))
        flips = cpu.step_(Weights(actual), grad, actual_state, rule=rule, now=now(number))
        assert_equal(actual, expected, f"weights after step {number}")
        assert_equal_state(actual_state, expected_state, f"after step {number}")
        assert flips.tolist() == [0]


@needs_compiler
@every_rule
def test_the_number_of_threads_does_not_change_a_byte(monkeypatch, rule):
    n = 1100 * BLOCK
    grad = heavy_tailed_grad(n, 1)
    results = []
    for n_threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n_threads=n_threads: n_threads)
        target, state, weight = (
            random_codes(GRIDS["int3"], 1100, 896),
            used_state(rule, n, "int8"),
            torch.ones(n),
        )
        flips = cpu.step_(target, grad, state, rule=rule, now=now(4))
        cpu.step_(Weights(weight), grad, state, rule=rule, now=now(5))
        flips += cpu.apply_(target, grad, now=now(6))
        results.append((target.codes, flips, weight, *(tensor for slot in state for tensor in slot.tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_grid
@every_state
@every_rule
@both_backends
@pytest.mark.parametrize(
    ("scale_every", "first_block"),
    # The Philox counter crosses 2**32 inside; a row ends inside too, or several do.
    [(2**22 * BLOCK, 2**26 - 11), (896, 5), (64, 5)],
    ids=["far", "rows of 896", "groups of 64"],
)
def test_any_cut_of_a_tensor_gives_the_bytes_of_the_whole(
    grid, states, rule, backend, scale_every, first_block
):
    n_blocks = 23
    grad = heavy_tailed_grad(n_blocks * BLOCK, 4)
    whole, pieces = (random_codes(grid, n_blocks, scale_every, first_block=first_block) for _ in range(2))
    whole_state = used_state(rule, n_blocks * BLOCK, states)
    state_of_pieces = copy_of(whole_state)
    flips = backend.step_(whole, grad, whole_state, rule=rule, now=now(4))
    flips_of_pieces = torch.zeros_like(flips)
    for start, stop in ((0, 1), (1, 13), (13, 13), (13, 23)):
        elements = slice(start * BLOCK, stop * BLOCK)
        piece = pieces.part(elements.start, elements.stop)
        of_piece = part(state_of_pieces, start, stop)
        flips_of_pieces += backend.step_(piece, grad[elements], of_piece, rule=rule, now=now(4))
    assert flips.item() > 0, "the case must move some codes"
    assert_equal(pieces.codes, whole.codes)
    assert_equal_state(state_of_pieces, whole_state)
    assert torch.equal(flips_of_pieces, flips)


@pytest.fixture
def fresh_library(monkeypatch, tmp_path):
    """An empty cache, and no library loaded yet; afterwards the usual one is."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "code"
    native.library.cache_clear()


def steps_by_dispatch():
    results = []
    for rule in RULES.values():
        target, state = random_codes(GRIDS["int3"], 5, 128), zeros(rule, 5 * BLOCK, "int8")
        grad = heavy_tailed_grad(5 * BLOCK, 1)
        flips = ops.step_(target, grad, state, rule=rule, now=now())
        flips += ops.apply_(target, grad, now=now())
        results += [target.codes, flips, *(tensor for slot in state for tensor in slot.tensors)]
        results += [
            ops.unpack(target.codes, grid=target.grid),
            ops.code_counts(target.codes, grid=target.grid),
        ]
    return results


def test_without_a_compiler_the_bytes_are_the_same_and_one_warning_says_so(
    fresh_library, monkeypatch, caplog
):
    expected = steps_by_dispatch()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    native.library.cache_clear()
    with caplog.at_level(logging.WARNING):
        actual = steps_by_dispatch()
        steps_by_dispatch()
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
    native.library.cache_clear()
    assert cpu.available()
    assert [path.stat().st_ino for path in fresh_library.iterdir()] == [before.st_ino]


@needs_compiler
def test_a_damaged_library_is_built_anew(fresh_library):
    compiler = native._compiler()
    fresh_library.mkdir(mode=0o700)
    path = fresh_library / f"cpu-{native._fingerprint(compiler)}.so"
    path.write_bytes(b"not a library")
    path.chmod(0o700)
    assert cpu.available()
    assert path.stat().st_size > 1000


@needs_compiler
def test_a_folder_that_others_can_write_to_is_not_trusted(fresh_library):
    fresh_library.mkdir()
    fresh_library.chmod(0o777)
    planted = fresh_library / f"cpu-{native._fingerprint(native._compiler())}.so"
    planted.write_bytes(b"planted by somebody else")
    assert cpu.available(), "it is built elsewhere"
    assert planted.read_bytes() == b"planted by somebody else"
    assert [path.name for path in fresh_library.iterdir()] == [planted.name]


@needs_compiler
def test_workers_that_start_at_once_do_not_disturb_each_other(fresh_library):
    compiler = native._compiler()
    with ThreadPoolExecutor(3) as pool:
        libraries = list(pool.map(native._open, [compiler] * 3))
    assert all(library.lowbit_pack for library in libraries)
    assert len(os.listdir(fresh_library)) == 1


@needs_compiler
@pytest.mark.parametrize(
    "tuning",
    [
        [], ["-march=x86-64-v3", "-mavxvnni"],
        # A part of the last one, and what is built for every other test.
        *slow((["-march=x86-64-v3"],), (["-march=native", "-fopenmp"],)),
    ],
    ids=str,
)  # fmt: skip
def test_code_for_other_cpus_gives_the_same_bytes(fresh_library, monkeypatch, tuning):
    """With the baseline's vector extensions only, with AVX2, with that and its products of bytes, and with
    all that this machine has.
    """
    for option, flag in (("-march=x86-64-v3", "avx2"), ("-mavxvnni", "avx_vnni")):
        if option in tuning and f" {flag} " not in native._cpu():
            pytest.skip(f"this CPU has no {flag}")
    monkeypatch.setattr(native, "_TUNINGS", [tuning])
    native.library.cache_clear()
    assert cpu.available()
    scale = torch.tensor([0.01])
    for rule in RULES.values():
        for grid in GRIDS.values():
            codes = [random_codes(grid, 9).codes for _ in range(2)]
            # The Philox counter crosses 2**32 inside.
            expected, actual = (Codes(each, scale, 2**40, grid, 1, 2**26 - 4) for each in codes)
            expected_state, actual_state = (zeros(rule, 9 * BLOCK, "int8") for _ in range(2))
            for number in (1, 2, 3):
                grad = heavy_tailed_grad(9 * BLOCK, number)
                reference.step_(expected, grad, expected_state, rule=rule, now=now(number))
                cpu.step_(actual, grad, actual_state, rule=rule, now=now(number))
            assert_equal(actual.codes, expected.codes)
            assert_equal_state(actual_state, expected_state)
    for shape in SHAPES:
        for grid in GRIDS.values():
            for dtype in (torch.float32, torch.bfloat16):
                x, weight = case(grid, shape, 6, dtype)
                assert_equal(cpu.matmul(x, **weight), reference.matmul(x, **weight), f"{shape}, {grid.name}")
