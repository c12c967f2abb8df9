"""Rounding to nearest: each weight to the nearest level; the largest of a group is at the highest one."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lowbit_dist.methods.dqt import DQT
from lowbit_dist.methods.method import GROUP, Group
from lowbit_dist.packed import PackedTensor
from lowbit_dist.quantize.quantizer import Bits, Gram, Granularity, Quantizer, uniform


class RTN(Quantizer):
    name: Literal["rtn"] = "rtn"
    bits: Bits = 4
    granularity: Granularity = "group"
    group: Group = GROUP

    @property
    def method(self) -> DQT:
        return uniform(f"int{self.bits}", self.granularity, self.group)

    def layer(self, weight: Tensor, gram: Gram | None) -> PackedTensor:
        return self.method.quantize(weight)
