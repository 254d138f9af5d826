"""Deterministic tiny models in the Hugging Face folder layout, for tests and benches.

Each model has 4 layers of width 128, a byte-level tokenizer and random weights from a fixed seed.
It babbles printable ASCII, attends selectively (dropping KV entries moves its logits) and has
queries with a non-zero mean, so calibration statistics of it mean something.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.models.tokenizer import EOS, PRINTABLE, special_id, write_tokenizer

LAYERS = 4
HIDDEN = 128
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 32
FFN = 128
VOCAB = 264  # 256 bytes and 3 specials, rounded up to a multiple of 8
LANES = 16  # residual channels that hold the same value at every position: the source of Q/K means

Rand = Callable[..., torch.Tensor]  # sizes in, independent standard normals out


@dataclass(frozen=True)
class Kind:
    """One architecture: what differs from the shared config, and where Q/K take their scale."""

    architecture: str
    model_type: str
    longest: int
    theta: float
    scaling: dict[str, Any] | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    seed: int = 0


_BY_PARTS = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
_BY_PARTS |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
KINDS = {
    "qwen3": Kind("Qwen3ForCausalLM", "qwen3", 32768, 1e6, qk_norm=True, seed=5),
    "llama3": Kind("LlamaForCausalLM", "llama", 32768, 5e5, _BY_PARTS, seed=2),
    "yarn": Kind("Qwen2ForCausalLM", "qwen2", 16384, 1e6, _YARN, qkv_bias=True, seed=3),
}


def make_model(kind: str, path: Path) -> Path:
    """Write config, weights and tokenizer of one tiny model into the folder `path`; returns it.

    Args:
        kind: "qwen3" (qk-norm, plain RoPE), "llama3" (llama3 RoPE scaling) or "yarn" (YaRN,
            Qwen2 with biases).
        path: folder to fill; made if missing, files of the same name are overwritten.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown tiny model {kind!r}; known: {', '.join(KINDS)}")
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(_config(KINDS[kind])))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": special_id(EOS)}))
    write_tokenizer(path)
    save_file(_weights(KINDS[kind]), path / "model.safetensors", metadata={"format": "pt"})
    return path


def _config(kind: Kind) -> dict[str, Any]:
    return {
        "architectures": [kind.architecture],
        "model_type": kind.model_type,
        "max_position_embeddings": kind.longest,
        "rope_theta": kind.theta,
        **({"rope_scaling": kind.scaling} if kind.scaling else {}),
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": FFN,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": special_id(EOS),
        "bos_token_id": None,
        "pad_token_id": special_id("<|endoftext|>"),
        "torch_dtype": "float32",
    }


def _weights(kind: Kind) -> dict[str, torch.Tensor]:
    """All tensors of the model, float32, named as transformers names them."""
    gen = torch.Generator().manual_seed(kind.seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    embed = rand(VOCAB, HIDDEN)
    embed[:, :LANES] = rand(LANES).sign()
    head = torch.zeros(VOCAB, HIDDEN)
    content = HIDDEN - LANES
    # Only printable rows are non-zero: greedy text is ASCII and re-tokenises to the same ids.
    head[list(PRINTABLE), LANES:] = rand(len(PRINTABLE), content) * (6.0 / content**0.5)
    weights = {
        "model.embed_tokens.weight": embed,
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": head,
    }
    for layer in range(LAYERS):
        for name, tensor in _layer_weights(kind, rand).items():
            weights[f"model.layers.{layer}.{name}"] = tensor
    return weights


def _layer_weights(kind: Kind, rand: Rand) -> dict[str, torch.Tensor]:
    q_size, kv_size = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    # q and k of about 1.7 a channel give attention logits a deviation near 3: a selective softmax.
    scale = 1.0 if kind.qk_norm else 1.7
    weights = {
        "input_layernorm.weight": torch.ones(HIDDEN),
        "post_attention_layernorm.weight": torch.ones(HIDDEN),
        "self_attn.q_proj.weight": _reading(rand, q_size, scale, mean=1.0),
        "self_attn.k_proj.weight": _reading(rand, kv_size, scale, mean=0.6),
        "self_attn.v_proj.weight": _reading(rand, kv_size, 1.5, mean=0.0),
        "self_attn.o_proj.weight": _writing(rand, q_size, 1.5),
        "mlp.gate_proj.weight": _reading(rand, FFN, 1.0, mean=0.5),
        "mlp.up_proj.weight": _reading(rand, FFN, 1.0, mean=0.5),
        "mlp.down_proj.weight": _writing(rand, FFN, 1.0),
    }
    if kind.qk_norm:
        weights["self_attn.q_norm.weight"] = 1.7 + 0.2 * rand(HEAD_DIM)
        weights["self_attn.k_norm.weight"] = 1.7 + 0.2 * rand(HEAD_DIM)
    if kind.qkv_bias:
        weights["self_attn.q_proj.bias"] = rand(q_size)
        weights["self_attn.k_proj.bias"] = 0.5 * rand(kv_size)
        weights["self_attn.v_proj.bias"] = 0.1 * rand(kv_size)
    return weights


def _reading(rand: Rand, rows: int, scale: float, mean: float) -> torch.Tensor:
    """A [rows, HIDDEN] projection: outputs deviate by `scale` around means of `scale * mean`."""
    weight: torch.Tensor = rand(rows, HIDDEN) * (scale / (HIDDEN - LANES) ** 0.5)
    weight[:, :LANES] = rand(rows, LANES) * (scale * mean / LANES**0.5)
    return weight


def _writing(rand: Rand, columns: int, scale: float) -> torch.Tensor:
    """A [HIDDEN, columns] projection into the residual stream that leaves the lanes alone."""
    weight: torch.Tensor = rand(HIDDEN, columns) * (scale / columns**0.5)
    weight[:LANES] = 0.0
    return weight
