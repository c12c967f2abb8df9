"""A model as it leaves: each parameter as levels and scales, or as the numbers that the forward pass has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lowbit_dist import model as models
from lowbit_dist.errors import ConfigError
from lowbit_dist.grid import Grid
from lowbit_dist.linear import IntPerToken, Linear
from lowbit_dist.packed import PackedTensor, representable
from lowbit_dist.trained import Trained

if TYPE_CHECKING:
    from lowbit_dist.tokenizer import TextTokenizer


class Layout(NamedTuple):
    """What a format must be able to hold of a low-bit weight."""

    shape: tuple[int, ...]
    grid: Grid
    scale_every: int
    planes: int  # of which it is the sum

    @property
    def group(self) -> int | None:
        """How many weights of a row share a scale; None: a whole row, or the whole matrix."""
        return self.scale_every if self.scale_every < self.shape[-1] else None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def has_one_scale(self) -> bool:
        return self.scale_every == self.numel


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What `Method.finished` makes of a trained model; its tensors are read, one by one, when asked for."""

    trained: Trained  # with its weights as they are in its compute precision, to be computed in float32
    precision: Literal["bf16", "fp32"]  # in which it was trained to be computed
    architecture: str  # of transformers' classes
    linears: tuple[str, ...]  # weights of the linear layers but the head
    rounding: nn.Module | None  # through which the inputs [..., K] of these go; None: they stay as they are
    names: list[str]  # of every parameter, sorted; those that the method adds, as biases, too
    tensor: Callable[[str], PackedTensor | Tensor]  # float32 where it is not packed
    has_half_scales: bool = False  # scales of rows and groups are rounded to float16

    @property
    def hf_config(self) -> Any:  # PretrainedConfig
        return self.trained.hf_config

    @property
    def tokenizer(self) -> TextTokenizer:
        return self.trained.tokenizer

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """Of each linear layer's weight that is low-bit."""
        tensors = ((name, self.tensor(name)) for name in self.linears)
        return {
            name: Layout(tensor.shape, tensor.grid, tensor.scale_every, tensor.planes)
            for name, tensor in tensors
            if isinstance(tensor, PackedTensor)
        }

    def numbers(self, name: str) -> Tensor:  # of its shape, float32
        """level x scale, element by element, or what the tensor is."""
        tensor = self.tensor(name)
        return tensor.dequantize(torch.float32) if isinstance(tensor, PackedTensor) else tensor

    def with_half_scales(self) -> Finished:
        """The same with scales of rows and groups rounded to float16, where they are not float16 already, as
        those of stored weights are.
        """

        def read(name: str) -> PackedTensor | Tensor:
            tensor = self.tensor(name)
            if not isinstance(tensor, PackedTensor) or len(tensor.scale) == 1:
                return tensor
            return replace(tensor, scale=representable(tensor.scale))

        return replace(self, tensor=read, has_half_scales=True)

    def check_low_bit(self, format: str) -> None:
        """ConfigError unless there are low-bit linear layers, each of one plane."""
        if not self.linears:
            raise ConfigError(
                f"{self.trained.path} has no linear layers (nn.Linear), of which --format {format} is; write "
                "--format hf"
            )
        if not self.layouts:
            raise ConfigError(
                f"{self.trained.path} is not low-bit (method {self.trained.method.name}), as --format "
                f"{format} is; quantise it first, with lowbit quantize, or write --format hf"
            )
        for name, layout in self.layouts.items():
            if layout.planes > 1:
                raise ConfigError(
                    f"--format {format} holds no sums, as {name} is of {layout.planes} planes; quantise with "
                    "lowbit quantize --tied, whose planes are one grid, or write --format hf"
                )


