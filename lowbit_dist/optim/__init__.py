"""Optimizers: one file each.  To add one, write its file and its line here, or an entry point of the group
`lowbit_dist.optimizers` in a package of your own.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowbit_dist.optim.rule import Rule

if TYPE_CHECKING:
    from lowbit_dist.optim.adamw import AdamW
    from lowbit_dist.optim.lion import Lion

# Name -> module:class, imported when a run names it, so that importing this package needs no torch.
OPTIMIZERS = {
    "adamw": "lowbit_dist.optim.adamw:AdamW",
    "lion": "lowbit_dist.optim.lion:Lion",
}


def __getattr__(name: str) -> Any:
    for place in OPTIMIZERS.values():
        module, _, owner = place.partition(":")
        if owner == name:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["OPTIMIZERS", "AdamW", "Lion", "Rule"]
