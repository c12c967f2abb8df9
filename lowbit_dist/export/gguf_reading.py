"""A GGUF file read back: numbers by the public `gguf` package, logits by transformers' architectures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit_dist.export import finished, gguf_names, gguf_tokenizer
from lowbit_dist.export.gguf_file import Contents

ROUNDED = "lowbit.rounded"  # the metadata's entry that lists tensors which their type rounded
SETTINGS = {  # of transformers' configurations, by GGUF's keys
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}


class File:
    """What a GGUF file holds; nothing is taken from the model that it was written from."""

    rounding = None  # transformers does not round inputs, llama.cpp does
    has_reciprocals = False

    def __init__(self, path: Path):
        self.contents = Contents(path)
        self.architecture: str = self.contents.metadata["general.architecture"]
        self._settings = {
            name: self.contents.metadata[f"{self.architecture}.{key}"] for name, key in SETTINGS.items()
        }

    def weight(self, name: str) -> Tensor | None:  # of its shape, float32
        """A tensor by its name in transformers, with the rows in their order there; None for one that was
        rounded.
        """
        is_rounded = gguf_names.in_gguf(name) in self.contents.metadata[ROUNDED]
        return None if is_rounded else self._weight(name)

    def _weight(self, name: str) -> Tensor:
        stored = gguf_names.in_gguf(name)
        if stored is None or stored not in self.contents.tensors:
            raise KeyError(f"the file has no {name} ({stored})")
        values = torch.from_numpy(self.contents.values(stored).astype(np.float32))
        if (scale := gguf_names.scale_of(stored)) in self.contents.tensors:
            values *= float(self.contents.values(scale)[0])
        heads = gguf_names.heads_of(
            name, self._settings["num_attention_heads"], self._settings["num_key_value_heads"]
        )
        is_turned = heads is not None and self.architecture == "llama"
        return gguf_names.in_halves(values, heads) if heads is not None and is_turned else values

    @cached_property
    def encode(self) -> Callable[[str], list[int]]:
        """The ids of a text, without marks of its beginning and end."""
        return gguf_tokenizer.reading(self.contents.metadata)

    def logits(self, ids: Sequence[int]) -> Tensor:  # [len(ids), vocabulary] float32
        """Of each position of one text."""
        return finished.logits(self._network, ids)

    @cached_property
    def _network(self) -> Any:
        from transformers import BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM
        from transformers.integrations.accelerate import init_empty_weights

        held = self.contents.tensors
        biased = {name.split(".")[2] for name in held if name.endswith(".bias")}
        settings = {
            **self._settings,
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in held,
            "attention_bias": any(name.startswith("attn") for name in biased),
            "mlp_bias": any(name.startswith("ffn") for name in biased),
        }
        with init_empty_weights(include_buffers=False):
            network: Any = (
                BitNetForCausalLM(BitNetConfig(**settings))
                if self.architecture == "bitnet"
                else LlamaForCausalLM(LlamaConfig(**settings))
            )
        weights = {}
        for name, parameter in network.named_parameters():
            if name == "lm_head.weight" and settings["tie_word_embeddings"]:
                continue
            ours = name.replace("attn_sub_norm", "o_proj.norm").replace("ffn_sub_norm", "down_proj.norm")
            is_absent = name.endswith(".bias") and gguf_names.in_gguf(ours) not in held
            weights[name] = torch.zeros(parameter.shape) if is_absent else self._weight(ours)
        network.load_state_dict(weights, strict=False, assign=True)
        network.tie_weights()
        if "rope_freqs.weight" in held:
            network.model.rotary_emb.inv_freq /= torch.tensor(self.contents.values("rope_freqs.weight"))
        return network.eval()
