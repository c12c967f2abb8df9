"""Attention within documents: each document of a sample is read as if it stood alone.

    tokens     <s> a  b </s> <s> c </s>       two documents in one sample
    document    1  1  1   1   2  2   2
    position    0  1  2   3   0  1   2        begins anew in each

A token attends to the tokens before it that are of its document.  What a sample has of a document that began
in another sample is a document of its own.  The loss still counts each token but the sample's first, as it
does without the mask: a document's first token is predicted from the end of the one before.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_dist.tokenizer import Marks

# In configurations: how many tokens some layers look back at most.
WINDOWS = ("sliding_window", "attention_chunk_size")
# In configurations: what changes the scores of attention in transformers' plain way of it alone.
ON_SCORES = ("attn_logit_softcapping", "scale_attn_by_inverse_layer_idx")
# Model types that need transformers' mask: they add to it, and where it is left out, attend to what follows.
MASKED = ("doge",)

# Of `sees_what_follows`: layers, so that each kind of them is there; parameters; and the most that a number
# in a configuration is, by its name.
LAYERS = 6
SMALL = 2**25
DEPTH = re.compile(r"layers?$")
WIDTHS = [
    (re.compile(words), most)
    for words, most in {
        "vocab_size": 128,
        "_token_id$": 3,
        "hidden_size|n_embd|d_model|embed_proj_dim|embedding_size|dim_model|^hidden_dim$|^dim$": 64,
        "intermediate|ffn|dim_ff|n_inner|d_inner|d_ff": 64,
        "rotary_dim|^d_head$": 16,
        "heads?$|heads?_kv$": 4,
        "lora_rank": 32,
        "experts$": 32,
        DEPTH.pattern: LAYERS,
    }.items()
]

_is_plain: ContextVar[bool] = ContextVar("samples are plain", default=False)


def within_documents(
    tokens: Tensor,  # [samples, length] int64
    marks: Marks,
    dtype: torch.dtype,  # of the model's computations
) -> dict[str, Tensor]:
    """What a Hugging Face model is given beside `tokens`.

    `attention_mask` [samples, 1, length, length] of `dtype`, to be added to the scores, and `position_ids`
    [samples, length] int64.
    """
    document = _begins(tokens, marks).cumsum(1)
    sees = (document[:, :, None] == document[:, None, :]).tril()
    # Not of truth values, which PyTorch's fused attention takes, but transformers' plain one adds.
    mask = torch.zeros(sees.shape, dtype=dtype, device=tokens.device)
    mask.masked_fill_(~sees, torch.finfo(dtype).min)
    return {"attention_mask": mask[:, None], "position_ids": sees.sum(2) - 1}


@contextmanager
def causal(model: nn.Module) -> Iterator[None]:
    """Inside, a Hugging Face model that is given tokens alone attends by `is_causal` instead of a mask, which
    flash kernels of GPUs do not take, and for which those of CPUs compute what it hides.

    transformers takes positions that jump for borders of packed samples, and makes a mask for every layer of
    what it finds, of nothing as well, for to look would wait for the GPU.  Nothing here is packed so.
    """
    _let_go_of_masks()
    config: Any = model.config
    before = _is_plain.set(config.model_type not in MASKED)
    try:
        yield
    finally:
        _is_plain.reset(before)


@cache
def _let_go_of_masks() -> None:
    """Have transformers look for packed samples only outside of `causal`: of each thread by itself, so once
    and for good.
    """
    from transformers import masking_utils

    library: Any = masking_utils
    look = library.find_packed_sequence_indices

    def look_outside(positions: Tensor) -> Tensor | None:
        return None if _is_plain.get() else look(positions)

    library.find_packed_sequence_indices = look_outside


def sees_what_follows(config: Any) -> bool | None:  # of a PretrainedConfig
    """Whether in such a model, run as it is here, what stands behind a token changes its logits; None if it
    cannot be told.

    A small model of the same kind, of random weights, reads two texts that begin alike.
    """
    from transformers.integrations.accelerate import init_empty_weights

    with _as_it_was():
        try:
            content = _small(config)
            with init_empty_weights(include_buffers=False):
                size = sum(p.numel() for p in _built(content).parameters())
            if size > SMALL:
                return None
            torch.default_generator.manual_seed(0)  # those of GPUs stay as they are
            model = _built(content).eval()
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.3)
            text = torch.arange(5, 29).expand(2, -1).clone()
            text[1, 12:] += 40
            with torch.inference_mode(), causal(model):
                one, other = (model(input_ids=ids[None], use_cache=False).logits[0, :12] for ids in text)
        except Exception:  # of whatever a configuration may not allow to be changed
            return None
        changed = ((one - other).abs().max() / one.std()).item()
        # Sums in another order change it by 1e-4 at most.
        return changed > 1e-2 if math.isfinite(changed) else None


def _built(config: Any) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _small(config: Any) -> Any:
    """The configuration of a model that is narrow and has few layers, otherwise as this one is."""
    content = config.to_dict()
    depths = {n for key, n in content.items() if type(n) is int and DEPTH.search(key)}
    for key, value in content.items():
        if isinstance(value, list | tuple) and len(value) in depths:
            content[key] = list(value[:LAYERS])  # of each layer
        elif type(value) is int:
            most = (most for words, most in WIDTHS if words.search(key))
            content[key] = min(value, next(most, value))
    return type(config).from_dict(content)


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Leaves random numbers, the default type and what libraries warn of as they were."""
    default, level = torch.get_default_dtype(), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(default)
        logging.disable(level)


def _begins(tokens: Tensor, marks: Marks) -> Tensor:  # [samples, length] bool
    """Whether a token is the first of a document: it is its mark, or stands behind the mark of an end."""
    has_begin = marks.begin is not None
    mark = marks.begin if has_begin else marks.end
    assert mark is not None, "a tokenizer without either is refused"
    is_mark = torch.eq(tokens, mark)
    is_first = is_mark if has_begin else is_mark.roll(1, dims=1)
    is_first[:, 0] = True  # of what is left of a document
    return is_first


def why_not_within_documents(model: nn.Module, length: int) -> str | None:
    """Why a Hugging Face model does not read samples of `length` tokens as `within_documents` says, if so."""
    # transformers' own function takes such a mask as it is; what other models do with it differs.
    takes_masks = "create_causal_mask" in vars(sys.modules[type(model).__module__])
    if not takes_masks or "position_ids" not in inspect.signature(model.forward).parameters:
        return "makes its own mask or positions"
    config: Any = model.config
    windows = [getattr(config, name, None) for name in WINDOWS]
    if shorter := [window for window in windows if isinstance(window, int) and window < length]:
        return f"looks back {min(shorter):,} tokens at most, less than a sample"
    return None
