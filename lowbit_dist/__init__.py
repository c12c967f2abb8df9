"""Distributed training of language models whose weights exist only as packed low-bit codes.

import lowbit_dist as lb

lb.convert_(model, lb.methods.DQT(grid="ternary"))          any PyTorch model with nn.Linears
optimizer = lb.Optimizer(model, lb.optim.AdamW(lr=1e-3))

summary = lb.train(lb.load("configs/quickstart.yaml"))      what `lowbit train` does
trained = lb.open("quickstart")                             a run's weights, tokenizer and forward pass
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from lowbit_dist import methods, optim
    from lowbit_dist.cluster import train
    from lowbit_dist.configfile import from_dict, load
    from lowbit_dist.convert import Optimizer, convert_
    from lowbit_dist.errors import ConfigError
    from lowbit_dist.trained import open

# Name -> the module that has it.  They are imported when they are used: most need torch, some Ray.
_HOMES = {
    "ConfigError": "errors",
    "Optimizer": "convert",
    "convert_": "convert",
    "from_dict": "configfile",
    "load": "configfile",
    "open": "trained",
    "train": "cluster",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"lowbit_dist.{_HOMES[name]}"), name)
    if name in ("methods", "optim"):
        return import_module(f"lowbit_dist.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ConfigError",
    "Optimizer",
    "__version__",
    "convert_",
    "from_dict",
    "load",
    "methods",
    "open",
    "optim",
    "train",
]
