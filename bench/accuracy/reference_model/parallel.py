"""Data-parallel training on CPU cores, under `torchrun`; alone without it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def start() -> None:
    """Join the other processes, if torchrun started any."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")


def rank() -> int:
    """This process among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over all processes, the same in each."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= processes()
    return tensor


def average_gradients(model: Any) -> None:
    """Give all processes the mean of their gradients."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = mean(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
