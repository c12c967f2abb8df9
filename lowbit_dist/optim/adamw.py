"""AdamW: adaptive moments with decoupled weight decay (arXiv 1711.05101, algorithm 2)."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field
from torch import Tensor

from lowbit_dist.ops.states import Slot
from lowbit_dist.optim.rule import Rule
from lowbit_dist.section import Beta, pair, setting


class AdamW(Rule):
    name: Literal["adamw"] = "adamw"
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(pair)] = setting(
        (0.9, 0.95), "How much of the mean gradient and of the mean square stays in a step."
    )
    eps: Annotated[float, Field(ge=1e-20, le=1)] = setting(  # must not vanish in float32
        1e-8, "What is added to the root of the mean square before it divides."
    )
    eps_before_correction: bool = setting(
        False,
        "Whether eps is added before the bias of the mean square is corrected, as in Hugging Face's AdamW "
        "and the released code of DQT: it then weighs more in the first steps.",
    )

    slots: ClassVar = (Slot("m", signed=True), Slot("v", signed=False))
    fused: ClassVar = "adamw"

    def eps_at(self, step: int) -> float:
        """What is added to the corrected root: eps, or what sqrt(v) + eps, corrected, has of it."""
        return self.eps / math.sqrt(1 - self.betas[1] ** step) if self.eps_before_correction else self.eps

    def update(self, g: Tensor, *slots: Tensor, step: int) -> tuple[Tensor, ...]:
        """u = (m c1) / (sqrt(v c2) + eps),  c = 1 / (1 - beta^step);  eps is `eps_at`."""
        m, v = slots
        beta1, beta2 = self.betas
        m = m * beta1 + g * (1 - beta1)
        v = v * beta2 + (g * g) * (1 - beta2)
        size = root(v * (1 / (1 - beta2**step)))
        return (m * (1 / (1 - beta1**step))) / (size + self.eps_at(step)), m, v


def root(x: Tensor) -> Tensor:  # float32
    """The IEEE root, on any machine: torch's float32 sqrt is an ulp off in places, a double root rounded once
    more is not.
    """
    return x.double().sqrt().float()


class BesideAdamW(Rule):
    """A rule of the linear layers' matrices; AdamW, with the same rates, has all else (embeddings, the head,
    gains and biases).
    """

    betas: Annotated[tuple[Beta, Beta], BeforeValidator(pair)] = setting(
        (0.9, 0.95), "The betas of AdamW, which updates what is no matrix of a linear layer."
    )

    def of(self, *, is_linear: bool) -> Rule:
        if is_linear:
            return self
        return AdamW(lr=self.lr, weight_decay=self.weight_decay, states=self.states, betas=self.betas)
