"""Which steps are not to be trusted, told from the losses and gradient norms of those before.

Pure functions of numbers that are the same on every worker and part of a checkpoint, so that a resumed run
judges as an undisturbed one does.
"""

import math
from collections.abc import Sequence
from statistics import fmean, median, pstdev

WINDOW = 64  # applied steps of history
MIN_HISTORY = 16  # of their losses, before one can be called a spike
SIGMAS = 6.0
MAX_ROLLBACKS = 3  # to one checkpoint, before it is given up
MIN_RELATIVE_STD = 1e-3  # of the mean: losses that hardly differ have a deviation of at least this


class Diverged(RuntimeError):
    """Training does not recover by itself, and would do the same again."""


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Whether a loss lies more than 6 standard deviations above the mean of those before."""
    if len(before) < MIN_HISTORY or not math.isfinite(loss):
        return False
    mean = fmean(before)
    return loss > mean + SIGMAS * max(pstdev(before), MIN_RELATIVE_STD * abs(mean))


def is_no_better_than_guessing(val_loss: float, vocab_size: int) -> bool:
    """Whether a validation loss, in nats per token, is above that of a uniform guess, or no number."""
    return not val_loss <= math.log(vocab_size)


def norm_limit(before: Sequence[float], ratio: float) -> float:
    """The largest gradient norm to be applied: `ratio` times the median of those before, which is robust."""
    usual = median(before) if before else 0.0
    return ratio * usual if usual > 0 else math.inf


def append(before: Sequence[float], value: float) -> tuple[float, ...]:
    """The window with one more value."""
    return (*before, value)[-WINDOW:]
