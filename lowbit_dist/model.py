"""A causal language model with a method's linear layers, and the initial value of each of its parameters.

The model is built without any parameter's values ("meta" tensors); `InitialWeights` makes them one tensor at
a time, so that no process ever holds more than one full-precision tensor.  A value depends on the seed and
the parameter's name alone: it is the same on every rank and for any number of them.
"""

import hashlib
import logging
from collections.abc import Callable
from functools import lru_cache
from math import gcd, prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lowbit_dist import attention, experts, pretrained
from lowbit_dist.config import ConfigError, Model, RunConfig
from lowbit_dist.errors import first_line
from lowbit_dist.grid import BLOCK
from lowbit_dist.loss import why_whole
from lowbit_dist.methods.method import Method
from lowbit_dist.packed import check_shape
from lowbit_dist.pretrained import Pretrained

log = logging.getLogger(__name__)

# Of a run's precision; in fp8 are the products of linear layers alone.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LEFT = 0.02  # of a low-bit model's layers: the share of matrices that may be in full precision
DRAWN = 2**14  # numbers that are drawn in one call
INITIAL_STD = 0.02  # LLaMA, BitNet b1.58 and the DQT paper alike


def build(config: Model, vocab_size: int, method: Method, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device (buffers are real), its linears replaced by the method's, dtype of
    parameters `dtype`.

    `vocab_size` is the tokenizer's; a pretrained model has one of its own.
    """
    model = of_hf_config(hf_config(config, vocab_size), method, dtype, named=_named(config))
    experts.run_all(model)
    return model


def of_hf_config(  # type: ignore[no-untyped-def]
    config, method: Method, dtype: torch.dtype, *, named: str | None = None
) -> nn.Module:
    """`build`, of a Hugging Face configuration; `named` is its folder in the words of messages."""
    import transformers.utils
    from transformers.integrations.accelerate import init_empty_weights

    # Its assisted generation imports scikit-learn if it can, which takes a second of each start.
    with patch.object(transformers.utils, "is_sklearn_available", lambda: False):
        import transformers.generation.candidate_generator

    default = torch.get_default_dtype()
    try:
        with init_empty_weights(include_buffers=False):
            text = config.get_text_config()
            # PyTorch's fused attention, where the model has it, leaves out what some do to the scores.
            is_own = any(getattr(text, name, None) for name in attention.ON_SCORES)
            attention_kind = {"attn_implementation": "eager"} if is_own else {}
            # In this dtype, so that buffers have the types of transformers' own, which keeps some in float32.
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **attention_kind)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError) as error:
        if named is None:
            raise
        raise ConfigError(
            f"{named} is not a causal language model that transformers can build ({first_line(error)}); "
            "write the folder of one"
        ) from None
    finally:
        torch.set_default_dtype(default)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    _replace_linears(model, method)
    _check_low_bit_shapes(model, method)
    return model


def hf_config(config: Model, vocab_size: int):  # type: ignore[no-untyped-def]  # -> PretrainedConfig
    """The Hugging Face configuration of this model; it also names the architecture of an export.

    Of a pretrained one without dropout and the like: a run is a function of its configuration and its seed.
    """
    import transformers

    if config.pretrained is not None:
        loaded = pretrained.configuration(config.pretrained, "model.pretrained")
        if pretrained.vocabulary(loaded) is None:
            raise ConfigError(f"{_named(config)} is no language model; write the folder of one")
        pretrained.without_chance(loaded)
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


def check(config: RunConfig, vocab_size: int, *, used: int | None = None) -> None:
    """ConfigError unless the model can be built and packed, and a pretrained one trained, as its method says.

    Reads headers alone, so it is quick.  What differs from the folder's own configuration is logged.  `used`:
    the data has no others than so many first ones of the tokenizer's `vocab_size` tokens.
    """
    model = build(config.model, vocab_size, config.method, torch.bfloat16)
    if config.model.pretrained is None:
        return
    named = str(_named(config.model))
    _check_trains(model, named)
    if config.train.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise ConfigError(
            "train.activation_checkpointing (true) must be false for a model whose architecture "
            f"has no checkpoints, as {_architecture(model)} of {named}; write false"
        )
    why = attention.why_not_within_documents(model, config.data.seq_len)
    if config.data.document_mask and why is not None:
        raise ConfigError(
            f"data.document_mask (true) must be false for {named}: {_architecture(model)} {why}; write false"
        )
    _check_is_low_bit(model, config.method, named)
    _check_takes_norms(model, config.method, named)
    InitialWeights(model, config.method, 0, config.model.pretrained).check(model)
    longest = pretrained.max_positions(model.config)
    if longest is not None and config.data.seq_len > longest:
        raise ConfigError(
            f"data.seq_len ({config.data.seq_len:,}) must be at most {longest:,}, the positions of "
            f"{config.model.pretrained}; write data.seq_len: {longest}, or another model"
        )
    loaded = pretrained.configuration(config.model.pretrained, "model.pretrained")
    if changed := pretrained.without_chance(loaded):
        log.warning(f"{named} has {', '.join(changed)}; a run trains without, so that it can be repeated")
    if (why := why_whole(model)) is not None:
        log.warning(
            f"{named}: {_architecture(model)} {why}; all logits of a micro-batch are in memory at once"
        )
    _check_vocabulary(model, named, vocab_size, used)


def _check_vocabulary(model: Any, named: str, vocab_size: int, used: int | None) -> None:
    """ConfigError if the data has tokens that the model has no embedding for.  A tokenizer may have some."""
    rows = pretrained.vocabulary(model.config)
    assert rows is not None, "it is a language model"
    differ = f"{named} has a vocabulary of {rows:,}, the data's tokenizer {vocab_size:,}"
    if rows < (vocab_size if used is None else used):
        token = "" if used is None else f", and the data has its token {used - 1:,}"
        raise ConfigError(
            f"{differ}{token}; prepare the data with the model's own tokenizer, of text without such tokens"
        )
    if rows > vocab_size:
        log.warning(f"{differ}; the rest is kept, and never generated")
    elif rows < vocab_size:
        log.warning(f"{differ}; the rest is not in the data, and refused in a text")


def _check_trains(model: Any, named: str) -> None:
    """ConfigError for an architecture that transformers builds, but that would be trained wrongly."""
    why = pretrained.why_not_causal(model)
    if model._is_stateful:
        why = "keeps a recurrent state, and its layers read weights of others"
    elif model.config.get_text_config() is not model.config:
        why = "reads more than text"
    elif buffers := pretrained.state_buffers(model):
        why = f"has weights that are no parameters, as {buffers[0]}"
    elif frozen := [name for name, p in model.named_parameters() if not p.requires_grad]:
        why = f"has parameters that gradients do not train, as {frozen[0]}"
    elif idle := experts.why_idle(model):
        why = f"leaves out experts to which no token goes ({idle}), so that workers wait for each other"
    if why is not None:
        raise ConfigError(
            f"{named} cannot be trained: {_architecture(model)} {why}; write the folder of a model of "
            "another architecture, such as Llama, Qwen3 or Mixtral"
        )


def _check_is_low_bit(model: Any, method: Method, named: str) -> None:
    """ConfigError if a low-bit method would leave a matrix of the model's layers as it is, but for small
    ones, such as a router's.
    """
    if method.forward_grid is None:
        return
    names = linear_weights(model) if method.stored is None else low_bit_names(model, method)
    low_bit, left, n_low_bit = set(names), {}, 0
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module is model.get_output_embeddings():
            continue
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{key}"
            if name in low_bit:
                n_low_bit += parameter.numel()
            elif parameter.dim() > 1:
                left[name] = (parameter.numel(), type(module).__name__)
    total = sum(n for n, _ in left.values())
    if total <= LEFT * n_low_bit:
        return
    name = max(left, key=lambda weight: left[weight][0])
    raise ConfigError(
        f"{named} cannot be trained by method {method.name}: {name} is of a {left[name][1]}, not of an "
        f"nn.Linear, so that {total / (total + n_low_bit):.0%} of the weights of its layers would stay as "
        "they are; write method.name: dense, or the folder of a model whose layers are nn.Linears"
    )


def _check_takes_norms(model: nn.Module, method: Method, named: str) -> None:
    """ConfigError if a norm of the method's own would stand before fewer layers than it says."""
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if missing := [name for name in method.normed_inputs if name not in there]:
        raise ConfigError(
            f"{named} cannot be trained by method {method.name} with norms before "
            f"{' and '.join(method.normed_inputs)}: {_architecture(model)} has no {' and no '.join(missing)}"
            "; write method.sub_norms: false, or the folder of a model whose layers are called so"
        )


def _architecture(model: nn.Module) -> str:
    return type(model).__name__


def _named(config: Model) -> str | None:
    return None if config.pretrained is None else f"model.pretrained ({config.pretrained})"


def linear_weights(model: nn.Module) -> list[str]:
    """The weights of the layers that the method put in the place of linear ones, the head's excepted."""
    return list(model.linear_weights)  # type: ignore[arg-type]


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The modules that hidden states go through one after the other; empty if the model has none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    # Not the longest: a block may have a list of many experts.
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=nn.ModuleList())


