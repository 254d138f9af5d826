"""A forward pass over explicit KV lists, with the weights of a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .cache import VACANT, LayerCache
from .rope import Rope

_SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Bounds the size of one attention matrix.
_CHUNK = 512


class Decoder:
    """Embeds, attends and projects tokens of one request; knows nothing of eviction."""

    def __init__(
        self,
        model_dir: str | Path,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """kv_dtype: what keys, after RoPE, and values are rounded to when they are cached."""
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype {dtype}: float32 or float64")
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, attn_implementation="eager", local_files_only=True
        ).eval()
        if type(model).__name__ not in _SUPPORTED:
            raise ValueError(f"{type(model).__name__}: one of {', '.join(_SUPPORTED)}")
        config = model.config
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise ValueError("sliding window attention is not supported")
        self.model = model
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        self.layers: int = config.num_hidden_layers
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = model.model.layers[0].self_attn.head_dim
        self.scaling: float = model.model.layers[0].self_attn.scaling
        self.rope = Rope(model, self.head_dim)

    def new_cache(self) -> list[LayerCache]:
        """Empty KV lists, one entry a layer."""
        return [
            LayerCache.empty(self.heads, self.kv_heads, self.head_dim, self.dtype)
            for _ in range(self.layers)
        ]

    @torch.inference_mode()
    def feed(self, ids: list[int], first_position: int, cache: list[LayerCache]) -> torch.Tensor:
        """Append tokens at logical positions first_position, ...; final hidden states [T, width].

        Every token attends to all that the cache holds before it, and to itself.
        """
        outputs = []
        for begin in range(0, len(ids), _CHUNK):
            chunk = torch.tensor(ids[begin : begin + _CHUNK])
            positions = torch.arange(len(chunk)) + first_position + begin
            outputs.append(self._forward(chunk, positions, cache))
        return torch.cat(outputs)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits [T, vocabulary] of final hidden states [T, width]."""
        logits: torch.Tensor = self.model.lm_head(hidden)
        return logits

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: list[LayerCache]
    ) -> torch.Tensor:
        x = self.model.model.embed_tokens(ids)
        for layer, kv in zip(self.model.model.layers, cache, strict=True):
            normed = _norm(layer.input_layernorm, x)
            x = x + self._attention(layer.self_attn, normed, positions, kv)
            x = x + layer.mlp(_norm(layer.post_attention_layernorm, x))
        return _norm(self.model.model.norm, x)

    def _attention(
        self, block: Any, x: torch.Tensor, positions: torch.Tensor, kv: LayerCache
    ) -> torch.Tensor:
        queries = self._split(block.q_proj(x), getattr(block, "q_norm", None))
        keys = self._split(block.k_proj(x), getattr(block, "k_norm", None))
        values = self._split(block.v_proj(x), None)
        rotated = self.rope.rotate(keys, positions)
        if self.kv_dtype is not None:
            rotated, values = (x.to(self.kv_dtype).to(self.dtype) for x in (rotated, values))
            keys = self.rope.rotate_back(rotated, positions)
        kv.append(keys, rotated, values, positions)
        queries = self.rope.rotate(queries, positions)
        weights = attention(queries, kv.rotated, kv.positions != VACANT, self.scaling)
        kv.observe(queries, weights)
        mixed = (weights @ kv.values[:, None]).flatten(0, 1)
        out: torch.Tensor = block.o_proj(mixed.transpose(0, 1).flatten(1))
        return out

    def _split(self, x: torch.Tensor, norm: Any | None) -> torch.Tensor:
        """[T, heads * head_dim] to [heads, T, head_dim], normed per head where the model does."""
        x = x.view(len(x), -1, self.head_dim)
        return (x if norm is None else _norm(norm, x)).transpose(0, 1)


def attention(
    queries: torch.Tensor, keys: torch.Tensor, resident: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Softmax weights of the last T of m tokens: [kv heads, group, T, m].

    queries [heads, T, head_dim], keys [kv heads, m, head_dim], resident bool [kv heads, m]; of the
    last T keys query i sees the first i + 1, of the others all that are resident.
    """
    new, m = queries.shape[1], keys.shape[1]
    grouped = queries.reshape(keys.shape[0], -1, new, queries.shape[2])
    weights = grouped @ keys[:, None].transpose(2, 3) * scaling
    causal = torch.ones(new, m, dtype=torch.bool).tril(m - new)
    visible = causal & resident[:, None, None]
    return weights.masked_fill(~visible, float("-inf")).softmax(dim=-1)


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """The model's RMS norm; in float64 spelled out, as transformers' own falls to float32."""
    normed: torch.Tensor
    if x.dtype == torch.float64:
        variance = x.pow(2).mean(-1, keepdim=True)
        normed = norm.weight * (x * torch.rsqrt(variance + norm.variance_epsilon))
    else:
        normed = norm(x)
    return normed
