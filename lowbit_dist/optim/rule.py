"""What every optimizer says of itself: how a gradient becomes a direction.

An update is rule x stored x target: a rule maps a gradient and its state (slots) to a direction
in float32; `ops.Stored` keeps each slot in float32, bfloat16 or 8 bits; `ops.Codes` or `ops.Weights` applies
the direction.  A rule knows neither how its slots are kept nor what it moves.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from lowbit_dist.grid import BLOCK
from lowbit_dist.section import Section, setting

if TYPE_CHECKING:  # a configuration is read without torch
    import torch
    from torch import Tensor

    from lowbit_dist.methods.method import Method
    from lowbit_dist.ops import Codes, Now, Slot, Stored, Weights

LearningRate = Annotated[float, Field(ge=0, le=100)]


class Rule(Section):
    """How a gradient becomes a step.

    It is the `optimizer:` section of a run's configuration.  A rule that keeps its slots in fewer precisions
    narrows `states`; one that has other defaults says so.
    """

    name: str = setting(meaning="The optimizer, whose options stand beside it.")
    lr: LearningRate = setting(1e-3, "The peak of the learning rate; the schedule says how it gets there.")
    linear_lr_ratio: Annotated[float, Field(gt=0, le=100)] = setting(
        1.0,
        "The learning rate of the linear layers' weights, without the head, and of all that is stored as "
        "codes, as a share of optimizer.lr; weights on a grid often want one several times smaller.",
        unit="of optimizer.lr",
    )
    weight_decay: Annotated[float, Field(ge=0, le=10)] = setting(
        0.01, "The share of a weight, times the learning rate, that a step takes off (decoupled)."
    )
    states: Literal["fp32", "bf16", "int8"] = setting(
        "int8", f"What the optimizer's states are kept in; int8 has one scale for each {BLOCK} elements."
    )

    slots: ClassVar[tuple[Slot, ...]] = ()
    # What `update` must see at once: any run of elements, whole rows, or the whole matrix.  A rule of scope
    # "shard" has a `step_` instead, which sums over workers what it needs of the others' shards.
    scope: ClassVar[Literal["element", "row", "matrix", "shard"]] = "element"
    # The fused kernel of `ops` that computes this very rule in C and in Triton; None: PyTorch does.
    fused: ClassVar[Literal["adamw", "lion"] | None] = None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        """A rule that overrides another's `update` is not what the other's kernel computes."""
        if "update" in cls.__dict__ and "fused" not in cls.__dict__:
            cls.fused = None

    def rates(
        self, method: Method, name: str, shape: tuple[int, ...], *, is_linear: bool
    ) -> tuple[float, float]:
        """Factors on the learning rate and the weight decay of a parameter.

        `is_linear`: it is the weight of a linear layer other than the head.
        """
        lr, weight_decay = method.rates(name, shape)
        is_code = method.stored is not None and method.is_low_bit(is_linear)
        return lr * (self.linear_lr_ratio if is_linear or is_code else 1.0), weight_decay

    def of(self, *, is_linear: bool) -> Rule:
        """The rule of a parameter; `is_linear`: it is the weight of a linear layer other than the head."""
        return self

    def initial_state(
        self, shape: tuple[int, ...], numel: int | None = None, *, device: torch.device | str = "cpu"
    ) -> list[Stored]:
        """Zeros for each slot of a tensor, or of so many of its elements on one worker."""
        from lowbit_dist.ops import Stored

        n = prod(shape) if numel is None else numel
        return [Stored.zeros(slot, slot.length(shape, n), self.states, device) for slot in self.slots]

    def state_bytes(self, shape: tuple[int, ...], numel: int | None = None) -> int:
        """Of `initial_state`."""
        return sum(stored.nbytes for stored in self.initial_state(shape, numel, device="meta"))

    def update(self, g: Tensor, *slots: Tensor, step: int) -> tuple[Tensor, ...]:
        """The direction u, then the new value of each slot.

        All are float32 of g's shape: [n] with scope "element", else [rows, K] ([K] for vectors).  The
        weight moves by -lr * u; weight decay is decoupled, and not the rule's.  `step`
        counts the updates from 1; a step that was skipped is none.
        """
        raise TypeError(f"optimizer {self.name} does not say how it updates")

    def step_(
        self,
        target: Codes | Weights,  # of N elements, changed in place
        grad: Tensor,  # [N] float32 | bfloat16
        state: list[Stored],  # one for each slot, changed in place
        *,
        now: Now,
        shape: tuple[int, ...],  # of the whole tensor
        start: int = 0,  # the first of the N elements within the whole tensor
        over_workers: bool = False,  # others have the rest of the elements, and call this, too
    ) -> Tensor:  # [1] int64, on the device
        """A whole step of a rule of scope "shard": state and target move; how many codes changed."""
        raise TypeError(f"optimizer {self.name} does not make a step of its own")
