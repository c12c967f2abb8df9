"""GGUF, for llama.cpp and what is built on it: a file of weights, tokenizer and configuration.

Levels go into ggml's blocks as they are (`ggml`), and scales beside them where float16 holds them.  One that
it does not hold, of a whole tensor, is the tensor `NAME.scale` instead, by which llama.cpp multiplies the
product; versions from before 2026 do not know it.  Embeddings and a head in full precision are of the
narrowest floats that have them exactly, gains of norms in float32.  Only types F16 and BF16 round: matrices
in full precision, as it is asked for.

Models with norms before `o_proj` and `down_proj` are of architecture `bitnet`, others of `llama`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from lowbit_dist.errors import ConfigError
from lowbit_dist.export import gguf_file, gguf_names, gguf_tokenizer
from lowbit_dist.export.ggml import TYPES, Type
from lowbit_dist.export.gguf_file import Entry
from lowbit_dist.export.gguf_reading import ROUNDED, File
from lowbit_dist.packed import PackedTensor

if TYPE_CHECKING:
    from lowbit_dist.export.finished import Finished

SUFFIX = ".gguf"
KINDS = tuple(TYPES)
HALF_SCALES = True  # but for one of a whole tensor
READER = ("gguf",)
USE = """\
```
llama-cli -m {path} -p "Once upon a time"
```

llama.cpp computes TQ1_0 and TQ2_0 fast on CPUs, Q2_0 on NVIDIA GPUs, the others everywhere.
"""

# In this order a model's own type is looked for: the first that holds it exactly, and is fast on CPUs.
OWN = ("TQ2_0", "Q2_0", "Q2_K", "Q3_K", "Q4_0", "Q8_0", "BF16", "F16", "F32")
CARD = "lowbit.card"  # the metadata's entry for the model card, which is written after the file is proved
CARD_BYTES = 8192
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SUB_NORMS = ("o_proj.norm.weight", "down_proj.norm.weight")


def check(model: Finished, kind: str | None) -> str:
    """The type to write, by default the smallest that holds every weight exactly; ConfigError if it cannot
    be.
    """
    _architecture(model)
    _tokenizer(model)
    if kind is not None:
        _contents(model, kind)
        return kind
    for name in model.names:
        if isinstance(tensor := model.tensor(name), PackedTensor) and tensor.planes > 1:
            raise _refused(
                f"{name} is the sum of {tensor.planes} planes, and a block holds one",
                "quantise with `lowbit quantize --tied`, whose planes are one grid, or write --type F32",
            )
    for own in OWN:
        try:
            _, rounded = _contents(model, own)
        except ConfigError:
            continue
        if not rounded:
            return own
    raise AssertionError("F32 holds every weight")


def size(model: Finished, kind: str) -> int:
    """About how many bytes will be written."""
    header = gguf_file.header(_metadata(model, kind, ""), [])
    return len(header) + sum(entry.n_bytes + 256 for entry in _contents(model, kind)[0])


def write(model: Finished, path: Path, kind: str) -> None:
    """Write the file, one tensor after the other."""
    entries, rounded = _contents(model, kind)
    gguf_file.write(path, {**_metadata(model, kind, path.stem), ROUNDED: rounded}, entries)


def note(path: Path, card: str) -> None:
    """Put the model card into the metadata of a written file."""
    gguf_file.fill_in(path, CARD, card)


def read_back(path: Path) -> File:
    """The file as the public `gguf` package reads it, and transformers computes it."""
    return File(path)


def _refused(what: str, instead: str = "write --format hf") -> ConfigError:
    return ConfigError(f"--format (gguf) cannot hold this model: {what}; {instead}")


def _architecture(model: Finished) -> str:
    """GGUF's name of it; ConfigError if llama.cpp would compute something else."""
    config, names = model.hf_config, set(model.names)
    if config.model_type not in ("llama", "mistral"):
        raise _refused(f"it is a {config.model_type}, neither llama nor mistral")
    if config.hidden_act != "silu":
        raise _refused(f"its activation is {config.hidden_act}, where llama.cpp has silu")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise _refused(f"its attention sees {window:,} tokens back, where llama.cpp's llama sees all")
    for name in model.names:
        if gguf_names.in_gguf(name) is None:
            raise _refused(f"GGUF has no name for {name}")
    _rope_factors(config)
    norms = {name for name in names if name.endswith(SUB_NORMS)}
    if not norms:
        return "llama"
    if len(norms) != 2 * config.num_hidden_layers:
        raise _refused("it has norms before o_proj and down_proj in some layers alone")
    if "lm_head.weight" in names:
        raise _refused(
            "llama.cpp's bitnet, with norms before o_proj and down_proj, has its embedding as its head",
            "train with model.tie_embeddings: true or method.sub_norms: false, or write --format hf",
        )
    if biased := [name for name in model.names if name.endswith("bias")]:
        raise _refused(f"llama.cpp's bitnet, with norms before o_proj, has no {biased[0]}")
    if _head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise _refused("llama.cpp's bitnet, with norms before o_proj, has heads of hidden_size / heads")
    if _rope_factors(config) is not None:
        raise _refused("llama.cpp's bitnet, with norms before o_proj, does not scale rotary positions")
    return "bitnet"


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope_factors(config: Any) -> Tensor | None:  # [head_dim / 2] float32
    """By what rotary frequencies are divided; ConfigError if that depends on a text's length."""
    scaling = getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise _refused(f"its rotary positions are scaled as {kind}, neither linear nor llama3")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return gguf_names.frequencies(config.rope_theta, _head_dim(config)) / scaled.float()


def _tokenizer(model: Finished) -> dict[str, Any]:
    return gguf_tokenizer.metadata(model.tokenizer, model.hf_config.vocab_size)


