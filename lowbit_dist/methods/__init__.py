"""Training methods: one file each.  To add one, write its file and its line here.

`method.Method` says what a method answers: `linear` (the layer that replaces an `nn.Linear`), and for
low-bit methods `is_low_bit` and `quantize` (which parameters exist as packed codes, and their first values).
"""

from lowbit_dist.config import MethodOptions, RunConfig
from lowbit_dist.methods.bitnet import BitNet
from lowbit_dist.methods.dense import Dense
from lowbit_dist.methods.dqt import DQT
from lowbit_dist.methods.method import Method

METHODS: dict[str, type[MethodOptions]] = {"dqt": DQT, "bitnet": BitNet, "dense": Dense}


def method_of(config: RunConfig) -> Method:
    """The method of a run; its options were checked when the configuration was read."""
    assert isinstance(config.method, Method), "METHODS are Methods"
    return config.method


__all__ = ["METHODS", "Method", "method_of"]
