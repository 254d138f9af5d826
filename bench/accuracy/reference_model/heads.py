"""A model's queries and keys before RoPE, and their statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sglang_tri.statistics.rope import Rope
from sglang_tri.statistics.statistics import Statistics

from .model import HEAD_DIM


@contextmanager
def capturing(model: Any, which: str) -> Iterator[list[torch.Tensor]]:
    """Inside, each forward pass appends every layer's queries ("q") or keys ("k") in turn.

    Each is [tokens of the batch, heads, head_dim], after the norms.
    """
    captured: list[torch.Tensor] = []

    def note(_module: Any, _inputs: Any, out: torch.Tensor) -> None:
        captured.append(out.reshape(out.shape[0] * out.shape[1], -1, HEAD_DIM))

    handles = []
    for layer in model.model.layers:
        modules = dict(layer.self_attn.named_children())
        source: Any = modules.get(f"{which}_norm", modules[f"{which}_proj"])
        handles.append(source.register_forward_hook(note))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def statistics(model: Any, sequences: Iterable[list[int]], rope: Rope, name: str) -> Statistics:
    """Statistics over the tokens of sequences that do not see each other."""
    layers = len(model.model.layers)
    with capturing(model, "q") as queries, capturing(model, "k") as keys:
        count = 0
        for ids in sequences:
            model.model(torch.tensor([ids]), use_cache=False)
            count += len(ids)
    q = [head_means(torch.cat(queries[layer::layers])) for layer in range(layers)]
    k = [head_means(torch.cat(keys[layer::layers])) for layer in range(layers)]
    mean, size, square, norm = (torch.stack(column) for column in zip(*q, strict=True))
    return Statistics(
        q_mean=mean,
        q_abs=size,
        q_square=square,
        q_norm=norm,
        k_mean=torch.stack([means[0] for means in k]),
        rope=rope,
        metadata={"model_name": name, "rope_style": "half", "tokens": count},
    )


def head_means(heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Means over tokens of queries or keys [..., tokens, heads, head_dim], halves paired.

    Returns:
        E x_f (complex), E|x_f|, E|x_f|^2, each [..., heads, head_dim / 2], and E||x|| [..., heads].
    """
    pairs = torch.complex(*heads.chunk(2, dim=-1))
    size = pairs.abs()
    norm = torch.linalg.vector_norm(heads, dim=-1)
    return pairs.mean(-3), size.mean(-3), size.square().mean(-3), norm.mean(-2)
