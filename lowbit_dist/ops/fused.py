"""The rules that C and Triton compute themselves, and the numbers that they take for a step.

adamw    m = m * beta1 + g * rest1      v = v * beta2 + (g * g) * rest2
         u = (m * correction1) / (sqrt(v * correction2) + eps)
lion     u = sign(m * beta1 + g * rest1)      m = m * beta2 + g * rest2
"""

from typing import Any, NamedTuple

from lowbit_dist.ops.targets import Now, Residual

# Whether each slot of a rule is signed.
SLOTS: dict[str, tuple[bool, ...]] = {"adamw": (True, False), "lion": (True,)}
# A rule's place is its number in C and in Triton; None is no rule, but a direction that is given.
RULES = ("adamw", "lion", None)


class Factors(NamedTuple):
    """In double; each becomes a float32 where it is used."""

    grad_scale: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    correction1: float = 1.0
    correction2: float = 1.0
    eps: float = 0.0


def factors(rule: Any, now: Now) -> Factors:
    """What `rule`, whose `fused` names one of these rules, computes with in this step."""
    beta1, beta2 = rule.betas
    plain = now.grad_scale, beta1, 1 - beta1, beta2, 1 - beta2
    if rule.fused == "lion":
        return Factors(*plain)
    return Factors(*plain, 1 / (1 - beta1**now.update), 1 / (1 - beta2**now.update), rule.eps_at(now.update))


# With a direction that is given none of them is used.
NO_FACTORS = Factors(1.0, 0.0, 0.0, 0.0, 0.0)


class Accumulation(NamedTuple):
    """How the residual of a code is kept, in numbers for a step."""

    kept: float = 0.0  # levels that a stored 1 is still worth
    per_level: float = 0.0  # the stored value of a level
    reach: float = 0.0  # levels
    threshold: float = 0.0  # levels


def accumulation(residual: Residual | None, now: Now) -> Accumulation:
    if residual is None:
        return Accumulation()
    kept = residual.kept
    return Accumulation(
        kept=kept.levels_per_unit * (1 - kept.leak),
        per_level=kept.units_per_level,
        reach=kept.reach,
        threshold=kept.reach if now.threshold is None else now.threshold,
    )