def low_bit_names(model: nn.Module, method: Method) -> list[str]:
    """The parameters that exist only as packed codes, in canonical (sorted) order."""
    if method.stored is None:
        return []
    linears = set(linear_weights(model))
    return sorted(name for name, _ in model.named_parameters() if method.is_low_bit(name in linears))


def replace_linears(model: nn.Module, method: Method, *, is_head: Callable[[nn.Module], bool]) -> list[str]:
    """Put the method's layer in the place of each `nn.Linear`; the weights' names, without the head's.
    ValueError, before anything is changed, if one does not fit the method's options.

    Layers of a class that derives from `nn.Linear` stay: their owners may read their weights themselves.  So
    do the routers of a mixture of experts.
    """
    routers = set(experts.routers(model))
    eps = getattr(getattr(model, "config", None), "rms_norm_eps", 1e-5)
    replacements = {}
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear and layer not in routers:
            try:
                replacements[name] = method.linear(layer, name=name, is_head=is_head(layer), norm_eps=eps)
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from None
    weights = []
    for name, replacement in replacements.items():
        layer = model.get_submodule(name)
        parent, _, attribute = name.rpartition(".")
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
    try:
        weights = replace_linears(model, method, is_head=lambda layer: layer is head)
    except ValueError as error:
        raise ConfigError(
            f"model: method {method.name} does not fit: {error}; write other sizes, or another option"
        ) from None
    model.linear_weights = weights  # type: ignore[assignment]
    if getattr(model.config, "tie_word_embeddings", False):
        model.tie_weights()  # type: ignore[operator]


