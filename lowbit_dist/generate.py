"""Text from a trained model, sampled token by token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowbit_dist.errors import ConfigError
from lowbit_dist.pretrained import vocabulary

if TYPE_CHECKING:
    from lowbit_dist.trained import TextTokenizer, Trained

LEAST_TEMPERATURE = 1e-6  # logits divided by less may be infinite


def generate(
    trained: Trained,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,  # 0: always the likeliest token
    top_k: int = 50,  # 0: of all tokens
    top_p: float = 1.0,  # of the likeliest tokens that together have this probability
    seed: int = 0,
    stop: Sequence[str] = (),  # texts before the first of which the continuation ends
    network: nn.Module | None = None,  # the model's, where it has been loaded already
    stream: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The model's continuation of `prompt`; the same for the same seed on the same kind of machine.

    `stream` is given the prompt when the first token is about to be made, and then the text as it comes.
    """
    check(max_new_tokens, temperature, top_k, top_p, seed)
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of the command line that are none
        raise ConfigError(f"--prompt ({prompt!r}) must be text in UTF-8; write it so") from None
    from transformers import GenerationConfig

    tokenizer = trained.tokenizer
    ids = tokenizer.encode(prompt)
    if tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids]
    if not ids:
        raise ConfigError(
            "--prompt () has no tokens, and this model has none that begins a text; write some text"
        )
    trained.check_tokens(ids, "--prompt")
    longest = trained.max_positions
    if longest is not None and len(ids) + max_new_tokens > longest:
        room = longest - len(ids)
        fewer = f"fewer, at most {room}, or " if room > 0 else ""
        raise ConfigError(
            f"--prompt has {len(ids)} tokens; with --max-new-tokens {max_new_tokens} they are more than the "
            f"model's max_seq_len {longest}; write {fewer}a shorter text"
        )
    loaded: Any = trained.network(integer=True) if network is None else network
    loaded.generation_config = GenerationConfig()  # a model's configuration may have, say, penalties
    device = next(loaded.parameters()).device
    torch.manual_seed(seed)
    chance = (
        {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        if temperature
        else {"do_sample": False}
    )
    rows = vocabulary(trained.hf_config) or tokenizer.vocab_size
    streamed = _Streamed(tokenizer, prompt, ids, stream, stop)
    started = time.monotonic()
    with torch.inference_mode():
        tokens = torch.tensor([ids], device=device)
        out = loaded.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.eos_id,
            # Embeddings may have more rows than there are tokens.
            suppress_tokens=[i for i in range(rows) if i not in tokenizer.ids] or None,
            streamer=streamed,
            stopping_criteria=[streamed.is_over] if stop else None,
            **chance,
        )
    new = out[0, len(ids) :].tolist()
    seconds = time.monotonic() - started
    return {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "prompt": prompt,
        "text": streamed.text,
        "tokens": len(new),
        "prompt_tokens": len(ids),
        "finished": streamed.has_stopped or new[-1:] == [tokenizer.eos_id],
        "tokens_per_second": len(new) / seconds,
    }


def check(max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """ConfigError if one of these options of `generate` is no such thing."""
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens ({max_new_tokens}) must be at least 1; write 100, for example")
    if not (temperature == 0 or LEAST_TEMPERATURE <= temperature < math.inf):
        raise ConfigError(
            f"--temperature ({temperature}) must be 0, or a finite number from {LEAST_TEMPERATURE:g} up; "
            "write 0.8, or 0 for no chance"
        )
    if top_k < 0:
        raise ConfigError(f"--top-k ({top_k}) must be at least 0, which takes all tokens; write 50")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p ({top_p}) must be more than 0, at most 1; write 0.95, for example")
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"--seed ({seed}) must be at least 0 and less than 2^63; write 0, for example")


class _Streamed:
    """What transformers hands each token to, the prompt's first: the new ones' text, in whole characters, up
    to the first of the texts `stop`.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt: str,
        ids: Sequence[int],
        stream: Callable[[str], None],
        stop: Sequence[str] = (),
    ):
        self.tokenizer, self.prompt, self.stream, self.stop = tokenizer, prompt, stream, stop
        self.ids = list(ids)
        self.text = ""
        self.has_stopped = False
        self._begun = False
        self._held = ""  # the end of the text so far, which may begin one of `stop`
        # Of `ids`: from where on they are decoded, for what a piece means may depend on those before, and up
        # to where their text has been given.  Both lie between two characters.
        self._first, self._given = 0, len(ids)

    def put(self, tokens: Tensor) -> None:
        if not self._begun:
            self._begun = True
            self.stream(self.prompt)
            return
        self.ids += [token for token in tokens.tolist() if token != self.tokenizer.eos_id]
        new = self._new()
        # U+FFFD: the bytes so far may be the beginning of a character.
        if new and not new.endswith("\ufffd"):
            self._give(new)

    def is_over(self, ids: Tensor, scores: Any) -> Tensor:  # [1] bool
        """What transformers asks after each token."""
        return torch.full((len(ids),), self.has_stopped, device=ids.device)

    def end(self) -> None:
        if not self.has_stopped:
            self._give(self._new())
            self._say(self._held)

    def _new(self) -> str:
        given, text = (self.tokenizer.decode(self.ids[self._first : end]) for end in (self._given, None))
        if text.startswith(given):
            return text[len(given) :]
        # Half a character may spoil the whole ones before it, where all are spelled in bytes.
        return self.tokenizer.decode(self.ids[self._given :])

    def _give(self, text: str) -> None:
        self._first, self._given = self._given, len(self.ids)
        text = self._held + text
        ends = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        self.has_stopped = bool(ends)
        n_held = 0 if ends else max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - n_held :]
        self._say(text[: min(ends, default=len(text) - n_held)])

    def _say(self, text: str) -> None:
        self.text += text
        if text:
            self.stream(text)


def _overlap(text: str, stop: str) -> int:
    """How long the longest end of `text` is that begins `stop`, without being all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
