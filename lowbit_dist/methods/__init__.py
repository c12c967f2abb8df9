"""Training methods: one file each.  To add one, write its file and its line here, or an entry point of the
group `lowbit_dist.methods` in a package of your own; README.md beside this file shows both.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowbit_dist.methods.method import Method

if TYPE_CHECKING:
    from lowbit_dist.methods.bitnet import BitNet
    from lowbit_dist.methods.dense import Dense
    from lowbit_dist.methods.dqt import DQT

# Name -> module:class, imported when a run names it, so that importing this package needs no torch.
METHODS = {
    "dqt": "lowbit_dist.methods.dqt:DQT",
    "bitnet": "lowbit_dist.methods.bitnet:BitNet",
    "dense": "lowbit_dist.methods.dense:Dense",
}


def __getattr__(name: str) -> Any:
    for place in METHODS.values():
        module, _, owner = place.partition(":")
        if owner == name:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["DQT", "METHODS", "BitNet", "Dense", "Method"]
