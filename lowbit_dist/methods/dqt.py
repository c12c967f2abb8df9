"""Direct Quantized Training (arXiv 2412.04787): the stored weight is the quantised weight, updated by
stochastic rounding.

Quantisation-aware training keeps a full-precision latent behind each low-bit weight, and rounds it anew in
each forward pass.  Here there is none: a random (or pretrained) weight is rounded once to the nearest level,
and its code is all that is kept.  Of a ternary [4096, 4096] that is 4.2 MB of codes, 2 bits each, and one
scale; the latent alone would be 67 MB in float32.

An optimizer's step is far smaller than a level.  Added to the weight it gives a *proposal* between two
levels, which is rounded back onto the grid by chance: up as often as the proposal is far up.

    level      -1          0          1          weight = scale * level, scale 0.02
               |-----------|-----------|
                           ^ code 0, direction u = -0.6, lr 0.001: the weight should move by
                             -lr * u = 0.0006, which are d = 0.0006 / 0.02 = 0.03 levels
    next       0 with probability 0.97,  1 with probability 0.03

    E[next] = 0.97 * 0 + 0.03 * 1 = 0.03 = 0 + d

So the rounding is unbiased: nothing of a gradient is lost on average, it is only made rare.  Rounding to the
nearest would lose all of it, here and at each step after.  The same for 256,000 such weights, of which about
7,680 should flip, give or take 86:

    >>> from lowbit_dist import ops
    >>> n, grid = 256_000, GRIDS["ternary"]
    >>> codes = ops.pack(torch.zeros(n, dtype=torch.int8), grid=grid)
    >>> codes.numel(), codes.dtype
    (64000, torch.uint8)
    >>> target = ops.Codes(codes, torch.tensor([0.02]), n, grid, tensor=0, first_block=0)
    >>> u = torch.full((n,), -0.6)
    >>> int(ops.apply_(target, u, now=ops.Now(lr=0.001, weight_decay=0.0, step=1, seed=0)))
    7564
    >>> round(ops.unpack(codes, grid=grid).float().mean().item(), 4)
    0.0295

Nothing else of the step is kept: what a weight "would have been" is gone, and only the drift of many steps
remains.  One step flips few codes (the flip rate), but in the direction of the gradient; on a fine grid
(int8) nearly every step moves a code, and the walk is close to ordinary training.  At the grid's ends a level
saturates: a ternary 1 that should grow stays.  The rounding is `ops.apply_`, and its random bits are a
function of seed, step, tensor and position (ops/reference.py).

The stored grid is the forward grid, unless `forward` is another, and the scale of the first weights stays.
The authors' released code (`rules: released`) derives it anew in each step, from the largest weight W of the
tensor, and rounds the moved weight in levels of that:

    scale'  =  max(W) / high            the highest level where a weight has it: then scale' is scale
    level'  =  clamp((W (1 - lr * weight_decay) - lr * u) / scale') rounded by chance

So its grid can shrink, once every weight has left the highest level, and never grow.  (The authors decay the
moved weight: that is another step by lr * weight_decay of it.)
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lowbit_dist import ops
from lowbit_dist.errors import ConfigError, plain
from lowbit_dist.grid import BLOCK, GRIDS, PLANE, Grid
from lowbit_dist.linear import INNER_LINEARS, IntPerToken, Linear, sub_norm_gain
from lowbit_dist.machine import in_any_order
from lowbit_dist.methods.method import GROUP, RMS_RANGE, Group, Method, Scale
from lowbit_dist.packed import PackedShard, PackedTensor, representable
from lowbit_dist.section import setting

PIECE = 2**15  # elements


class DQT(Method):
    name: Literal["dqt"] = "dqt"
    grid: Literal["ternary", "int2", "int3", "int4", "int6", "int8"] = setting(
        "ternary", "The levels that a weight may have; the code of each is all that is kept of it."
    )
    rules: Literal["paper", "released"] = setting(
        "paper",
        "Whether the scale of the first weights stays, or is derived in each step from the largest weight, "
        "as in the authors' code, which trains all tensors so, with optimizer.eps_before_correction.",
    )
    tensors: Literal["linears", "all"] = setting(
        "linears",
        "Which weights are codes: those of the linear layers but the head, or embeddings, head and the gains "
        "of norms, too, which is the default under released rules.",
    )
    scale: Literal["absmean", "absmax", "rms"] = setting(
        "absmean",
        "How the size of a level is found from the first weights: by their mean, by the largest, so that "
        "none is cut off, or for the least mean squared error of Gaussian weights.",
    )
    granularity: Literal["tensor", "row", "group"] = setting(
        "tensor", "What has a scale of its own: the whole tensor, each row, or each group of a row."
    )
    group: Group = setting(
        GROUP,
        f"How many consecutive weights of a row share a scale; a multiple of {PLANE}, for granularity group.",
        unit="weights",
    )
    range_factor: Annotated[float, Field(gt=0, le=64)] | None = setting(
        None,
        "How many times as wide as `scale` says the grid is; null is 1, and 2 for absmean where the forward "
        "pass has another grid, so that fewer codes are at the ends.",
    )
    forward: Literal["stored", "ternary"] = setting(
        "stored",
        "What the forward pass multiplies with: the codes as they are stored, or ternary ones, made of them "
        "after each update, which are what gathers move; their scale is the mean magnitude at that moment.",
    )
    forward_from: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0,
        "When the forward pass begins to see ternary codes; until then it sees the stored ones.",
        unit="of train.steps",
    )
    rounding_anneal: Annotated[float, Field(gt=0, le=1)] | None = setting(
        None,
        "The last part of the run, in which rounding goes from chance to the nearest level, in a line; null "
        "leaves it to chance. Its updates are slower: no fused kernel knows them.",
        unit="of train.steps",
    )
    activation_bits: Literal[8] | None = setting(
        8, "Inputs of low-bit layers are rounded to so many bits for each token; null does not.", unit="bits"
    )
    sub_norms: bool = setting(
        False,
        "Whether RMSNorm stands before o_proj and down_proj, too (SubLN), as in BitNet; llama.cpp's llama "
        "has none.",
    )

    @model_validator(mode="before")
    @classmethod
    def _released_rules_are_of_all_tensors(cls, given: Any) -> Any:
        is_released = isinstance(given, Mapping) and given.get("rules") == "released"
        return {"tensors": "all", **given} if is_released else given

    @model_validator(mode="after")
    def _group_fits(self) -> Self:
        if self.group != GROUP and self.granularity != "group":
            raise ConfigError(
                f"method.group ({self.group}) must go with granularity group, not {self.granularity}; write "
                "method.granularity: group, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _rules_fit(self) -> Self:
        if self.rules == "paper":
            return self
        only = {"scale": "absmean", "granularity": "tensor", "range_factor": None, "forward": "stored"}
        for field, value in only.items():
            if (chosen := getattr(self, field)) != value:
                raise ConfigError(
                    f"method.{field} ({plain(chosen)}) must be {plain(value)} under method.rules released, "
                    f"which know no other; write method.{field}: {plain(value)}, or method.rules: paper"
                )
        return self

    @model_validator(mode="after")
    def _forward_is_coarser(self) -> Self:
        if self.forward == "stored":
            if self.forward_from:
                raise ConfigError(
                    f"method.forward_from ({self.forward_from:g}) must go with method.forward ternary, which "
                    "begins then; write method.forward: ternary, or leave it out"
                )
            return self
        if self.grid == self.forward:
            raise ConfigError(
                f"method.forward ({self.forward}) must be coarser than method.grid {self.grid}; write "
                "method.grid: int8, or leave it out"
            )
        if self.tensors == "all":
            raise ConfigError(
                f"method.forward ({self.forward}) must go with method.tensors linears: norms cannot be "
                "ternary; write method.tensors: linears"
            )
        return self

    @property
    def label(self) -> str:
        rules = "" if self.rules == "paper" else f" {self.rules}"
        coarser = "" if self.forward == "stored" else f", {self.forward} forward"
        begins = f" from {self.forward_from:g}" if self.forward_from else ""
        return f"{self.name}{rules} {self.grid}{coarser}{begins}"

    @property
    def stored(self) -> Grid:
        return GRIDS[self.grid]

    @property
    def forward_grid(self) -> Grid:
        return self.sent_grid

    @property
    def sent_grid(self) -> Grid:
        return self.stored if self.forward == "stored" else GRIDS[self.forward]

    def linear(self, layer: nn.Linear, *, name: str, is_head: bool, norm_eps: float) -> nn.Module:
        if is_head:
            return Linear(layer)
        return Linear(
            layer,
            activation=None if self.activation_bits is None else IntPerToken(self.activation_bits),
            norm_eps=norm_eps if name.rpartition(".")[2] in self.normed_inputs else None,
        )

    @property
    def normed_inputs(self) -> tuple[str, ...]:
        return INNER_LINEARS if self.sub_norms else ()

    def is_low_bit(self, is_linear: bool) -> bool:
        return self.tensors == "all" or is_linear

    @property
    def _factor(self) -> float:
        is_finer = self.forward != "stored" and self.scale == "absmean"
        return self.range_factor or (2.0 if is_finer else 1.0)

    def at(self, step: int, steps: int) -> Self:
        if not self.forward_from:
            return self
        seen = self.forward if step > self.forward_from * steps else "stored"
        # The range is that of the first weights.
        return self.model_copy(update={"forward": seen, "forward_from": 0.0, "range_factor": self._factor})

    def nearest(self, step: int, steps: int) -> float:
        length = steps * (self.rounding_anneal or 0.0)
        return max(0.0, 1 - (steps - step) / length) if length else 0.0

    def quantize(self, weight: Tensor) -> PackedTensor:
        return PackedTensor.quantize(weight, self._scale(weight, self.stored, self._factor), self.stored)

    def rescaled(self, shard: PackedShard) -> Tensor | None:
        """Of released rules: with the largest weight of the whole tensor at the highest level.

        A tensor without a positive weight, for which the authors' code divides by 0 or turns all signs, keeps
        its scale.
        """
        if self.rules == "paper":
            return None
        counts = shard.summed(ops.code_counts(shard.codes, grid=shard.grid))
        if counts[-1].item():
            return None
        positive = counts[1 - shard.grid.low :].nonzero()
        if not len(positive):
            return None
        highest = 1 + int(positive[-1])
        return representable((shard.scale.double() * highest / shard.grid.high).float())

    def sent(self, shard: PackedShard) -> PackedShard:
        """Ternary by mean magnitude, as BitNet makes them of latent weights: round(level / mean|level|) of
        the levels that share a scale.  The means are of the whole tensor's levels, summed as integers over
        workers, so they are the same on any number of them.
        """
        planes = shard.levels().view(-1, PLANE)
        first = shard.first_block * (BLOCK // PLANE)
        at = torch.arange(first, first + len(planes), device=planes.device) // (shard.scale_every // PLANE)
        sizes = planes.short().abs().sum(1)
        if len(shard.scale) == 1:  # additions to one place would wait for one another on a GPU
            sums = sizes.sum(0, keepdim=True)
        else:
            sums = torch.zeros(len(shard.scale), dtype=torch.int64, device=planes.device)
            with in_any_order():  # whole numbers
                sums.index_add_(0, at, sizes)
        shard.summed(sums)
        mean = (sums / shard.scale_every).float().clamp_(min=torch.finfo(torch.float32).tiny)
        ternary = (planes / mean[at, None]).round_().clamp_(-1, 1).to(torch.int8)
        scale = representable(shard.scale * mean)
        codes = ops.pack(ternary.view(-1), grid=self.sent_grid)
        return replace(shard, codes=codes, scale=scale, grid=self.sent_grid)

    def levels(self, weight: Tensor) -> Tensor | None:
        return None if self.forward == "stored" else weight.sign().to(torch.int8)

    def through(self, weight: Tensor, grid: Grid, scale: Scale = "rms") -> PackedTensor:
        as_asked = self.model_copy(update={"scale": scale})
        return PackedTensor.quantize(weight, as_asked._scale(weight, grid, 1.0), grid)

    def initial(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        return sub_norm_gain(name, shape)

    def _scale(self, weight: Tensor, grid: Grid, factor: float) -> Tensor:  # [1], [rows] or [groups] float32
        """The size of one level.  absmean is the released code's formula, mean|W| / Qp, over a tensor, a row
        or a group.
        """
        size = {"tensor": weight.numel(), "row": weight.shape[-1], "group": self.group}[self.granularity]
        if self.granularity == "group" and weight.shape[-1] % size:
            raise ValueError(f"a group of {size:,} does not divide a row of {weight.shape[-1]:,}")
        parts = weight.reshape(-1, size)
        if self.scale == "absmean":
            scale = _mean(Tensor.abs_, parts) / grid.high
        elif self.scale == "absmax":
            scale = parts.abs().amax(1).double() / grid.high
        else:
            scale = _mean(Tensor.square_, parts).sqrt() * (2 * RMS_RANGE[grid.name] / (grid.n_levels - 1))
        return representable((scale * factor).to(torch.float32))


def _mean(of: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:  # [N, K] -> [N] float64
    """The mean of each row's `of`, which changes what it is given.

    In double, so that the rounding of the sum cannot show in a float16; by pieces that a core's cache holds.
    """
    size = rows.shape[1]
    if size > PIECE:
        of_row = ([of(part.double()).sum() for part in row.split(PIECE)] for row in rows)
        sums = torch.stack([torch.stack(parts).sum() for parts in of_row])
    else:
        sums = torch.cat([of(few.double()).sum(1) for few in rows.split(PIECE // size)])
    return sums / size
