"""Training methods: one file each.  To add one, write its file and its line here.

A method is its own configuration section (`method:` in a run's YAML): frozen fields plus what they mean,
`linear` (the layer that replaces an `nn.Linear`) and `low_bit` (which parameters exist as packed codes).
"""

from lowbit_dist.methods.bitnet import BitNet
from lowbit_dist.methods.dense import Dense
from lowbit_dist.methods.dqt import DQT

METHODS = {"dqt": DQT, "bitnet": BitNet, "dense": Dense}
Method = DQT | BitNet | Dense
