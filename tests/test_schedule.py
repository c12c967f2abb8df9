"""Schedules by exact values."""

import math

import pytest

from lowbit_dist.config import Schedule
from lowbit_dist.optim.schedule import rate

NAMES = ("cosine", "linear", "constant", "two_stage")


def lr(schedule: Schedule, step: int, steps: int) -> float:
    return rate(schedule, step, steps)[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_warm_up_rises_in_equal_steps_and_is_full_at_its_last(name):
    schedule = Schedule(name=name, warmup_steps=4)
    assert [lr(schedule, step, 100) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("name", NAMES)
def test_without_a_warm_up_the_first_step_is_almost_full(name):
    first = lr(Schedule(name=name, warmup_steps=0), 1, 1000)
    assert 0.998 < first <= 1.0


def test_cosine_is_half_way_at_half_time_and_ends_at_its_minimum():
    schedule = Schedule(name="cosine", warmup_steps=10, min_lr_ratio=0.1)
    assert lr(schedule, 60, 110) == pytest.approx(0.1 + 0.9 * 0.5, abs=1e-15)
    assert lr(schedule, 35, 110) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)), abs=1e-15)
    assert lr(schedule, 110, 110) == pytest.approx(0.1, abs=1e-15)


def test_linear_falls_by_equal_amounts_to_its_minimum():
    schedule = Schedule(name="linear", warmup_steps=0, min_lr_ratio=0.5)
    assert [lr(schedule, step, 4) for step in (1, 2, 3, 4)] == [0.875, 0.75, 0.625, 0.5]


def test_constant_stays():
    schedule = Schedule(name="constant", warmup_steps=2)
    assert [lr(schedule, step, 5) for step in (1, 2, 3, 4, 5)] == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_two_stage_follows_bitnets_published_numbers():
    """700M (training tips, table 2): peak 1.5e-3 -> 1e-3, weight decay 0.1 -> 0, at half of the steps."""
    schedule = Schedule(name="two_stage", warmup_steps=0, switch_at=0.5, second_lr_ratio=2 / 3)
    rates = {step: rate(schedule, step, 1000) for step in (1, 250, 500, 501, 750, 1000)}
    learning_rates = {step: 1.5e-3 * factor for step, (factor, _) in rates.items()}
    assert learning_rates == pytest.approx(
        {1: 1.5e-3 * 0.999, 250: 1.125e-3, 500: 7.5e-4, 501: 1e-3 * 0.499, 750: 2.5e-4, 1000: 0.0}
    )
    assert [factor for _, factor in rates.values()] == [1, 1, 1, 0, 0, 0]


def test_weight_decay_may_end_later_than_the_first_stage_as_in_trilm():
    schedule = Schedule(name="two_stage", warmup_steps=0, switch_at=0.5, weight_decay_until=2 / 3)
    assert [rate(schedule, step, 12)[1] for step in range(1, 13)] == [1.0] * 8 + [0.0] * 4
    until_switch = schedule.model_copy(update={"weight_decay_until": None})
    assert all(rate(schedule, s, 12)[0] == rate(until_switch, s, 12)[0] for s in range(1, 13))


@pytest.mark.parametrize("name", ("cosine", "linear", "constant"))
def test_only_two_stage_changes_the_weight_decay(name):
    schedule = Schedule(name=name, warmup_steps=3)
    assert {rate(schedule, step, 20)[1] for step in range(1, 21)} == {1.0}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup, steps", [(0, 1), (1, 1), (7, 7), (50, 20), (6, 7), (0, 999)])
def test_every_step_of_every_length_has_a_rate_between_zero_and_one(name, warmup, steps):
    schedule = Schedule(name=name, warmup_steps=warmup)
    rates = [rate(schedule, step, steps) for step in range(1, steps + 1)]
    assert all(0 <= factor <= 1 for factor, _ in rates)
    after = [factor for factor, _ in rates][warmup:]
    assert after == sorted(after, reverse=True), "after the warm-up no schedule rises"


@pytest.mark.parametrize("step", (0, -1, 11))
def test_a_step_outside_the_run_is_refused(step):
    with pytest.raises(ValueError, match=f"step {step} is not one of the steps 1 to 10"):
        rate(Schedule(), step, 10)


def test_a_warm_up_that_lasts_into_the_second_stage_aims_at_its_peak():
    schedule = Schedule(name="two_stage", warmup_steps=8, switch_at=0.5, second_lr_ratio=0.5)
    assert [rate(schedule, step, 10) for step in (5, 6, 8)] == [(0.625, 1), (0.375, 0), (0.5, 0)]
