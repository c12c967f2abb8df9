"""Lion: the sign of an interpolated momentum (arXiv 2302.06675, algorithm 2).

One slot instead of AdamW's two.  Its directions are of length 1 everywhere, so it wants a learning rate 3 to
10 times smaller than AdamW's, and a weight decay as many times larger.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator
from torch import Tensor

from lowbit_dist.ops.states import Slot
from lowbit_dist.optim.rule import LearningRate, Rule
from lowbit_dist.section import Beta, pair, setting


class Lion(Rule):
    name: Literal["lion"] = "lion"
    lr: LearningRate = 2e-4
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(pair)] = setting(
        (0.9, 0.99),
        "The share of the momentum in the direction of a step, and how much of the momentum stays in it.",
    )

    slots: ClassVar = (Slot("m", signed=True),)
    fused: ClassVar = "lion"

    def update(self, g: Tensor, *slots: Tensor, step: int) -> tuple[Tensor, ...]:
        """u = sign(beta1 m + (1 - beta1) g);  m = beta2 m + (1 - beta2) g."""
        (m,) = slots
        beta1, beta2 = self.betas
        return (m * beta1 + g * (1 - beta1)).sign(), m * beta2 + g * (1 - beta2)
