"""How slots are kept: 8 bits by power companding, bfloat16, float32; the reference and C against numpy."""

import numpy as np
import pytest
import torch
from op_cases import RULES, generator, heavy_tailed_grad, now, zeros

from lowbit_dist import ops
from lowbit_dist.grid import BLOCK
from lowbit_dist.ops import Slot, Stored, Weights, cpu, reference
from lowbit_dist.optim import AdamW

needs_compiler = pytest.mark.skipif(not cpu.available(), reason="no C compiler")
every_state = pytest.mark.parametrize("states", ops.STATES)
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
both_backends = pytest.mark.parametrize(
    "backend", [reference, pytest.param(cpu, marks=needs_compiler)], ids=["reference", "c"]
)


def stored(backend, grad, states):
    """Slots that hold m = grad and v = grad^2, as the backend stores them."""
    rule = AdamW(betas=(0.0, 0.0))
    state = zeros(rule, len(grad), states)
    backend.step_(Weights(torch.zeros(len(grad))), grad, state, rule=rule, now=now(grad_scale=1.0))
    return state


@both_backends
def test_8_bit_codes_count_the_thresholds_they_reach(backend):
    n = 40 * BLOCK
    grad = heavy_tailed_grad(n, 1)
    m, v = stored(backend, grad, "int8")
    half = np.float32(0.5)
    for value, code, scale, top, power in (
        (grad.abs(), m.values.abs(), m.scale, 127, 2),
        (grad * grad, v.values, v.scale, 255, 4),
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
    assert torch.equal(m.values.sign()[m.values != 0].float(), grad.sign()[m.values != 0])


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
    m, v = stored(backend, torch.from_numpy(grad).view(-1), "int8")
    slot = m if power == 2 else v
    assert (slot.scale == 1).all()
    y = grad if power == 2 else grad * grad
    expected = (y[..., None] >= thresholds).sum(axis=-1)
    assert np.array_equal(
        slot.values.numpy().reshape(grad.shape), expected if power == 2 else np.maximum(expected, 1)
    )


@both_backends
def test_8_bit_slots_are_close_and_an_unsigned_one_is_never_zero(backend):
    n = 400 * BLOCK
    grad = heavy_tailed_grad(n, 3)
    m, v = (slot.load(0, n) for slot in stored(backend, grad, "int8"))
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
def test_bf16_slots_are_rounded_to_nearest_even(backend):
    n = 999
    grad = heavy_tailed_grad(n, 3)
    m, v = stored(backend, grad, "bf16")
    assert torch.equal(m.values, grad.bfloat16())
    assert torch.equal(v.values, (grad * grad).bfloat16())
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3.0e38])
    assert torch.equal(stored(backend, ties, "bf16")[0].values, ties.bfloat16())


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@every_state
def test_a_slot_stored_in_runs_of_blocks_is_the_slot_stored_at_once(states, signed):
    n = 9 * BLOCK + 100
    x = torch.randn(n, generator=generator(1)) * 1e-3
    x = x if signed else x.abs()
    whole, runs = (Stored.zeros(Slot("x", signed), n, states) for _ in range(2))
    whole.store(0, n, x)
    for start, stop in ((0, BLOCK), (BLOCK, 7 * BLOCK), (7 * BLOCK, n)):
        runs.store(start, stop, x[start:stop])
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors, runs.tensors, strict=True))
    assert torch.equal(whole.load(2 * BLOCK, n), whole.load(0, n)[2 * BLOCK :])
    # Half a code of the root, or half a unit of bfloat16, at most.
    bound = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 0.02}[states] * x.abs().max()
    assert (whole.load(0, n) - x).abs().max() <= bound


@every_rule
@every_state
def test_slots_take_the_bytes_they_promise(states, rule):
    n = 40 * BLOCK
    state = zeros(rule, n, states)
    assert [slot.states for slot in state] == [states] * len(rule.slots)
    bytes_per_slot = {"fp32": 4, "bf16": 2, "int8": 1 + 4 / BLOCK}[states]
    assert sum(slot.nbytes for slot in state) / n == bytes_per_slot * len(rule.slots)
    assert all((slot.load(0, n) == 0).all() for slot in state)
    assert Stored.zeros(rule.slots[0], 1, "int8").scale.numel() == 1


def test_unknown_states_are_refused():
    with pytest.raises(ValueError, match="states is 'int4'; it must be one of fp32, bf16, int8"):
        Stored.zeros(Slot("m", signed=True), 256, "int4")
