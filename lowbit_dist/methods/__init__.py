"""Training methods: one file each.  To add one, write its file and its line here, or an entry point of the
group `lowbit_dist.methods` in a package of your own; README.md beside this file shows both.
"""

from typing import TYPE_CHECKING

from lowbit_dist.methods.method import Method
from lowbit_dist.registry import lazily

if TYPE_CHECKING:
    from lowbit_dist.methods.bitnet import BitNet
    from lowbit_dist.methods.dense import Dense
    from lowbit_dist.methods.dqt import DQT
    from lowbit_dist.methods.flip import Flip
    from lowbit_dist.methods.tbt import TBT
    from lowbit_dist.methods.tequila import Tequila
    from lowbit_dist.methods.trilm import TriLM

# Name -> module:class, imported when a run names it, so that importing this package needs no torch.
METHODS = {
    "dqt": "lowbit_dist.methods.dqt:DQT",
    "flip": "lowbit_dist.methods.flip:Flip",
    "bitnet": "lowbit_dist.methods.bitnet:BitNet",
    "trilm": "lowbit_dist.methods.trilm:TriLM",
    "tequila": "lowbit_dist.methods.tequila:Tequila",
    "tbt": "lowbit_dist.methods.tbt:TBT",
    "dense": "lowbit_dist.methods.dense:Dense",
}


__getattr__ = lazily(__name__, METHODS)

__all__ = ["DQT", "METHODS", "TBT", "BitNet", "Dense", "Flip", "Method", "Tequila", "TriLM"]
