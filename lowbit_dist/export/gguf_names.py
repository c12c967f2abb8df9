"""What GGUF calls the tensors of a Llama, and in which order their rows are.

llama.cpp's `llama` turns neighbouring rows of a head's queries and keys as pairs, transformers those that are
half a head apart; its `bitnet` does as transformers does.

    Hugging Face, a head's rows       x0 x1 x2 x3 y0 y1 y2 y3         (xi, yi) is turned as a pair
    GGUF, architecture llama          x0 y0 x1 y1 x2 y2 x3 y3
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.o_proj.norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.down_proj.norm": "ffn_sub_norm",
}


def in_gguf(name: str) -> str | None:
    """GGUF's name of a parameter; None if it has none."""
    if name in TOP:
        return TOP[name]
    inside = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if inside is None or inside[2] not in IN_BLOCK:
        return None
    return f"blk.{inside[1]}.{IN_BLOCK[inside[2]]}.{inside[3]}"


def scale_of(name: str) -> str:
    """GGUF's name of the scale of a whole weight, by GGUF's name of that."""
    return f"{name.removesuffix('weight')}scale"


def heads_of(name: str, n_heads: int, n_kv_heads: int) -> int | None:
    """How many heads' rows a parameter has that rotary positions turn; None: it has no such rows."""
    return {"q_proj": n_heads, "k_proj": n_kv_heads}.get(name.split(".")[-2])


def interleaved(tensor: Tensor, n_heads: int) -> Tensor:
    """Rows in transformers' order, in that of GGUF's `llama`."""
    return tensor.reshape(n_heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def in_halves(tensor: Tensor, n_heads: int) -> Tensor:
    """Rows in the order of GGUF's `llama`, in transformers' again."""
    return tensor.reshape(n_heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def frequencies(theta: float, head_dim: int) -> Tensor:  # [head_dim / 2] float32
    """Of rotary positions that are not scaled."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
