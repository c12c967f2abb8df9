"""Folders that transformers loads, which three formats are: configuration, safetensors, tokenizer; and the
reading back of one by transformers.

A model with norms before o_proj and down_proj (SubLN) is a `BitNetForCausalLM` with the gate of a LLaMA;
biases that a method leaves are those that a LLaMA may have.  Other additions have no name in transformers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowbit_dist import model as models
from lowbit_dist.errors import ConfigError
from lowbit_dist.export.finished import Finished, Layout, logits
from lowbit_dist.export.proof import ProofFailed
from lowbit_dist.files import os_errors
from lowbit_dist.linear import INNER_LINEARS, Linear
from lowbit_dist.methods.dense import Dense
from lowbit_dist.pretrained import CONFIG, INDEX, SINGLE

SHARD_BYTES = 5 * 10**9  # of a file of weights, as the hub has them
# The norms of `Linear`, and their names in BitNetForCausalLM.
SUB_NORMS = {"self_attn.o_proj.norm.": "self_attn.attn_sub_norm.", "mlp.down_proj.norm.": "mlp.ffn_sub_norm."}
OF_LLAMA_ALONE = ("model_type", "transformers_version", "mlp_bias", "pretraining_tp", "head_dim")
PRECISIONS = {"bf16": "bfloat16", "fp32": "float32"}  # of a model -> what transformers calls it
# Some layers of transformers are compiled when they are first used, which takes a compiler and a minute.
EAGER = partial(torch.compiler.set_stance, "force_eager")


class Target:
    """The class of transformers that has the model's parameters; ConfigError if none does."""

    def __init__(self, model: Finished, format: str):
        self.config = _config(model, format)
        self._built = models.of_hf_config(self.config, Dense(), torch.float32)
        self.config.architectures = [type(self._built).__name__]
        self.sizes = {name: parameter.numel() for name, parameter in self._built.named_parameters()}
        needed = {self.name(name) for name in model.names}
        if differing := sorted(self.sizes.keys() ^ needed):
            raise ConfigError(
                f"--format {format} has no name for {differing[0]} of {model.trained.path}, a "
                f"{model.architecture} of method {model.trained.method.name}; train with "
                "method.sub_norms: false, or a method that adds nothing to the model"
            )

    def name(self, name: str) -> str:
        """What a parameter of the model is called there."""
        for own, theirs in SUB_NORMS.items():
            name = name.replace(own, theirs)
        return name

    def linears(self) -> list[str]:
        """Its linear layers, the head among them."""
        return [name for name, layer in self._built.named_modules() if isinstance(layer, nn.Linear | Linear)]

    def buffers(self, model: Finished) -> dict[str, Tensor]:
        """Numbers of a pretrained model that are no parameters."""
        return model.trained.read_buffers(self._built)


def _config(model: Finished, format: str) -> Any:  # PretrainedConfig
    from transformers import BitNetConfig

    config = copy.deepcopy(model.hf_config)
    is_llama = config.model_type == "llama"
    if any(name.endswith(tuple(f"{layer}.norm.weight" for layer in INNER_LINEARS)) for name in model.names):
        if not is_llama or config.head_dim * config.num_attention_heads != config.hidden_size:
            raise ConfigError(
                f"--format {format}: transformers has no {model.architecture} with norms before "
                f"{' and '.join(INNER_LINEARS)}, only a LLaMA; train with method.sub_norms: false"
            )
        kept = {key: value for key, value in config.to_dict().items() if key not in OF_LLAMA_ALONE}
        config = BitNetConfig(**kept)
    elif is_llama and any(name.endswith("o_proj.bias") for name in model.names):
        config.attention_bias = config.mlp_bias = True
    config.use_cache = True
    for mark in ("bos", "eos"):
        if (known := getattr(model.tokenizer, f"{mark}_id")) is not None:
            setattr(config, f"{mark}_token_id", known)
    return config


def check(model: Finished, format: str) -> None:
    """ConfigError unless transformers has a class for the model, which has a tokenizer."""
    Target(model, format)


