"""How the learning rate and the weight decay change over a run: pure functions of the step."""

import math

from lowbit_dist import ops
from lowbit_dist.config import RunConfig, Schedule
from lowbit_dist.methods.method import Method

SAMPLED = 10_000  # steps that are compared of a long run; a schedule has few bends


def now(config: RunConfig, step: int, update: int) -> ops.Now:
    """The numbers of step `step` of a run, if it becomes update `update` of its weights (both 1-based)."""
    lr, weight_decay = rate(config.schedule, step, config.train.steps)
    rule = config.optimizer
    return ops.Now(
        lr=rule.lr * lr,
        weight_decay=rule.weight_decay * weight_decay,
        step=step,
        seed=config.run.seed,
        update=update,
        nearest=config.method.nearest(step, config.train.steps),
        threshold=config.method.threshold(step, config.train.steps),
    )


def agree(one: RunConfig, other: RunConfig, step: int) -> bool:
    """Whether two runs of one method have the same rates, and see weights alike, in their first `step`
    steps, so that one can be resumed as the other.
    """
    if step > min(one.train.steps, other.train.steps):
        return False
    every = max(1, step // SAMPLED)
    steps = [*range(1, step, every), *([step] if step else [])]
    return all(_changing(one, one.method, s) == _changing(other, one.method, s) for s in steps)


def _changing(config: RunConfig, method: Method, step: int) -> tuple[object, ...]:
    """What a step's place in the run decides."""
    place = step, config.train.steps
    return rate(config.schedule, *place), method.at(*place), method.nearest(*place), method.threshold(*place)


def rate(schedule: Schedule, step: int, steps: int) -> tuple[float, float]:
    """The factors on `optimizer.lr` and `optimizer.weight_decay` in step `step` (1-based) of `steps`.

    The warm-up rises linearly and is full in step `warmup_steps`; the last step has the end value.
    """
    if not 1 <= step <= steps:
        raise ValueError(f"step {step} is not one of the steps 1 to {steps}")
    peak, weight_decay = 1.0, 1.0
    if schedule.name == "two_stage":
        if step > schedule.switch_at * steps:
            peak = schedule.second_lr_ratio
        if step > (schedule.weight_decay_until or schedule.switch_at) * steps:
            weight_decay = 0.0
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps, weight_decay
    if schedule.name == "wsd":
        begin = max(schedule.warmup_steps, steps * (1 - schedule.decay_share))
        progress = max(0.0, (step - begin) / (steps - begin))
    else:
        progress = (step - schedule.warmup_steps) / (steps - schedule.warmup_steps)
    return peak * _decay(schedule, progress), weight_decay


def _decay(schedule: Schedule, progress: float) -> float:
    """What is left of the peak after `progress` (0 to 1) of the way from the warm-up to the end."""
    end = schedule.min_lr_ratio
    match schedule.name:
        case "constant":
            return 1.0
        case "linear" | "wsd":
            return 1 - (1 - end) * progress
        case "cosine":
            return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))
        case "two_stage":
            # BitNet (arXiv 2402.17764, training tips) runs on one line to zero at the end and lowers the
            # line's peak from A to B at the switch: 1.5e-3 falls to 7.5e-4, drops to 5e-4, falls to 0.
            return 1 - progress
