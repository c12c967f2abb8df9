"""How the layers of a run's model multiply while they train (`precision.matmul`, `precision.grad_input`).

auto: integers, as below, where that was measured faster, or else what is computed in.

fp8: all linear layers but the head multiply 8-bit floats, forward and backward (float8.py).

int8: low-bit layers multiply integers in the forward pass.

    y = Q(x) . (s L)^T  =  (q . L^T) * s / a      q: integers of a token, a of them to 1;  L: levels, s: scale

Both factors are integers already, so nothing is rounded that was not, and the sums are exact: y has the same
bits in any order of the sum, on any number of threads, however a batch is cut.  It is what
`inference.IntegerLinear` computes of a trained model, but for the last digit of 1 / a.  dW is a product of
numbers, as it is without; so is dx, unless `grad_input` has the rows of dy rounded as tokens are.

It takes a method that stores codes (dqt and flip: any grid, and what `forward: ternary` makes of them),
inputs of 8 bits, and a scale for a tensor or for each row: with one for each group the sum would be one of
numbers.  Layers without low-bit weights multiply as before.
"""

import torch.distributed as dist
from torch import nn

from lowbit_dist import float8, machine, ops
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.linear import IntPerToken, Linear, decodes
from lowbit_dist.model import linear_weights, low_bit_names, scale_every, shapes


def check(config: RunConfig, vocab_size: int) -> None:
    """ConfigError if a layer of the run's model cannot multiply as it is asked to."""
    _layers(config, shapes(config, vocab_size), config.precision.matmul)


def choose_(config: RunConfig, model: nn.Module) -> None:
    """Let the layers of the run's model multiply as they are asked to, and of `auto` in what is computed in;
    ConfigError if one of them cannot.
    """
    for layer in _layers(config, model, config.precision.matmul):
        if config.precision.matmul == "int8":
            layer.in_integers = True
            layer.grad_in_integers = config.precision.grad_input == "int8"
        else:
            layer.product = float8.product


def left_open(config: RunConfig, model: nn.Module) -> list[Linear]:
    """Layers that may multiply integers under `auto`; none if one of the low-bit ones cannot."""
    if (
        config.precision.matmul != "auto"
        or config.precision.compute != "bf16"
        or config.method.stored is None
    ):
        return []
    try:
        return _layers(config, model, "int8")
    except ConfigError:
        return []


def are_faster(device: str) -> bool:
    """Whether layers multiply integers under `auto` in a run that begins on this machine's `device`: where
    that was measured faster than numbers, by compiled code.
    """
    return device == "cpu" and machine.multiplies_integers_faster() and ops.multiplies_int8()


def settle_(layers: list[Linear], device: str, *, is_new: bool = True, before: bool = False) -> bool:
    """Let those layers multiply integers where that is faster for every worker, or in a run that is not new
    if they did so `before`, which its checkpoint says; whether they do, on all workers alike.
    """
    wanted = before and not is_new
    if layers and is_new:
        of_workers: list[bool | None] = [None] * dist.get_world_size()
        dist.all_gather_object(of_workers, are_faster(device))
        wanted = all(of_workers)
    for layer in layers:
        layer.in_integers = wanted
    return wanted and bool(layers)


def _layers(config: RunConfig, model: nn.Module, matmul: str) -> list[Linear]:
    """Those that do not multiply in the numbers that they compute in, where all multiply so."""
    layers: list[Linear] = []
    if matmul in ("auto", "bf16"):
        return layers
    low_bit = set(low_bit_names(model, config.method))
    for name in linear_weights(model):
        layer = model.get_submodule(name.rpartition(".")[0])
        if matmul == "int8" and name not in low_bit:
            continue
        if not (isinstance(layer, Linear) and decodes(layer)):
            raise ConfigError(
                f"precision ({matmul}) must go with layers that multiply as lowbit_dist.linear.Linear does, "
                f"not with {type(layer).__name__}, which has {name}; write precision: bf16"
            )
        if matmul == "int8":
            _check_integers(name, layer, config, tuple(model.get_parameter(name).shape))
        layers.append(layer)
    return layers


def _check_integers(name: str, layer: Linear, config: RunConfig, shape: tuple[int, ...]) -> None:
    if layer.view is not None:
        raise _no_integers(f"layers without a view of their codes, and that of {name} has one", config)
    if not (type(layer.activation) is IntPerToken and layer.activation.bits == 8):
        why = f"inputs of 8 bits, and those of {name} are not"
        raise _no_integers(why, config, "method.activation_bits: 8")
    every = scale_every(config.method, shape)
    if every not in (layer.weight.numel(), shape[-1]):
        why = f"a scale for a tensor or a row, and {name} has one for each {every:,} elements"
        raise _no_integers(why, config, "method.granularity: row")
    longest = ops.LONGEST_ROW
    if shape[-1] > longest:
        raise _no_integers(
            f"rows of at most {longest:,} elements, whose sums fit 32 bits, and those of {name} have "
            f"{shape[-1]:,}",
            config,
        )
    if config.precision.grad_input == "int8" and shape[0] > longest:
        raise ConfigError(
            f"precision.grad_input (int8) must go with columns of at most {longest:,} elements, whose sums "
            f"fit 32 bits, and those of {name} have {shape[0]:,}; write precision.grad_input: auto"
        )


def _no_integers(rule: str, config: RunConfig, instead: str | None = None) -> ConfigError:
    ways = " or ".join(filter(None, (instead, config.precision.without_integers)))
    return ConfigError(f"precision.matmul (int8) must go with {rule}; write {ways}")
