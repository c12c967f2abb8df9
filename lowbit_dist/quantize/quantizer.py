"""What a method of post-training quantisation says of itself: the class that the rest knows them by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator
from torch import Tensor

from lowbit_dist.methods.dqt import DQT
from lowbit_dist.methods.method import GROUP, Method
from lowbit_dist.packed import PackedTensor
from lowbit_dist.section import Section, no_truth

# Of grids of whole numbers, from -2^(b-1) to 2^(b-1) - 1; ternary is PTQTP's.
Bits = Annotated[Literal[2, 3, 4, 6, 8], BeforeValidator(no_truth)]
Granularity = Literal["group", "row"]


@dataclass
class Gram:
    """What the inputs x of a layer are to GPTQ: the sum of x x^T over calibration tokens."""

    total: Tensor  # [K, K] float32
    n_tokens: int = 0

    def add(self, x: Tensor) -> None:  # [..., K]
        tokens = x.reshape(-1, x.shape[-1]).float()
        self.total.addmm_(tokens.t(), tokens)
        self.n_tokens += len(tokens)

    @property
    def is_enough(self) -> bool:
        """Whether as many tokens have come as there are inputs, so that it may have full rank."""
        return self.n_tokens >= len(self.total)


class Quantizer(Section):
    """A method with its options, which are those of the command line."""

    name: str
    needs_calibration: ClassVar[bool] = False

    @property
    def method(self) -> Method:
        """The training method whose weights the result has: from it training can go on."""
        raise NotImplementedError

    @property
    def summed_planes(self) -> int:
        """How many low-bit tensors a weight is the sum of."""
        return 1

    def layer(self, weight: Tensor, gram: Gram | None) -> PackedTensor:
        """A linear layer's weight [N, K] float32, quantised.

        `gram`: of the layer's inputs; None if there are none, or too few.  ValueError if it cannot be done.
        """
        raise NotImplementedError


def uniform(grid: str, granularity: Granularity, group: int) -> DQT:
    """Symmetric weights: a scale for each group or row, by its largest weight; activations stay as they are.

    As DQT has them, for that is what a result trains on by.
    """
    size = group if granularity == "group" else GROUP
    content = {"grid": grid, "scale": "absmax", "granularity": granularity, "group": size}
    return DQT(**content, activation_bits=None)  # type: ignore[arg-type]
