"""Optimizers: one file each.  To add one, write its file and its line here, or an entry point of the group
`lowbit_dist.optimizers` in a package of your own.
"""

from typing import TYPE_CHECKING

from lowbit_dist.optim.rule import Rule
from lowbit_dist.registry import lazily

if TYPE_CHECKING:
    from lowbit_dist.optim.adafactor import Adafactor
    from lowbit_dist.optim.adamw import AdamW
    from lowbit_dist.optim.lion import Lion
    from lowbit_dist.optim.muon import Muon
    from lowbit_dist.optim.rmsprop import RMSProp

# Name -> module:class, imported when a run names it, so that importing this package needs no torch.
OPTIMIZERS = {
    "adafactor": "lowbit_dist.optim.adafactor:Adafactor",
    "adamw": "lowbit_dist.optim.adamw:AdamW",
    "lion": "lowbit_dist.optim.lion:Lion",
    "muon": "lowbit_dist.optim.muon:Muon",
    "rmsprop": "lowbit_dist.optim.rmsprop:RMSProp",
}


__getattr__ = lazily(__name__, OPTIMIZERS)

__all__ = ["OPTIMIZERS", "Adafactor", "AdamW", "Lion", "Muon", "RMSProp", "Rule"]
