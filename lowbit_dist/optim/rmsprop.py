"""RMSProp (Tieleman & Hinton 2012) with AdamW's bias correction and decoupled weight decay: the gradient by
its own size, without a first moment.  For methods that integrate gradients themselves, such as `flip`.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from lowbit_dist.ops.states import Slot
from lowbit_dist.optim.adamw import BesideAdamW
from lowbit_dist.section import Beta, setting


class RMSProp(BesideAdamW):
    name: Literal["rmsprop"] = "rmsprop"
    beta: Beta = setting(0.95, "How much of the mean square stays in a step.")
    eps: Annotated[float, Field(ge=1e-20, le=1)] = setting(
        1e-8, "What is added to the root of the mean square before it divides."
    )

    slots: ClassVar = (Slot("v", signed=False),)

    def update(self, g: Tensor, *slots: Tensor, step: int) -> tuple[Tensor, ...]:
        """v = beta v + (1 - beta) g^2;  u = g / (sqrt(v / (1 - beta^step)) + eps)."""
        v = slots[0] * self.beta + (g * g) * (1 - self.beta)
        return g / ((v * (1 / (1 - self.beta**step))).sqrt() + self.eps), v
