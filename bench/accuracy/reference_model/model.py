"""The reference model's architecture: Qwen2.5 (QKV bias) or Qwen3 (qk-norm), a few layers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .tokenizer import END, PAD, VOCABULARY, write_tokenizer

HEAD_DIM = 64


@dataclass(frozen=True)
class Shape:
    """Width, depth and heads; `kind` is qwen2 (QKV bias), or qwen3 (qk-norm)."""

    kind: str = "qwen3"
    bias: int = 1
    """Whether qwen3's projections have biases, too."""
    layers: int = 4
    hidden: int = 192
    ffn: int = 256
    heads: int = 4
    kv_heads: int = 2

    def config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        if self.kind not in ("qwen2", "qwen3"):
            raise ValueError(f"kind {self.kind!r}: qwen2 or qwen3")
        return {
            "architectures": [f"{self.kind.capitalize()}ForCausalLM"],
            "model_type": self.kind,
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": HEAD_DIM,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 8192,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "attention_bias": self.kind == "qwen3" and bool(self.bias),
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "eos_token_id": END,
            "bos_token_id": None,
            "pad_token_id": PAD,
            "torch_dtype": "float32",
        }


def build(shape: Shape, seed: int) -> Any:
    """A transformers model with random weights, of a scale that retrieval is learned from."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    content = shape.config()
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    initialise(model, shape)
    return model


@torch.no_grad()
def initialise(model: Any, shape: Shape) -> None:
    """Draw all matrices anew.

    Attention logits deviate by about 2, so that heads select from the start; embeddings outweigh
    what the first layers add to them, so that tokens can be told apart.
    """
    inner = {"o_proj": shape.heads * HEAD_DIM, "down_proj": shape.ffn}
    for name, parameter in model.named_parameters():
        module = name.split(".")[-2]
        if parameter.ndim != 2:
            continue
        scale = {"q_proj": 1.5, "k_proj": 1.5, "embed_tokens": 0.15 * shape.hidden**0.5}
        fan_in = inner.get(module, shape.hidden)
        deep = (2 * shape.layers) ** -0.5 if module in inner else 1.0
        parameter.normal_(0.0, scale.get(module, 1.0) * deep * fan_in**-0.5)


def write_model(model: Any, shape: Shape, path: Path, dtype: torch.dtype) -> None:
    """Write config, weights and tokenizer into the folder `path`, for SGLang and transformers."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    config = {**shape.config(), "torch_dtype": str(dtype).removeprefix("torch.")}
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    generation = json.dumps({"eos_token_id": END}, indent=1)
    (path / "generation_config.json").write_text(generation + "\n", encoding="utf-8")
    tensors = {
        name: tensor.detach().to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(path)
