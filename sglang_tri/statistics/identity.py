"""What statistics belong to: a fingerprint of model, weights and text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch

# Elements read of each tensor, evenly spread: enough to tell fine-tunes apart.
_SAMPLES = 1024
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes and sampled elements of a model's loaded tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        for part, plain in _plain(name, tensor.detach()):
            digest.update(f"{part} {plain.dtype} {tuple(plain.shape)}\n".encode())
            digest.update(_sample(plain).cpu().numpy().tobytes())
    return digest.hexdigest()


def _plain(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor, or those that a quantised one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{part}", getattr(tensor, part))


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Evenly spread elements as integers, from any memory layout without a copy of it."""
    count = min(_SAMPLES, tensor.numel())
    flat = torch.arange(count, device=tensor.device) * (tensor.numel() - 1) // max(count - 1, 1)
    # Some dtypes of quantised weights cannot be indexed.
    return tensor.view(_INTEGERS[tensor.element_size()])[torch.unravel_index(flat, tensor.shape)]


def fingerprint(parts: dict[str, Any]) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
