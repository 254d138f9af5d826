"""The shape of a published model without its weights, for `--load-format dummy`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.models.tokenizer import EOS, special_id, write_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
}


def make_dummy(name: str, path: Path) -> Path:
    """Write the config of a model, and a byte-level tokenizer, into the folder `path`.

    Raises:
        ValueError: unknown model.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown model shape {name!r}; known: {', '.join(SHAPES)}")
    shape = SHAPES[name]
    write_tokenizer(path, shape["vocab_size"])
    (path / "config.json").write_text(json.dumps({**shape, "eos_token_id": special_id(EOS)}))
    return path
