"""Direct Quantized Training (arXiv 2412.04787): the stored weight is the quantised weight, updated by
stochastic rounding.

The stored grid is the forward grid.  Initialisation rounds a random (or pretrained) weight once to the
nearest level; from then on the optimizer's proposal is rounded stochastically back onto the grid in
`ops.adamw_codes_`, and nothing else of it is kept.  The paper's released code re-derives the scale at each
step from the largest weight (which can only shrink it); here the scale of the initialisation is stored and
stays.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lowbit_dist.grid import GRIDS, Grid
from lowbit_dist.linear import INNER_LINEARS, Linear
from lowbit_dist.methods.method import Method
from lowbit_dist.packed import PackedTensor, representable

# Half-range of the grid in units of the weights' rms that minimises the mean squared error on Gaussian
# weights (QuEST, arXiv 2502.05003, released code).
RMS_RANGE = {"ternary": 1.224, "int2": 1.494, "int3": 2.051, "int4": 2.514, "int8": 3.885}


class DQT(Method):
    name: Literal["dqt"] = "dqt"
    grid: Literal["ternary", "int2", "int3", "int4", "int8"] = "ternary"
    tensors: Literal["linears", "all"] = (
        "linears"  # all: embeddings, head and norm gains too, as the released code does
    )
    scale: Literal["absmean", "absmax", "rms"] = "absmean"
    granularity: Literal["tensor", "row"] = "tensor"
    activation_bits: Literal[8] | None = 8
    sub_norms: bool = (
        False  # RMSNorm before o_proj and down_proj (SubLN), as in BitNet; llama.cpp's llama has none
    )
    low_bit: ClassVar[bool] = True

    @property
    def levels(self) -> Grid:
        return GRIDS[self.grid]

    def linear(self, layer: nn.Linear, *, name: str, is_head: bool, norm_eps: float) -> nn.Module:
        if is_head:
            return Linear(layer)
        inner = self.sub_norms and name.rsplit(".", 1)[-1] in INNER_LINEARS
        return Linear(layer, activation_bits=self.activation_bits, norm_eps=norm_eps if inner else None)

    def is_low_bit(self, is_linear: bool) -> bool:
        """Whether a parameter lives in codes; `is_linear`: it is the weight of a linear layer other than
        the head.
        """
        return self.tensors == "all" or is_linear

    def quantize(self, weight: Tensor) -> PackedTensor:
        """The initial codes and scale of a weight [rows, K] or [K], float32."""
        return PackedTensor.quantize(weight, self.initial_scale(weight), self.levels)

    def initial_scale(self, weight: Tensor) -> Tensor:  # [1] or [rows] float32
        """The size of one level.  absmean is the released code's formula, mean|W| / Qp, per tensor or per
        row.
        """
        grid = self.levels
        rows = weight.reshape(1, -1) if self.granularity == "tensor" else weight.reshape(-1, weight.shape[-1])
        rows = rows.double()  # a sum whose rounding cannot show in a float16
        if self.scale == "absmean":
            size = rows.abs().mean(1) / grid.high
        elif self.scale == "absmax":
            size = rows.abs().amax(1) / grid.high
        else:
            size = rows.square().mean(1).sqrt() * (2 * RMS_RANGE[grid.name] / (grid.n_levels - 1))
        return representable(size.to(torch.float32))
