"""Hugging Face folders of a few small layers with random weights, as transformers writes them."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

transformers.logging.set_verbosity_error()  # as the command line has it

SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1,
}  # fmt: skip
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 256}
DEEPSEEK = {
    "first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "kv_lora_rank": 64,
    "q_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64,
    "num_key_value_heads": 4,
}  # fmt: skip
STRETCHED = {  # of Llama 3.1: wavelengths from 32 up are 8 times as long
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"]

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3": lambda: transformers.LlamaConfig(**SIZES, rope_scaling=STRETCHED),
    "mistral": lambda: transformers.MistralConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=64),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, head_dim=64),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=64, attn_logit_softcapping=1.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=64, layer_types=LAYERS),
    "phi": lambda: transformers.PhiConfig(**SIZES),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "opt": lambda: transformers.OPTConfig(
        **{**SIZES, "ffn_dim": 512, "word_embed_proj_dim": 256}, dropout=0.1, layerdrop=0.1
    ),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=512, hidden_size=256, n_layer=2, n_head=4, hidden_dropout=0.1, initializer_range=0.1
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=1),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **MIXTURE, num_experts=4, head_dim=64),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES, **MIXTURE, num_experts=4, shared_expert_intermediate_size=512
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=512, n_embd=256, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=2, num_attention_heads=4
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=1),
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, num_local_experts=4, head_dim=64),
    "phimoe": lambda: transformers.PhimoeConfig(**SIZES, num_local_experts=4),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**{**SIZES, **MIXTURE, **DEEPSEEK}),
    "bert": lambda: transformers.BertConfig(
        **{name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    ),
}


def write(
    folder: Path, name: str, *, of_base: bool = False, max_shard_size: str = "5GB", **changed: object
) -> Path:
    """A folder with a model of CONFIGS, whose biases and other vectors are random, too.

    `of_base`: as its part without a head is saved, under names of its own; `max_shard_size`: of a file of
    weights; `changed`: in its configuration.
    """
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for key, value in changed.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.dim() == 1 and not key.endswith(("A_log", "D")):
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    (model.base_model if of_base else model).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def reconfigure(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder: Path, change) -> None:
    """Save the weights again as `change` leaves them in a mapping by name."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def in_blocks_of_fp8(weights) -> None:
    """Each linear weight as float8 in blocks of 128 x 128, its scales beside it."""
    for name in [name for name in weights if name.endswith("proj.weight")]:
        rows, columns = weights[name].shape
        blocks = weights[name].reshape(rows // 128, 128, columns // 128, 128)
        scale = blocks.abs().amax((1, 3)) / 448
        scaled = (blocks / scale[:, None, :, None]).reshape(rows, columns)
        weights[name], weights[f"{name}_scale_inv"] = scaled.to(torch.float8_e4m3fn), scale


def in_packed_codes(weights) -> None:
    """Each linear weight as GPTQ and AWQ keep it: int32 of eight codes, and scales."""
    for name in [name for name in weights if name.endswith("proj.weight")]:
        rows, columns = weights.pop(name).shape
        owner = name.removesuffix("weight")
        weights[f"{owner}qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        weights[f"{owner}scales"] = torch.ones(columns // 128, rows)
