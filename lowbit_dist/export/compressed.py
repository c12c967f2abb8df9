"""Codes of up to 8 bits as compressed-tensors packs them (`pack-quantized`), for vLLM and transformers.

A layer has `weight_packed` [N, ceil(K b / 32)] int32, where element i of a row is bits i b to i b + b - 1 of
the row's bit stream, least significant first and across words, each as level + 2^(b - 1); `weight_scale`
[N, 1], or [N, K / group]; and `weight_shape`.  A scale of a whole matrix stands in each row.

Until its version 0.17.1 the library left 32 mod b bits of each word empty: of 3 bits that is another file,
which this is not.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowbit_dist.errors import ConfigError
from lowbit_dist.export import huggingface
from lowbit_dist.export.finished import Finished, Layout, rows_of_scales
from lowbit_dist.packed import PackedTensor

SUFFIX = ""
KINDS = ("weights", "weights-and-inputs")  # inputs of these layers are rounded to 8 bits for each token
HALF_SCALES = False
READER = ("compressed_tensors", "accelerate")
USE = """```bash
vllm serve {path}
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # and: pip install "compressed-tensors>=0.18"

model = AutoModelForCausalLM.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```
"""
WORD = 32  # bits
PACKED = "pack-quantized"
MAX_BITS = 8


def check(model: Finished, kind: str | None) -> str:
    model.check_low_bit("compressed-tensors")
    for name, layout in model.layouts.items():
        grid, half = layout.grid, 2 ** (layout.grid.bits - 1)
        if grid.bits > MAX_BITS or grid.low < -half or grid.high >= half:
            raise ConfigError(
                f"--format compressed-tensors packs levels of 1 to {MAX_BITS} bits around 0, and {name} has "
                f"{grid.low:,} to {grid.high:,} in {grid.bits} bits; write --format hf"
            )
    huggingface.check(model, "compressed-tensors")
    return kind or KINDS[model.rounding is not None]


def size(model: Finished, kind: str) -> int:
    def low_bit(layout: Layout) -> int:
        rows, row = layout.shape
        return 4 * rows * (_words(row, layout.grid.bits) + row // (layout.group or row)) + 16

    return huggingface.size(model, "compressed-tensors", low_bit)


def write(model: Finished, path: Path, kind: str) -> None:
    def stored(name: str) -> dict[str, Tensor]:
        tensor = model.tensor(name)
        assert isinstance(tensor, PackedTensor), "it has a layout"
        return {
            "weight_packed": pack(tensor.levels(), tensor.grid.bits),
            "weight_scale": huggingface.narrowest(rows_of_scales(tensor)),
            "weight_shape": torch.tensor(tensor.shape),
        }

    quantization = configuration(model, rounds_inputs=kind == "weights-and-inputs")
    huggingface.write(model, path, "compressed-tensors", stored, quantization)


def configuration(model: Finished, *, rounds_inputs: bool) -> dict[str, Any]:
    """What `config.json` says: each way in which layers are packed, and which ones they are."""
    target = huggingface.Target(model, "compressed-tensors")
    ways: defaultdict[tuple[int, int | None], list[str]] = defaultdict(list)
    for name, layout in model.layouts.items():
        ways[layout.grid.bits, layout.group].append(target.name(name).removesuffix(".weight"))
    others = [layer for layer in target.linears() if all(layer not in layers for layers in ways.values())]
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    groups: dict[str, Any] = {}
    for k, ((bits, group), layers) in enumerate(ways.items()):
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
        grouped = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
        groups[f"group_{k}"] = {
            "targets": ["Linear"] if len(ways) == 1 else layers,
            "weights": weights | grouped,
            "input_activations": inputs if rounds_inputs else None,
            "output_activations": None,
            "format": PACKED,  # else the library takes another one where inputs are rounded
        }
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": others,
    }


def pack(levels: Tensor, bits: int) -> Tensor:  # [N, K] int8 -> [N, ceil(K bits / 32)] int32
    codes = (levels.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    stream = (codes[..., None] >> torch.arange(bits, dtype=torch.uint8) & 1).flatten(1)
    stream = nn.functional.pad(stream, (0, -stream.shape[1] % WORD))
    return torch.from_numpy(np.packbits(stream.numpy(), axis=1, bitorder="little").view("<i4"))


def _words(row: int, bits: int) -> int:
    return -(-row * bits // WORD)


class RoundTokens(nn.Module):
    """What the library does to the inputs x [..., K] of layers, which is not quite what `IntPerToken` does:
    xq = clip(round(x / s), -128, 127) s, with s = max|x| / 127.5 of each token.
    """

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        scale = scale.where(scale > 0, torch.full_like(scale, torch.finfo(x.dtype).eps))
        return (x / scale).clamp_(-128, 127).round_() * scale


def read_back(path: Path) -> huggingface.Folder:
    folder = huggingface.Folder(path)
    if any(_rounds_inputs(layer) for layer in folder.network.modules()):
        folder.rounding = RoundTokens()
    folder.logits([0])  # the library unpacks a model's weights when it first multiplies with them
    return folder


def _rounds_inputs(layer: nn.Module) -> bool:
    scheme = getattr(layer, "quantization_scheme", None)
    return scheme is not None and scheme.input_activations is not None
