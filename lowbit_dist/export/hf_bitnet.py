"""Ternary weights packed for the layers that transformers calls `bitlinear`, four to a byte.

A layer has `weight` [R, K] uint8, a quarter of its rows: byte r of a column has rows r, r + R, r + 2 R and
r + 3 R in bits 0-1, 2-3, 4-5 and 6-7, each as level + 1; and `weight_scale` [1], the scale's reciprocal.
It rounds its input to 8 bits for each token, as BitNet does, and multiplies levels:
y = (x . L) / (weight_scale * scale of x).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_dist.errors import ConfigError
from lowbit_dist.export import huggingface
from lowbit_dist.export.finished import Finished
from lowbit_dist.linear import IntPerToken
from lowbit_dist.packed import PackedTensor

SUFFIX = ""
KINDS: tuple[str, ...] = ()
HALF_SCALES = False
READER = ("accelerate",)  # transformers asks for it
USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # and: pip install accelerate

model = AutoModelForCausalLM.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```
"""
TO_A_BYTE = 4


def check(model: Finished, kind: str | None) -> str:
    model.check_low_bit("hf-bitnet")
    for name in model.linears:
        layout = model.layouts.get(name)
        if layout is None or (layout.grid.low, layout.grid.high) != (-1, 1):
            grid = "no grid" if layout is None else f"the grid {layout.grid.name}"
            raise ConfigError(
                f"--format hf-bitnet holds ternary weights, and {name} has {grid}; write --format "
                "compressed-tensors, or gguf"
            )
        if not layout.has_one_scale:
            raise ConfigError(
                f"--format hf-bitnet holds one scale for each matrix, and {name} has one for each "
                f"{layout.scale_every:,} weights; write --format compressed-tensors or gguf, or train with "
                "method.granularity: tensor"
            )
        if layout.shape[0] % TO_A_BYTE:
            raise ConfigError(
                f"--format hf-bitnet packs four rows into one, and {name} has {layout.shape[0]:,}; write "
                "--format compressed-tensors, or a model of other sizes"
            )
    huggingface.check(model, "hf-bitnet")
    return "bitlinear"


def size(model: Finished, kind: str) -> int:
    return huggingface.size(model, "hf-bitnet", lambda layout: layout.numel // TO_A_BYTE + 4)


def write(model: Finished, path: Path, kind: str) -> None:
    def stored(name: str) -> dict[str, Tensor]:
        tensor = model.tensor(name)
        assert isinstance(tensor, PackedTensor), "it has a layout"
        return {"weight": pack(tensor.levels()), "weight_scale": reciprocal(tensor.scale)}

    quantization = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "use_rms_norm": False,
        "modules_to_not_convert": ["lm_head"],
    }
    huggingface.write(model, path, "hf-bitnet", stored, quantization)


def pack(levels: Tensor) -> Tensor:  # [N, K] int8 of -1, 0 and 1 -> [N / 4, K] uint8
    quarters = (levels + 1).to(torch.uint8).chunk(TO_A_BYTE)
    packed = torch.zeros_like(quarters[0])
    for k, quarter in enumerate(quarters):
        packed |= quarter << 2 * k
    return packed


def reciprocal(scale: Tensor) -> Tensor:
    return 1 / scale


def read_back(path: Path) -> huggingface.Folder:
    from transformers.integrations.bitnet import BitLinear, unpack_weights

    def decoded(layer: nn.Module) -> Tensor | None:
        if not isinstance(layer, BitLinear):
            return None
        packed: Any = layer
        weight: Tensor = unpack_weights(packed.weight, torch.float32) / packed.weight_scale
        return weight

    return huggingface.Folder(path, rounding=IntPerToken(), has_reciprocals=True, decoded=decoded)
