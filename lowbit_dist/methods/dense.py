"""The full-precision control: AdamW on ordinary weights under DeepSpeed ZeRO."""

from typing import ClassVar, Literal

from torch import nn

from lowbit_dist.linear import Linear
from lowbit_dist.methods.method import Method


class Dense(Method):
    name: Literal["dense"] = "dense"
    low_bit: ClassVar[bool] = False

    def linear(self, layer: nn.Linear, *, name: str, is_head: bool, norm_eps: float) -> nn.Module:
        return Linear(layer)
