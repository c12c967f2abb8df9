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
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lowbit_dist.tokenizer import Marks

# In configurations: how many tokens some layers look back at most.
WINDOWS = ("sliding_window", "attention_chunk_size")


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
def causal() -> Iterator[None]:
    """Inside, Hugging Face models that are given tokens alone attend by `is_causal` instead of a mask, which
    flash kernels of GPUs do not take, and for which those of CPUs compute what it hides.

    transformers takes positions that jump for borders of packed samples, and makes a mask for every layer of
    what it finds, of nothing as well, for to look would wait for the GPU.  Nothing here is packed so.
    """
    from transformers import masking_utils

    with patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None):
        yield


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
