"""Text from a trained model, sampled token by token."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch

from lowbit_dist.errors import ConfigError

if TYPE_CHECKING:
    from lowbit_dist.trained import Trained


def generate(
    trained: Trained,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,  # 0: always the likeliest token
    top_k: int = 50,  # 0: of all tokens
    top_p: float = 1.0,  # of the likeliest tokens that together have this probability
    seed: int = 0,
) -> dict[str, Any]:
    """The model's continuation of `prompt`; the same for the same seed on the same kind of machine."""
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens ({max_new_tokens}) must be at least 1; write 100, for example")
    if not 0 <= temperature < math.inf:
        raise ConfigError(
            f"--temperature ({temperature}) must be a finite number from 0 up; write 0.8, or 0 for no chance"
        )
    if top_k < 0:
        raise ConfigError(f"--top-k ({top_k}) must be at least 0, which takes all tokens; write 50")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p ({top_p}) must be more than 0, at most 1; write 0.95, for example")
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"--seed ({seed}) must be at least 0 and less than 2^63; write 0, for example")
    tokenizer = trained.tokenizer
    ids = tokenizer.encode(prompt)
    if tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    if not ids:
        raise ConfigError(
            "--prompt () has no tokens, and this model has none that begins a text; write some text"
        )
    longest = trained.max_positions
    if longest is not None and len(ids) + max_new_tokens > longest:
        raise ConfigError(
            f"--prompt has {len(ids)} tokens; with --max-new-tokens {max_new_tokens} they are more than the "
            f"model's max_seq_len {longest}; write fewer, or a shorter text"
        )
    network: Any = trained.network()
    device = next(network.parameters()).device
    torch.manual_seed(seed)
    chance = (
        {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        if temperature
        else {"do_sample": False}
    )
    started = time.monotonic()
    with torch.inference_mode():
        tokens = torch.tensor([ids], device=device)
        out = network.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.eos_id,
            **chance,
        )
    new = out[0, len(ids) :].tolist()
    seconds = time.monotonic() - started
    return {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "prompt": prompt,
        "text": tokenizer.decode([token for token in new if token != tokenizer.eos_id]),
        "tokens": len(new),
        "tokens_per_second": len(new) / seconds,
    }
