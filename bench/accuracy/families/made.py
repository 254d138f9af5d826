"""Tiny random models of architectures that SGLang serves, in the Hugging Face folder layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.models.tiny import VOCAB
from bench.models.tokenizer import write_tokenizer

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": 258,
    "pad_token_id": 0,
    # Larger than trained models begin with: attention is to be selective, so that it matters
    # what is forgotten.
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 1.0, "tie_word_embeddings": True},
    "gemma": {
        "head_dim": 32,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        # It multiplies embeddings by the root of the width.
        "initializer_range": 0.05,
    },
    "glm4": {"head_dim": 32},
    "granite": {},
    "llama": {},
    "mistral": {"sliding_window": None, "head_dim": 32},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "olmo2": {},
    "phi3": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
    },
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
}
"""What configurations have beside the shape, by the name that transformers gives the family."""


def make(family: str, path: Path) -> Path:
    """Write a model of `family` into the folder `path`; its weights come from a fixed seed.

    Returns:
        `path`, loadable by SGLang and by transformers.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_SHAPE, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(path)
    write_tokenizer(path)
    return path
