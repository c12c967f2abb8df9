"""Layers that multiply integers while they train (`precision.matmul: int8`).

    y = Q(x) . (s L)^T  =  (q . L^T) * s / a      q: integers of a token, a of them to 1;  L: levels, s: scale

Both factors are integers already, so nothing is rounded that was not, and the sums are exact: y has the same
bits in any order of the sum, on any number of threads, however a batch is cut.  It is what
`inference.IntegerLinear` computes of a trained model, but for the last digit of 1 / a.
dx and dW are products of numbers, as they are without.

It takes a method that stores codes (dqt and flip: any grid, and what `forward: ternary` makes of them),
inputs of 8 bits, and a scale for a tensor or for each row: with one for each group the sum would be one of
numbers.  Layers without low-bit weights, as the head, multiply as before.
"""

from collections.abc import Iterator

from torch import nn

from lowbit_dist import ops
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.linear import IntPerToken, Linear, decodes
from lowbit_dist.model import linear_weights, low_bit_names, scale_every


def layers(config: RunConfig, model: nn.Module) -> list[Linear]:
    """Those of a run's model that multiply integers; ConfigError if one of its low-bit layers cannot."""
    if config.precision.matmul != "int8":
        return []
    return list(_layers(config, model))


def _layers(config: RunConfig, model: nn.Module) -> Iterator[Linear]:
    low_bit = set(low_bit_names(model, config.method))
    for name in linear_weights(model):
        layer, shape = model.get_submodule(name.rpartition(".")[0]), tuple(model.get_parameter(name).shape)
        if name not in low_bit:
            continue
        if not (isinstance(layer, Linear) and decodes(layer) and layer.view is None):
            raise _impossible(f"layers that multiply with their codes alone, and {name} is not such a one's")
        if not (type(layer.activation) is IntPerToken and layer.activation.bits == 8):
            raise _impossible(f"inputs of 8 bits, and those of {name} are not", "method.activation_bits: 8")
        every = scale_every(config.method, shape)
        if every not in (layer.weight.numel(), shape[-1]):
            raise _impossible(
                f"a scale for a tensor or a row, and {name} has one for each {every:,} elements",
                "method.granularity: row",
            )
        if shape[-1] > ops.LONGEST_ROW:
            raise _impossible(
                f"rows of at most {ops.LONGEST_ROW:,} elements, whose sums fit 32 bits, and those of {name} "
                f"have {shape[-1]:,}"
            )
        yield layer


def _impossible(rule: str, instead: str | None = None) -> ConfigError:
    ways = " or ".join(filter(None, (instead, "precision.matmul: auto")))
    return ConfigError(f"precision.matmul (int8) must go with {rule}; write {ways}")
