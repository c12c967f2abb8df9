"""What a training method says of itself: the one class that the rest of the package knows methods by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, Field

from lowbit_dist.errors import nearest_multiple
from lowbit_dist.grid import PLANE
from lowbit_dist.section import Section, broken_rule, setting

if TYPE_CHECKING:  # a configuration is read without torch
    from torch import Tensor, nn

    from lowbit_dist.grid import Grid
    from lowbit_dist.ops import Accumulator
    from lowbit_dist.packed import PackedShard, PackedTensor

# Half-range of a grid in units of the weights' rms that minimises the mean squared error on Gaussian weights
# (QuEST, arXiv 2502.05003, released code).
RMS_RANGE = {"ternary": 1.224, "int2": 1.494, "int3": 2.051, "int4": 2.514, "int6": 3.277, "int8": 3.885}
# Of `through`: how the size of a level is found.
Scale = Literal["rms", "absmean"]

GROUP = 128  # of every published ternary model with group scales, and of GPTQ


def _whole_planes(group: int) -> int:
    if group % PLANE:
        raise broken_rule(f"must be a multiple of {PLANE}; the nearest is {nearest_multiple(group, PLANE)}")
    return group


# Consecutive weights of a row that share a scale, where an option says how many.
Group = Annotated[int, Field(ge=PLANE, le=2**20), AfterValidator(_whole_planes)]


class Method(Section):
    """What a weight is, what the forward pass sees of it, and how it is updated.

    It is the `method:` section of a run's configuration.  A method is one file: a class that derives from
    this one, its options as fields, and whichever of these answers differ from the defaults, which are those
    of full-precision training.  No other code knows a method by its name.  README.md beside this file writes
    one, step by step.
    """

    name: str = setting(meaning="The training method, whose options stand beside it.")

    @property
    def label(self) -> str:
        """The method in a word or two, for tables."""
        return self.name

    @property
    def stored(self) -> Grid | None:
        """The grid on which low-bit weights exist, and to which an update rounds; None: weights are latent,
        ordinary numbers.
        """
        return None

    @property
    def forward_grid(self) -> Grid | None:
        """The grid whose levels the forward pass multiplies with; None: it multiplies with no grid's.

        Where it is `stored`, levels are counted in the codes themselves; elsewhere `levels` is asked.
        """
        return self.stored

    def at(self, step: int, steps: int) -> Self:
        """The method as it is in step `step` (from 1) of `steps`: this one, unless what it sends of weights
        changes, once, in training.

        What it says of layers and of first weights stays.
        """
        return self

    def stages(self, steps: int) -> list[Self]:
        """What the method is at first, and what it is at last, if that is another."""
        first, last = self.at(1, steps), self.at(steps, steps)
        return [first] if first == last else [first, last]

    def nearest(self, step: int, steps: int) -> float:
        """How far the rounding of stored weights has gone, in step `step` (from 1) of `steps`, from chance,
        0, to the nearest level, 1.
        """
        return 0.0

    def threshold(self, step: int, steps: int) -> float | None:
        """How far from its code a weight with a residual may be in step `step` (from 1) of `steps`, until the
        code flips: in levels; None: as far as the residual reaches.
        """
        return None

    def linear(self, layer: nn.Linear, *, name: str, is_head: bool, norm_eps: float) -> nn.Module:
        """The layer that takes the place of `layer`, which is called `name` in the model.

        `is_head`: it gives the logits; `norm_eps`: of the model's own RMSNorms.  ValueError if an option
        does not fit the layer's shape.
        """
        from lowbit_dist.linear import Linear

        return Linear(layer)

    @property
    def normed_inputs(self) -> tuple[str, ...]:
        """Linear layers that get a norm before them, by the last parts of their names; a pretrained model in
        which one of these is missing is refused.
        """
        return ()

    def is_low_bit(self, is_linear: bool) -> bool:
        """Of a method with `stored`: whether a parameter exists only as codes.

        `is_linear`: it is the weight of a linear layer other than the head.
        """
        return is_linear

    def quantize(self, weight: Tensor) -> PackedTensor:
        """The first codes and scales of a low-bit weight [rows, K] or [K], float32."""
        raise TypeError(f"method {self.name} has no low-bit weights")

    def through(self, weight: Tensor, grid: Grid, scale: Scale = "rms") -> PackedTensor:
        """A weight [rows, K] or [K], float32, rounded to another grid: for evaluation as if trained on it.

        With one scale per tensor: that of the least error on Gaussian weights (`RMS_RANGE`), or mean|W| /
        high, with which the authors of DQT evaluate 8-bit models (arXiv 2412.04787).
        """
        from lowbit_dist.packed import PackedTensor, representable

        if scale == "rms":
            size = weight.double().square().mean().sqrt() * (2 * RMS_RANGE[grid.name] / (grid.n_levels - 1))
        else:
            size = weight.double().abs().mean() / grid.high
        return PackedTensor.quantize(weight, representable(size.reshape(1).float()), grid)

    def levels(self, weight: Tensor) -> Tensor | None:
        """What the forward pass makes of a linear layer's weight [N, K], as levels of `forward_grid`: int8
        [N, K], or None.

        Flip rate, zero fraction and saturation are counted in them.  `weight` is what the layer's view is
        given: a latent weight in the compute precision, or decoded codes.
        """
        return None

    @property
    def accumulator(self) -> Accumulator | None:
        """What an update keeps of a stored weight beside its code; None: nothing, it is rounded by chance."""
        return None

    def rescaled(self, shard: PackedShard) -> Tensor | None:
        """The scale that a stored weight gets in an update, of what the weight is before it: float32, in the
        shape of `shard.scale`; None: it stays.

        Asked in each update as `sent` is after it: on every worker, parameter by parameter in one order.
        """
        return None

    @property
    def sent_grid(self) -> Grid | None:
        """The grid of the codes that a gather moves: `stored`, or a coarser one, which `sent` then makes."""
        return self.stored

    def sent(self, shard: PackedShard) -> PackedShard:
        """What a gather moves in the place of a worker's shard: the same elements on `sent_grid`.

        Asked if `sent_grid` is not `stored`, at the start and after each update, on every worker and
        parameter by parameter in one order: it may use collectives, as `shard.summed`, if the shard is
        `over_workers`.  Of a whole tensor, as in evaluation, one process asks alone.
        """
        raise TypeError(f"method {self.name} does not say what it sends")

    def seen(self, tensor: PackedTensor) -> PackedTensor:
        """A stored weight as its layer is given it: on `sent_grid`."""
        if self.sent_grid == self.stored:
            return tensor
        from lowbit_dist.packed import PackedTensor

        t = self.sent(tensor.as_shard())
        return PackedTensor(t.codes, t.scale, t.scale_every, t.grid, t.shape)

    def initial(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The first value of a parameter that the method adds to the model (float32), None for all others."""
        return None

    def rates(self, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        """Factors on the learning rate and on the weight decay of a parameter.

        By default vectors (gains of norms, biases, learned scales) do not decay.
        """
        return 1.0, 1.0 if len(shape) > 1 else 0.0

    def finished(self, name: str, weight: PackedTensor | Tensor) -> dict[str, PackedTensor | Tensor]:
        """What leaves in an export for the weight of a linear layer: tensors by name; by default itself.

        `weight` is what the layer's view is given, float32 if it is not packed.  What leaves is what the
        forward pass multiplies with: levels and scales, of any float32, and a bias if the method has one.
        """
        return {name: weight}
