"""The full-precision control: ordinary weights under DeepSpeed ZeRO.

It is what `Method` is by default.
"""

from typing import Literal

from lowbit_dist.methods.method import Method


class Dense(Method):
    name: Literal["dense"] = "dense"
