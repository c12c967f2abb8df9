"""The full-precision control: AdamW on ordinary weights under DeepSpeed ZeRO."""

from typing import ClassVar, Literal

from torch import nn

from lowbit_dist.config import MethodOptions
from lowbit_dist.linear import Linear


class Dense(MethodOptions):
    name: Literal["dense"] = "dense"
    low_bit: ClassVar[bool] = False

    def linear(self, layer: nn.Linear, *, name: str, is_head: bool, norm_eps: float) -> nn.Module:
        return Linear(layer)