def shapes(config: RunConfig, vocab_size: int) -> nn.Module:
    """The run's model on the meta device, made once for all who only read it."""
    return _built(config.model, vocab_size, config.method, DTYPES[config.precision.compute])


_built = lru_cache(maxsize=8)(build)


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


def _parts(values: Tensor) -> list[Tensor]:
    """Of a size that a core's cache holds: PyTorch draws uniform numbers first, and makes normal ones of each
    16 of them in a second pass.  So the numbers are those of one call, unless a part has fewer than 16.
    """
    parts = list(values.split(DRAWN))
    if len(parts) > 1 and len(parts[-1]) < 16:
        parts[-2:] = [values[-DRAWN - len(parts[-1]) :]]
    return parts


class InitialWeights:
    """Value of any parameter before the first step, made on demand: random, or read from a pretrained
    folder.
    """

    def __init__(self, model: nn.Module, method: Method, seed: int, folder: Path | str | None):
        self.method, self.seed = method, seed
        self.std = getattr(getattr(model, "config", None), "initializer_range", INITIAL_STD)
        files = None if folder is None else Pretrained(Path(folder), "model.pretrained")
        self.pretrained = None if files is None else files.named_as(model)

    def __call__(  # -> `shape` float32 on the CPU
        self,
        name: str,
        shape: torch.Size,
        room: Tensor | None = None,  # float32, of as many elements at least, in which it may be drawn
    ) -> Tensor:
        if self.pretrained is not None and name in self.pretrained:
            self.pretrained.check_shape(name, tuple(shape))
            return self.pretrained.tensor(name)
        if (value := self.method.initial(name, tuple(shape))) is not None:
            return value
        if self.pretrained is not None:
            raise self.pretrained.missing(name)
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        value = torch.empty(shape) if room is None else room[: prod(shape)].view(shape)
        for part in _parts(value.view(-1)):
            part.normal_(0.0, self.std, generator=generator)
        return value

    def check(self, model: nn.Module) -> None:
        """ConfigError unless a pretrained folder holds the model: each parameter in its shape, and no more.

        What the method adds to the model is in no folder.
        """
        if self.pretrained is not None:
            self.pretrained.check(
                model, is_added=lambda name, shape: self.method.initial(name, shape) is not None
            )