def write(
    model: Finished,
    folder: Path,
    format: str,
    stored: Callable[[str], dict[str, Tensor]],  # of a low-bit linear layer's weight: what its layer holds
    quantization: dict[str, Any] | None = None,
) -> None:
    """A folder of the model, its low-bit linear layers as `stored` has them by name, and `quantization` to
    say so in its configuration; all other numbers in the narrowest float that has them exactly.
    """
    target = Target(model, format)
    _write_weights(folder, _tensors(model, target, stored))
    content = json.loads(target.config.to_json_string(use_diff=True))
    precision = PRECISIONS[model.precision]
    content |= {"torch_dtype": precision, "dtype": precision}  # for transformers 4, and for 5
    if quantization is not None:
        content["quantization_config"] = quantization
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    marks = {f"{mark}_token_id": getattr(target.config, f"{mark}_token_id") for mark in ("bos", "eos")}
    (folder / "generation_config.json").write_text(json.dumps(marks, indent=2) + "\n")
    for name, written in model.tokenizer.files.items():
        (folder / name).write_bytes(written)


def _tensors(
    model: Finished, target: Target, stored: Callable[[str], dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    for name in model.names:
        if name in model.layouts:
            owner = target.name(name).removesuffix("weight")
            yield from ((owner + key, tensor) for key, tensor in stored(name).items())
        else:
            yield target.name(name), narrowest(model.numbers(name))
    yield from target.buffers(model).items()


def narrowest(numbers: Tensor) -> Tensor:
    """The same numbers in bfloat16 or float16, if one of them has all of these exactly, else in float32."""
    narrow = (numbers.to(dtype) for dtype in (torch.bfloat16, torch.float16))
    return next((tensor for tensor in narrow if torch.equal(tensor.float(), numbers)), numbers)


def _write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """One file, or several of at most SHARD_BYTES and their index."""
    files: list[list[str]] = []  # of each file the names that it has
    waiting: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal size
        files.append(list(waiting))
        with os_errors():
            save_file(waiting, folder / f".{len(files)}", metadata={"format": "pt"})
        waiting.clear()
        size = 0

    for name, tensor in tensors:
        if waiting and size + tensor.nbytes > SHARD_BYTES:
            flush()
        waiting[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        (folder / ".1").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for k, names in enumerate(files, 1):
        called = f"model-{k:05}-of-{len(files):05}.safetensors"
        (folder / f".{k}").rename(folder / called)
        weight_map |= dict.fromkeys(names, called)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def size(model: Finished, format: str, low_bit: Callable[[Layout], int]) -> int:
    """Bytes that `write` takes at most: `low_bit` of each low-bit linear layer's weight, else of float32."""
    target = Target(model, format)
    others = sum(4 * target.sizes[target.name(name)] for name in model.names if name not in model.layouts)
    tokenizer = sum(map(len, model.tokenizer.files.values()))
    return others + sum(map(low_bit, model.layouts.values())) + tokenizer + 200 * len(model.names)


class Folder:
    """A folder as transformers loads it, in float32."""

    def __init__(
        self,
        folder: Path,
        *,
        rounding: nn.Module | None = None,
        has_reciprocals: bool = False,
        decoded: Callable[[nn.Module], Tensor | None] | None = None,  # the weight of a packed layer
    ):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.rounding, self.has_reciprocals, self._decoded = rounding, has_reciprocals, decoded
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        self.network, info = loaded
        self.network.eval()
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[what]:
                raise ProofFailed(f"transformers finds {what.replace('_', ' ')}: {sorted(info[what])[0]}")
        self._tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )

    def weight(self, name: str) -> Tensor | None:
        for own, theirs in SUB_NORMS.items():
            name = name.replace(own, theirs)
        owner, _, key = name.rpartition(".")
        layer = self.network.get_submodule(owner)
        if self._decoded is not None and key == "weight":
            with EAGER():
                decoded = self._decoded(layer)
            if decoded is not None:
                return decoded
        return getattr(layer, key).detach().float()  # type: ignore[no-any-return]

    def logits(self, ids: Sequence[int]) -> Tensor:
        with EAGER():
            return logits(self.network, ids)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids
