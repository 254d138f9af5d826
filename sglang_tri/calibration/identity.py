"""What statistics belong to: a fingerprint of model, weights and text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch

# Elements read of each tensor, evenly spread: enough to tell fine-tunes apart.
_SAMPLES = 1024


def weights(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes and sampled elements of a model's loaded tensors."""
    digest = hashlib.sha256()
    samples = []
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        samples.append(_sample(tensor))
    if samples:
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 bytes of evenly spread elements, from any memory layout without a copy of it."""
    count = min(_SAMPLES, tensor.numel())
    if count == 0:
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    last = tensor.numel() - 1
    flat = torch.arange(count, device=tensor.device) * last // max(count - 1, 1)
    elements = tensor.detach()[torch.unravel_index(flat, tensor.shape)]
    return elements.contiguous().view(-1).view(torch.uint8)


def fingerprint(parts: dict[str, Any]) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
