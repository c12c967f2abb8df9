"""Muon: momentum whose matrix is made orthogonal (Jordan et al. 2024; for language models arXiv 2502.16982).

It updates the matrices of the linear layers, with one slot instead of AdamW's two; all else (embeddings, the
head, gains and biases) is AdamW's.  The direction has the root mean square of an AdamW step, so one learning
rate and one weight decay serve both (arXiv 2502.16982, eq. 4).
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lowbit_dist.ops.states import Slot
from lowbit_dist.optim.adamw import BesideAdamW
from lowbit_dist.section import Beta, setting

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic whose slope at zero is greatest; its author's
ITERATIONS = 5
LEAST_NORM = 1e-7
RMS = 0.2  # of AdamW's directions, over a run


class Muon(BesideAdamW):
    name: Literal["muon"] = "muon"
    momentum: Beta = setting(0.95, "How much of the mean gradient stays in a step.")
    nesterov: bool = setting(True, "Whether the direction looks ahead by the gradient of this step.")

    slots: ClassVar = (Slot("m", signed=True),)
    scope: ClassVar = "matrix"

    def update(self, g: Tensor, *slots: Tensor, step: int) -> tuple[Tensor, ...]:
        """m = mu m + (1 - mu) g;  u = 0.2 sqrt(max(rows, K)) orthogonal(g + mu (m - g), or m)."""
        (m,) = slots
        m = torch.lerp(m, g, 1 - self.momentum)
        direction = torch.lerp(g, m, self.momentum) if self.nesterov else m
        return orthogonal(direction).float() * (RMS * math.sqrt(max(g.shape))), m


def orthogonal(matrix: Tensor) -> Tensor:  # [rows, K] float32 -> [rows, K] bfloat16
    """U S' V^T of the matrix's U S V^T, S' from 0.7 to 1.2: five steps of a Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(torch.bfloat16)
    x = x.t() if is_tall else x
    x = x / x.norm().clamp(min=LEAST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if is_tall else x
