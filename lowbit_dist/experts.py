"""Mixtures of experts: their routers, and that every expert runs on every worker.

An expert to which no token goes is passed over by most of transformers' models.  Under ZeRO each worker takes
part in the gather and the reduction of each weight, so workers whose tokens choose different experts would
wait for each other for ever.  Here the loop over the chosen experts is one over all; a layer multiplies no
rows for those that are not, and their gradient is zero.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode


def of(module: nn.Module) -> nn.ModuleList | None:
    """The experts that a module chooses from for each token."""
    lists = (child for name, child in module.named_children() if "expert" in name)
    return next((child for child in lists if isinstance(child, nn.ModuleList) and len(child) > 1), None)


def mixtures(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that have experts."""
    return [module for module in model.modules() if of(module) is not None]


def number(model: nn.Module) -> int:
    """The experts of each mixture of a model; 1 of one that has none."""
    return max((len(of(mixture) or ()) for mixture in mixtures(model)), default=1)


def routers(model: nn.Module) -> list[nn.Module]:
    """The linear layers that weigh experts, or a shared one: a few rows, whose rounding would send tokens
    elsewhere.
    """
    weighing: list[nn.Module] = []
    for mixture in mixtures(model):
        experts: nn.ModuleList = of(mixture)  # type: ignore[assignment]
        inside = set(experts.modules())
        layers = (layer for layer in mixture.modules() if type(layer) is nn.Linear and layer not in inside)
        weighing += [layer for layer in layers if layer.out_features in (1, len(experts))]
    return weighing


def run_all(model: nn.Module) -> None:
    """Let each mixture of the model run all its experts in each forward pass, whatever its tokens choose."""
    for mixture in mixtures(model):
        # A class and not a wrapped method: copies of the model run it on their own weights.
        mixture.__class__ = _running_all(type(mixture))  # type: ignore[arg-type]  # a class can be hashed


@cache
def _running_all(mixture: Any) -> Any:  # of a class
    return type(mixture.__name__, (_RunsAll, mixture), {})


class _RunsAll(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _AllChosen(len(of(self) or ())):
            return super().forward(*args, **kwargs)


class _AllChosen(TorchFunctionMode):
    """Inside, the chosen ones of `n` experts are all of them.

    Transformers asks for `(tokens of each expert > 0).nonzero()` and goes through the answer.
    """

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def __torch_function__(
        self, func: Any, types: Collection[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.nonzero and args[0].shape == (self.n,):
            return [torch.tensor([i]) for i in range(self.n)]  # on the CPU: indices that need no waiting
        return func(*args, **(kwargs or {}))


class _NoneChosen(_AllChosen):
    """The same, where to each of them goes no token."""

    def __torch_function__(
        self, func: Any, types: Collection[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.where and len(args) == 1 and not kwargs:
            mask: Tensor = args[0]
            return tuple(mask.new_empty(0, dtype=torch.long) for _ in mask.shape)
        return super().__torch_function__(func, types, args, kwargs)


def why_idle(model: Any) -> str | None:  # of a PreTrainedModel
    """Which mixture of a model leaves experts out to which no token goes, and how that is known; None if none
    does.
    """
    for mixture in {type(mixture): mixture for mixture in mixtures(model)}.values():
        experts: nn.ModuleList = of(mixture)  # type: ignore[assignment]
        try:
            n_run = _run_without_tokens(mixture, experts, model.config.hidden_size)
        except Exception as error:  # of whatever the model's own code asks of its input
            return f"{type(mixture).__name__} fails without tokens, {type(error).__name__}"
        if n_run < len(experts):
            return f"{type(mixture).__name__} runs {n_run} of {len(experts)}"
    return None


def _run_without_tokens(mixture: nn.Module, experts: nn.ModuleList, hidden_size: int) -> int:
    """How many of the experts run in a pass on tensors without values, in which no token goes to any."""
    ran: set[nn.Module] = set()
    hooks = [expert.register_forward_hook(lambda module, *_: ran.add(module)) for expert in experts]
    try:
        with FakeTensorMode(), torch.no_grad(), _NoneChosen(len(experts)):
            named = mixture.named_parameters()
            weights = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in named}
            tokens = torch.empty(1, 2, hidden_size, dtype=next(mixture.parameters()).dtype)
            torch.func.functional_call(mixture, weights, (tokens,))
    finally:
        for hook in hooks:
            hook.remove()
    return len(ran)
