"""The layout of the official TriAttention repository: a `.pt` file with an entry for each head."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from sglang_tri.errors import KvPolicyError
from sglang_tri.statistics import layout

_HEAD = re.compile(r"layer(\d+)_head(\d+)$")
# Beside the official entries: what only our files have, so that nothing is lost on the way back.
_EXTRA = "sglang_tri"


def read(path: Path) -> layout.Content:
    """Tensors and metadata of an official file.

    Raises:
        KvPolicyError: it is damaged, holds code, or is no statistics file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise KvPolicyError(
            f"{path} holds more than tensors and plain metadata, or is damaged: "
            "use a file in the official TriAttention layout."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise layout.unreadable(path, error) from error
    if not isinstance(content, dict) or not isinstance(content.get("stats"), dict):
        raise KvPolicyError(f"{path} has no 'stats' table: it is not a statistics file.")
    metadata = content.get("metadata") or {}
    if isinstance(metadata, dict):
        metadata = {n: value for n, value in metadata.items() if n != "sampled_heads"}
    extra = content.get(_EXTRA, {})
    if not isinstance(extra, dict) or not all(torch.is_tensor(t) for t in extra.values()):
        raise KvPolicyError(f"{path} has a table {_EXTRA!r} that holds more than tensors.")
    return {**_stacked(content["stats"], path), **extra}, metadata


def write(tensors: dict[str, torch.Tensor], metadata: dict[str, Any], path: Path) -> None:
    """Write a file that readers of the official layout understand."""
    official = {name: tensors[name] for name in layout.REQUIRED}
    layers, heads, pairs = official["q_abs_mean"].shape
    table = {
        _head(layer, head): {name: t[layer, head].clone() for name, t in official.items()}
        for layer in range(layers)
        for head in range(heads)
    }
    sampled = [[layer, head] for layer in range(layers) for head in range(heads)]
    header = {"head_dim": 2 * pairs, **metadata, "sampled_heads": sampled}
    extra = {name: tensor for name, tensor in tensors.items() if name not in official}
    torch.save({"metadata": header, "stats": table, **({_EXTRA: extra} if extra else {})}, path)


def _stacked(heads: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    layers, per_layer = _grid(heads, path)
    if len({len(_vector(heads, h, name, path)) for h in heads for name in layout.REQUIRED}) != 1:
        raise KvPolicyError(f"{path} has vectors of different lengths.")
    names = [[_head(layer, head) for head in range(per_layer)] for layer in range(layers)]
    return {
        name: torch.stack([torch.stack([_vector(heads, h, name, path) for h in r]) for r in names])
        for name in layout.REQUIRED
    }


def _head(layer: int, head: int) -> str:
    return f"layer{layer:02d}_head{head:02d}"


def _grid(heads: dict[str, Any], path: Path) -> tuple[int, int]:
    """(layers, heads per layer) of a complete table of heads."""
    found = {(int(m[1]), int(m[2])) for name in heads if (m := _HEAD.match(str(name)))}
    layers = 1 + max((layer for layer, _ in found), default=-1)
    per_layer = 1 + max((head for _, head in found), default=-1)
    if not found or len(found) != len(heads) or len(found) != layers * per_layer:
        raise KvPolicyError(
            f"{path} has {len(heads)} entries for {layers} layers of {per_layer} heads: "
            "every query head of every layer must be there once."
        )
    return layers, per_layer


def _vector(heads: dict[str, Any], head: str, name: str, path: Path) -> torch.Tensor:
    entry = heads.get(head)
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, torch.Tensor) or value.ndim != 1:
        raise KvPolicyError(f"{path} has no vector {name!r} for {head}.")
    return value.float()
