"""SGD with momentum, as PyTorch has it, with decoupled weight decay: m = momentum * m + g,  u = m."""

from typing import ClassVar, Literal

from torch import Tensor

from lowbit_dist.ops import Slot
from lowbit_dist.optim import Rule
from lowbit_dist.optim.rule import LearningRate
from lowbit_dist.section import Beta


class Momentum(Rule):
    name: Literal["momentum"] = "momentum"
    lr: LearningRate = 0.1
    momentum: Beta = 0.9
    states: Literal["fp32", "bf16"] = "fp32"

    slots: ClassVar = (Slot("momentum", signed=True),)

    def update(self, g: Tensor, *slots: Tensor, step: int) -> tuple[Tensor, ...]:
        (m,) = slots
        m = m * self.momentum + g
        return m, m
