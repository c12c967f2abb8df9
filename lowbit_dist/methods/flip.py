"""Flip accumulators: codes, and beside each a byte or two of what gradients have asked of it and not yet got.

DQT forgets the part of a proposal that does not become a level, and so moves by chance.  Here it is kept: a
weight is x = q + r levels, q its code, r its *residual*, within half a level and a hysteresis:

    x       <-  q + (1 - leak) r, then decayed and moved by the optimizer's step, in levels
    q'      =   round(x) where |x - q| > 1/2 + hysteresis, else q;  within the grid
    r'      =   x - q' within its reach, rounded by chance to one of 255 numbers, or to bfloat16, which is as
                fine at half a level and finer nearer to the code;  or 0 after a flip (reset)

The forward pass sees scale * q alone, which has the scale of the first weights.  With the whole x in full
precision this is straight-through training of a latent (BitNet, of a fixed scale); the byte costs a fourth of
that latent.  Flip thresholds in the place of a latent: arXiv 1906.02107 (Bop), and the released code of
BitBop and TTF, in which they rise towards the end, so that fewer codes flip: the hysteresis may move over the
run, in a line.  The residual integrates gradients, so that no first moment is needed: `optimizer.name:
rmsprop` has none.  That is 1.25 bytes a weight, states included; and with its `second_moment: element` 2.25.
Updates are compiled on a CPU; on a GPU they are plain PyTorch, without a kernel of their own.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lowbit_dist.errors import ConfigError
from lowbit_dist.methods.dqt import DQT
from lowbit_dist.ops import Accumulator
from lowbit_dist.section import setting


class Flip(DQT):
    name: Literal["flip"] = "flip"  # type: ignore[assignment]
    hysteresis: Annotated[float, Field(ge=0, le=1)] = setting(
        0.0, "How far beyond half a level a weight must have gone until its code flips.", unit="levels"
    )
    last_hysteresis: Annotated[float, Field(ge=0, le=1)] | None = setting(
        None,
        "Where the hysteresis has gone by the last step, in a line; null leaves it where it is.",
        unit="levels",
    )
    leak: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0, "The share of its residual that a weight forgets in each step."
    )
    rules: Literal["paper"] = setting(  # type: ignore[assignment]
        "paper", "The scale of the first weights stays: a residual is a share of it."
    )
    on_flip: Literal["subtract", "reset"] = setting(
        "subtract", "What a flip leaves of the residual: what is more than a level, or nothing."
    )
    residual: Literal["int8", "bf16"] = setting(
        "int8", "What a residual is kept in: a byte, of 127 steps to its reach, or two."
    )

    @model_validator(mode="after")
    def _codes_are_not_rounded(self) -> Self:
        if self.rounding_anneal is not None:
            raise ConfigError(
                f"method.rounding_anneal ({self.rounding_anneal:g}) must be left out for method flip, which "
                "rounds residuals alone by chance; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _hysteresis_is_above_noise(self) -> Self:
        for field in ("hysteresis", "last_hysteresis"):
            value = getattr(self, field)
            if value and value < (least := self.accumulator.spacing(0.5 + value)):
                fits = math.ceil(1e4 * least) / 1e4
                raise ConfigError(
                    f"method.{field} ({value:g}) must be 0 or at least {fits:g}, by which residuals in "
                    f"{self.residual} are rounded up or down; write method.{field}: {fits:g}, or 0"
                )
        return self

    @property
    def accumulator(self) -> Accumulator:
        widest = max(self.hysteresis, self.last_hysteresis or 0.0)
        return Accumulator(0.5 + widest, self.leak, self.on_flip == "reset", self.residual)

    def threshold(self, step: int, steps: int) -> float | None:
        if self.last_hysteresis is None:
            return None
        return 0.5 + self.hysteresis + (self.last_hysteresis - self.hysteresis) * step / steps
