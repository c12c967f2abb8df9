"""What the process that ranks are forked from imports, once for all of them: what a first run would."""

import torch

from lowbit_dist import configfile, loop, model
from lowbit_dist.data.library import import_streaming

__all__ = ["loop"]

import_streaming()
SIZES = {"hidden_size": 64, "intermediate_size": 128, "layers": 1, "heads": 2, "kv_heads": 2}
config = configfile.from_dict({"model": SIZES, "data": {"path": "none"}})
model.build(config.model, 8, config.method, torch.float32)
