"""A causal language model with a method's linear layers, and the initial value of each of its parameters.

The model is built without any parameter's values ("meta" tensors); `InitialWeights` makes them one tensor at
a time, so that no process ever holds more than one full-precision tensor.  A value depends on the seed and
the parameter's name alone: it is the same on every rank and for any number of them.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from math import gcd, prod
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit_dist.config import ConfigError, Model, RunConfig
from lowbit_dist.grid import BLOCK
from lowbit_dist.methods.method import Method
from lowbit_dist.packed import check_shape
from lowbit_dist.pretrained import Pretrained

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of a run's precision
INITIAL_STD = 0.02  # LLaMA, BitNet b1.58 and the DQT paper alike


def build(config: Model, vocab_size: int, method: Method, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device (buffers are real), its linears replaced by the method's, dtype of
    parameters `dtype`.

    `vocab_size` is the tokenizer's; a pretrained model with another one is refused.
    """
    return of_hf_config(hf_config(config, vocab_size), method, dtype)


def of_hf_config(config, method: Method, dtype: torch.dtype) -> nn.Module:  # type: ignore[no-untyped-def]
    """`build`, of a Hugging Face configuration."""
    import transformers
    from transformers.integrations.accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
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
    initial = InitialWeights(model, method, 0, config.pretrained)
    for name, parameter in model.named_parameters():
        initial.check(name, parameter.shape)


def linear_weights(model: nn.Module) -> list[str]:
    """The weights of the layers that the method put in the place of linear ones, the head's excepted."""
    return list(model.linear_weights)  # type: ignore[arg-type]


def low_bit_names(model: nn.Module, method: Method) -> list[str]:
    """The parameters that exist only as packed codes, in canonical (sorted) order."""
    if method.stored is None:
        return []
    linears = set(linear_weights(model))
    return sorted(name for name, _ in model.named_parameters() if method.is_low_bit(name in linears))


def replace_linears(model: nn.Module, method: Method, *, is_head: Callable[[nn.Module], bool]) -> list[str]:
    """Put the method's layer in the place of each `nn.Linear`; the weights' names, without the head's.

    Layers of a class that derives from `nn.Linear` stay: their owners may read their weights themselves.
    """
    eps = getattr(getattr(model, "config", None), "rms_norm_eps", 1e-5)
    weights = []
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        parent, _, attribute = name.rpartition(".")
        replacement = method.linear(layer, name=name, is_head=is_head(layer), norm_eps=eps)
        setattr(model.get_submodule(parent), attribute, replacement.train(layer.training))
        own = [key for key, p in replacement.named_parameters() if p is layer.weight]
        if not own:
            raise TypeError(
                f"method {method.name} put a layer in the place of {name} that has not its weight"
            )
        if not is_head(layer):
            weights.append(f"{name}.{own[0]}")
    return weights


def _replace_linears(model: nn.Module, method: Method) -> None:
    head = model.get_output_embeddings()  # type: ignore[operator]
    model.linear_weights = replace_linears(model, method, is_head=lambda layer: layer is head)  # type: ignore
    if getattr(model.config, "tie_word_embeddings", False):
        model.tie_weights()  # type: ignore[operator]


def _restore_rotary(model: nn.Module) -> None:
    """Rotary frequencies are buffers that transformers computes in float32; a cast to bf16 would move
    every position.
    """
    for module in model.modules():
        first_frequencies = getattr(module, "rope_init_fn", None)
        if "inv_freq" in module._buffers and first_frequencies is not None:
            module.inv_freq, module.attention_scaling = first_frequencies(module.config, None)
            module.original_inv_freq = module.inv_freq


def shapes(config: RunConfig, vocab_size: int) -> nn.Module:
    """The run's model on the meta device, made once for all who only read it."""
    return _built(config.model, vocab_size, config.method, DTYPES[config.precision])


_built = lru_cache(maxsize=8)(build)


def check_shapes(config: Model, vocab_size: int, method: Method) -> None:
    """ConfigError unless every low-bit weight of the model can be packed as the method packs it."""
    build(config, vocab_size, method, torch.bfloat16)


def _check_low_bit_shapes(model: nn.Module, method: Method) -> None:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in low_bit_names(model, method):
        try:
            check_shape(shapes[name], scale_every(method, shapes[name]))
        except ValueError as error:
            raise ConfigError(
                f"model: {name} {list(shapes[name])} cannot be packed for method {method.name}: {error}; "
                f"write sizes that are multiples of {BLOCK}, or an option that asks for less, such as "
                "method.granularity: tensor or method.tensors: linears"
            ) from None


def scale_every(method: Method, shape: tuple[int, ...]) -> int:
    """How many elements of a low-bit weight of this shape share a scale; ValueError if it cannot be."""
    if len(shape) == 1:
        return _sampled(method, shape)
    rows = 2 * (BLOCK // gcd(BLOCK, shape[-1]))  # the fewest that are whole blocks, and more than one
    every = _sampled(method, (rows, shape[-1]))
    return prod(shape) if every == rows * shape[-1] else every


def n_scales(method: Method, shape: tuple[int, ...]) -> int:
    """How many scales a low-bit weight of this shape has."""
    return prod(shape) // scale_every(method, shape)


@lru_cache(maxsize=256)
def _sampled(method: Method, shape: tuple[int, ...]) -> int:
    """Found by packing zeros: enough rows for whole blocks, whatever their length."""
    return method.quantize(torch.zeros(shape)).scale_every


class InitialWeights:
    """Value of any parameter before the first step, made on demand: random, or read from a pretrained
    folder.
    """

    def __init__(self, model: nn.Module, method: Method, seed: int, pretrained: Path | str | None):
        self.method, self.seed = method, seed
        self.std = getattr(getattr(model, "config", None), "initializer_range", INITIAL_STD)
        self.pretrained = None if pretrained is None else Pretrained(Path(pretrained), "model.pretrained")

    def __call__(self, name: str, shape: torch.Size) -> Tensor:  # `shape` float32 on the CPU
        self.check(name, shape)
        if self.pretrained is not None and name in self.pretrained:
            return self.pretrained.tensor(name)
        if (value := self.method.initial(name, tuple(shape))) is not None:
            return value
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.empty(shape).normal_(0.0, self.std, generator=generator)

    def check(self, name: str, shape: torch.Size) -> None:
        """ConfigError unless a pretrained folder has this tensor in this shape."""
        if self.pretrained is None:
            return
        if name in self.pretrained:
            self.pretrained.check_shape(name, tuple(shape))
        elif self.method.initial(name, tuple(shape)) is None:
            raise ConfigError(
                f"model.pretrained: {name} is in none of the folder's safetensors files; write the folder of "
                "a whole model"
            )