def _metadata(model: Finished, kind: str, name: str) -> dict[str, Any]:
    config, architecture = model.hf_config, _architecture(model)
    own = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": _head_dim(config),
        "attention.value_length": _head_dim(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
        "rope.dimension_count": _head_dim(config),
    }
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": TYPES[kind].file_type,
        "general.quantization_version": 2,
        **{f"{architecture}.{key}": value for key, value in own.items()},
        **_tokenizer(model),
        CARD: " " * CARD_BYTES,
    }


def _contents(model: Finished, kind: str) -> tuple[list[Entry], list[str]]:
    """Every tensor of the file, and the names of those that are rounded; ConfigError if a block of this type
    cannot hold one.
    """
    is_llama, config = _architecture(model) == "llama", model.hf_config
    entries, rounded = [], []
    for name in model.names:
        tensor, stored = model.tensor(name), gguf_names.in_gguf(name)
        assert stored is not None, "_architecture has asked"
        of = _type(name, tensor, kind)
        heads = gguf_names.heads_of(name, config.num_attention_heads, config.num_key_value_heads)
        packing = partial(_packed, of=of, n_heads=heads if is_llama else None)
        entries.append(Entry(stored, of, tuple(tensor.shape), partial(_read, model, name, packing)))
        if isinstance(tensor, PackedTensor):
            if not _holds_scales(tensor, of):
                entries.append(Entry(gguf_names.scale_of(stored), TYPES["F32"], (1,), tensor.scale.numpy))
        elif not _is_exact(tensor, of):
            rounded.append(stored)
    factors = _rope_factors(config)
    if factors is not None:
        entries.append(Entry("rope_freqs.weight", TYPES["F32"], tuple(factors.shape), factors.numpy))
    return entries, rounded


def _type(name: str, tensor: PackedTensor | Tensor, kind: str) -> Type:
    """What a tensor is written as in a file of this type."""
    of = TYPES[kind]
    if len(tensor.shape) == 1:
        return TYPES["F32"]
    if isinstance(tensor, PackedTensor):
        if why := _why_not(name, tensor, of):
            *others, last = [other for other in KINDS if not _why_not(name, tensor, TYPES[other])]
            instead = f"{', '.join(others)} or {last}" if others else last
            raise ConfigError(f"--type ({kind}) cannot hold {name}: {why}; write --type {instead}")
        return of
    if of.levels is None:
        if tensor.abs().max() > torch.finfo(FLOATS[of.name]).max:
            raise ConfigError(f"--type ({kind}) cannot hold {name}: its numbers are larger; write --type F32")
        return of
    if name not in gguf_names.TOP:
        raise ConfigError(
            f"--type ({kind}) cannot hold {name}, which is in full precision; write --type F16 or F32, or "
            "give the model low bits by `lowbit quantize` first"
        )
    return next(of for of in (TYPES[narrow] for narrow in FLOATS) if _is_exact(tensor, of))


def _why_not(name: str, tensor: PackedTensor, of: Type) -> str | None:
    """Why a type cannot hold a low-bit matrix exactly; None if it can."""
    length, grid = tensor.shape[-1], tensor.grid
    if of.levels is not None:
        if tensor.planes > 1:
            return f"it is the sum of {tensor.planes} planes, and a block holds one"
        low, high = of.levels
        if grid.low < low or grid.high > high:
            return f"its levels are {grid.low} to {grid.high}, those of a block {low} to {high}"
        if length % of.elements:
            return f"its rows of {length:,} are no whole blocks of {of.elements}"
        if tensor.scale_every % of.elements and len(tensor.scale) > 1:
            return f"it has a scale for {tensor.scale_every} weights, a block one for {of.elements}"
    if not _holds_scales(tensor, of):
        if len(tensor.scale) > 1:
            return "float16 does not hold its scales, or their products with its levels"
        if name == "model.embed_tokens.weight":
            return "float16 does not hold its scale, for which an embedding has no other place"
    return None


def _holds_scales(tensor: PackedTensor, of: Type) -> bool:
    """Whether the scales fit beside the levels, or into the products with them; one that does not stands
    apart.
    """
    if of.levels is not None:
        return torch.equal(tensor.scale.half().float(), tensor.scale)
    return _is_exact(tensor.dequantize(torch.float32), of)


def _is_exact(values: Tensor, of: Type) -> bool:
    return torch.equal(values.to(FLOATS[of.name]).float(), values)


def _read(model: Finished, name: str, packing: Callable[..., NDArray[Any]]) -> NDArray[Any]:
    return packing(model.tensor(name))


def _packed(tensor: PackedTensor | Tensor, *, of: Type, n_heads: int | None) -> NDArray[Any]:
    """The bytes of a tensor; `n_heads`: rows of so many heads are put in GGUF's order."""

    def in_order(rows: Tensor) -> NDArray[Any]:
        ordered = rows if n_heads is None else gguf_names.interleaved(rows, n_heads)
        return ordered.contiguous().view(torch.uint8).numpy() if of.levels is None else ordered.numpy()

    if isinstance(tensor, PackedTensor) and not _holds_scales(tensor, of):
        tensor = replace(tensor, scale=torch.ones_like(tensor.scale))
    if of.levels is None:
        values = tensor.dequantize(torch.float32) if isinstance(tensor, PackedTensor) else tensor
        return in_order(values.to(FLOATS[of.name]))
    assert isinstance(tensor, PackedTensor), "a block holds levels"
    every = torch.arange(0, tensor.numel, of.elements) // tensor.scale_every
    d = tensor.scale.half()[every].view(tensor.shape[0], -1)
    return of.pack(in_order(tensor.levels()), in_order(d))
