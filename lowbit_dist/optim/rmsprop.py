"""RMSProp (Tieleman & Hinton 2012) with AdamW's bias correction and decoupled weight decay: the gradient by
its own size, without a first moment.  For methods that integrate gradients themselves, such as `flip`.

Its second moment is a number for each element, or factored: Adafactor's rows + K numbers for a matrix
[rows, K] (arXiv 1804.04235), without clipping and with this beta.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from lowbit_dist.ops.states import Slot
from lowbit_dist.optim.adafactor import LEAST_EPS, Adafactor
from lowbit_dist.optim.adamw import BesideAdamW, root
from lowbit_dist.optim.rule import Rule
from lowbit_dist.section import Beta, setting


class RMSProp(BesideAdamW):
    name: Literal["rmsprop"] = "rmsprop"
    beta: Beta = setting(0.95, "How much of the mean square stays in a step.")
    eps: Annotated[float, Field(ge=1e-20, le=1)] = setting(
        1e-8,
        "What is added to the root of the mean square before it divides; its square is added to each "
        "gradient's, if the second moment is factored.",
    )
    second_moment: Literal["element", "factored"] = setting(
        "factored",
        "Whether each element has a mean square of its own, in the precision of states, or a matrix one for "
        "each row and each column, in float32.",
    )

    slots: ClassVar = (Slot("v", signed=False),)

    def of(self, *, is_linear: bool) -> Rule:
        if not is_linear or self.second_moment == "element":
            return super().of(is_linear=is_linear)
        eps = max(self.eps**2, LEAST_EPS)
        return Adafactor(lr=self.lr, weight_decay=self.weight_decay, beta=self.beta, eps=eps, clip_rms=0.0)

    def update(self, g: Tensor, *slots: Tensor, step: int) -> tuple[Tensor, ...]:
        """v = beta v + (1 - beta) g^2;  u = g / (sqrt(v / (1 - beta^step)) + eps)."""
        v = slots[0] * self.beta + (g * g) * (1 - self.beta)
        return g / (root(v * (1 / (1 - self.beta**step))) + self.eps), v
