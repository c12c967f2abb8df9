"""A causal language model with a method's linear layers, and the initial value of each of its parameters.

The model is built without any parameter's values ("meta" tensors); `InitialWeights` makes them one tensor at
a time, so that no process ever holds more than one full-precision tensor.  A value depends on the seed and
the parameter's name alone: it is the same on every rank and for any number of them.
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit_dist.config import ConfigError, Model
from lowbit_dist.grid import BLOCK
from lowbit_dist.linear import Linear
from lowbit_dist.methods import Method

INITIAL_STD = 0.02  # LLaMA, BitNet b1.58 and the DQT paper alike


def build(config: Model, vocab_size: int, method: Method, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device (buffers are real), its linears replaced by the method's, dtype of
    parameters `dtype`.

    `vocab_size` is the tokenizer's; a pretrained model with another one is refused.
    """
    import transformers
    from transformers.integrations.accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(
            hf_config(config, vocab_size), attn_implementation="sdpa"
        )
    model.to(dtype)  # buffers that must stay float32 (rotary frequencies) are restored below
    _replace_linears(model, method)
    _restore_rotary(model)
    _check_low_bit_shapes(model, method)
    return model


def hf_config(config: Model, vocab_size: int):  # type: ignore[no-untyped-def]  # -> PretrainedConfig
    """The Hugging Face configuration of this model; it also names the architecture of an export."""
    import transformers

    if config.pretrained is not None:
        try:
            loaded = transformers.AutoConfig.from_pretrained(
                config.pretrained, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model.pretrained ({config.pretrained}) is not a Hugging Face model folder: "
                f"{str(error).splitlines()[0]}; write the path of one"
            ) from None
        if loaded.vocab_size < vocab_size:
            raise ConfigError(
                f"model.pretrained ({config.pretrained}) has a vocabulary of {loaded.vocab_size:,}, "
                f"the data's tokenizer {vocab_size:,}; prepare the data with the model's own tokenizer"
            )
        loaded.use_cache = False
        return loaded
    sizes = config.sizes()
    assert sizes is not None, "a model that is not pretrained has sizes"
    return transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=config.max_seq_len,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.norm_eps,
        initializer_range=INITIAL_STD,
        tie_word_embeddings=config.tie_embeddings,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )


def check_pretrained(config: Model, vocab_size: int, seq_len: int, method: Method) -> None:
    """ConfigError unless the folder holds a model of this vocabulary and length with every weight it needs.

    Reads headers alone, so it is quick.
    """
    model = build(config, vocab_size, method, torch.bfloat16)
    longest = getattr(model.config, "max_position_embeddings", None) or seq_len
    if seq_len > longest:  # type: ignore[operator]
        raise ConfigError(
            f"data.seq_len ({seq_len:,}) must be at most {longest:,}, the max_position_embeddings of "
            f"{config.pretrained}; write data.seq_len: {longest}, or another model"
        )
    initial = InitialWeights(model, 0, config.pretrained)
    for name, parameter in model.named_parameters():
        initial.check(name, parameter.shape)


def low_bit_names(model: nn.Module, method: Method) -> list[str]:
    """The parameters that exist only as packed codes, in canonical (sorted) order."""
    if not method.low_bit:
        return []
    linear_weights = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, Linear) and not _is_head(model, name)
    }
    return sorted(name for name, _ in model.named_parameters() if method.is_low_bit(name in linear_weights))


def _is_head(model: nn.Module, name: str) -> bool:
    return model.get_submodule(name) is model.get_output_embeddings()  # type: ignore[operator]


def _replace_linears(model: nn.Module, method: Method) -> None:
    eps = getattr(model.config, "rms_norm_eps", 1e-5)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, attribute = name.rpartition(".")
            replacement = method.linear(layer, name=name, is_head=_is_head(model, name), norm_eps=eps)
            setattr(model.get_submodule(parent), attribute, replacement)
    if getattr(model.config, "tie_word_embeddings", False):
        model.tie_weights()  # type: ignore[operator]


def _restore_rotary(model: nn.Module) -> None:
    """Rotary frequencies are buffers that transformers computes in float32; a cast to bf16 would move
    every position.
    """
    for module in model.modules():
        if hasattr(module, "inv_freq") and hasattr(module, "rope_init_fn"):
            module.inv_freq, module.attention_scaling = module.rope_init_fn(module.config, None)  # type: ignore[operator]
            module.original_inv_freq = module.inv_freq


def _check_low_bit_shapes(model: nn.Module, method: Method) -> None:
    names = low_bit_names(model, method)
    for name, parameter in model.named_parameters():
        if name in set(names) and parameter.shape[-1] % BLOCK:
            raise ConfigError(
                f"model: {name} has {parameter.shape[-1]:,} inputs; low-bit weights need a multiple of "
                f"{BLOCK} (the nearest is {max(1, round(parameter.shape[-1] / BLOCK)) * BLOCK:,})"
            )


class InitialWeights:
    """Value of any parameter before the first step, made on demand: random, or read from a pretrained
    folder.
    """

    def __init__(self, model: nn.Module, seed: int, pretrained: Path | str | None):
        self.seed = seed
        self.std = getattr(getattr(model, "config", None), "initializer_range", INITIAL_STD)
        self.kinds = {
            f"{prefix}.{name}" if prefix else name: module
            for prefix, module in model.named_modules()
            for name, _ in module.named_parameters(recurse=False)
        }
        self.files = _safetensors_index(Path(pretrained)) if pretrained is not None else {}

    def __call__(self, name: str, shape: torch.Size) -> Tensor:  # `shape` float32 on the CPU
        self.check(name, shape)
        if name in self.files:
            from safetensors import safe_open

            with safe_open(self.files[name], "pt") as file:
                return file.get_tensor(name).float()
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.empty(shape).normal_(0.0, self.std, generator=generator)

    def check(self, name: str, shape: torch.Size) -> None:
        """ConfigError unless a pretrained folder has this tensor in this shape."""
        if name in self.files:
            found = _shape(self.files[name], name)
            if found != tuple(shape):
                raise ConfigError(
                    f"model.pretrained: {name} in {self.files[name]} has shape {found}, the model "
                    f"{tuple(shape)}; write the folder of a model whose config.json and weights fit together"
                )
        # The norms that SubLN adds are not in the file.
        elif self.files and not name.endswith(".norm.weight"):
            raise ConfigError(
                f"model.pretrained: {name} is in none of the folder's safetensors files; write the folder of "
                "a whole model"
            )


def _shape(file: Path, name: str) -> tuple[int, ...]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return tuple(opened.get_slice(name).get_shape())
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"model.pretrained: {file} cannot be read for {name} ({error}); copy the model again"
        ) from None


def _safetensors_index(folder: Path) -> dict[str, Path]:
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            return {name: folder / Path(file).name for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"model.pretrained: {index} cannot be read ({type(error).__name__}: {error}); "
                "copy the model again"
            ) from None
    single = folder / "model.safetensors"
    if not single.exists():
        raise ConfigError(
            f"model.pretrained ({folder}) has no model.safetensors; other formats are not read, "
            "since loading them can run code; convert it, or write another folder"
        )
    try:
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.pretrained: {single} cannot be read ({error}); copy it again") from None