def of(trained: Trained) -> Finished:
    """ConfigError if no format could hold the model, for what its layers do with their inputs."""
    dtype, method = models.DTYPES[trained.precision], trained.method
    built = models.of_hf_config(trained.hf_config, method, dtype)
    linears = tuple(models.linear_weights(built))

    def computed(name: str) -> PackedTensor | Tensor:
        tensor = trained.finite(name)
        return tensor if isinstance(tensor, PackedTensor) else tensor.to(dtype).float()

    def leaving(name: str) -> dict[str, PackedTensor | Tensor]:
        tensor = computed(name)
        tensor = method.seen(tensor) if isinstance(tensor, PackedTensor) else tensor
        if name not in linears:
            return {name: tensor}
        try:
            return method.finished(name, tensor)
        except ValueError as error:  # of a latent weight
            raise ConfigError(
                f"{name} {list(tensor.shape)} cannot be packed: {error}; export a model of other sizes"
            ) from None

    # What a method adds to one linear layer, it adds to all.
    added = [key[len(_layer(linears[0])) :] for key in leaving(linears[0])] if linears else []
    owners = {_layer(name) + suffix: name for name in linears for suffix in added}

    def read(name: str) -> PackedTensor | Tensor:
        tensor = leaving(owners.get(name, name))[name]
        if name in trained.names and name not in linears and name in owners:
            return computed(name) + tensor  # type: ignore[operator]  # a bias of the model's own
        return tensor

    return Finished(
        # Two implementations of a float32 forward pass agree; in bfloat16 they differ by more than most
        # mistakes in weights do.
        trained=replace(trained, precision="fp32", read=computed),
        precision=trained.precision,
        architecture=type(built).__name__,
        linears=linears,
        rounding=_rounding(trained, built, linears),
        names=sorted({*trained.names, *owners}),
        tensor=read,
    )


def _rounding(trained: Trained, built: nn.Module, linears: tuple[str, ...]) -> IntPerToken | None:
    """ConfigError if inputs are quantised in a way that no format has."""
    activations = [getattr(built.get_submodule(_layer(name)[:-1]), "activation", None) for name in linears]
    others = [a for a in activations if a is not None and not (isinstance(a, IntPerToken) and a.bits == 8)]
    if others or len({a is None for a in activations}) > 1:
        how = str(others[0]) if others else "of some layers alone"
        raise ConfigError(
            f"{trained.path} quantises the inputs of linear layers as no format does: {how}; train with "
            "method.activation_bits: 8 or null"
        )
    return activations[0] if activations else None  # type: ignore[no-any-return]


def _layer(name: str) -> str:
    """`layers.0.q_proj.` of `layers.0.q_proj.weight`."""
    return name[: name.rfind(".") + 1]


class Network:
    """Our own forward pass in float32, by the method's layers.

    Not by the tensors that leave: so a method that finishes a weight wrongly is found out, too.
    """

    def __init__(self, model: Finished):
        self._built = model.trained.network(packed=True)
        layers = (self._built.get_submodule(_layer(name)[:-1]) for name in model.linears)
        self._linears = [layer for layer in layers if isinstance(layer, Linear)]

    def logits(self, ids: Sequence[int], rounding: nn.Module | None) -> Tensor:
        """[len(ids), vocabulary] float32, with inputs [..., K] of linear layers put through `rounding`."""
        for layer in self._linears:
            layer.activation = rounding
        return logits(self._built, ids)


def logits(network: Any, ids: Sequence[int]) -> Tensor:  # [len(ids), vocabulary] float32
    """What a causal language model of transformers makes of one text."""
    device = next(network.parameters()).device
    with torch.inference_mode():
        out: Tensor = network(input_ids=torch.tensor([list(ids)], device=device)).logits[0].float().cpu()
        return out


def rows_of_scales(tensor: PackedTensor) -> Tensor:  # [rows, scales of a row] float32
    """The scales of a matrix, row by row, where one of all of it is one of each row."""
    rows, row = tensor.shape
    per_row = tensor.scale if tensor.scale_every <= row else tensor.scale.expand(rows)
    return per_row.reshape(rows, -1).contiguous()
