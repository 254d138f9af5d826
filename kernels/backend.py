"""Which of the two back ends a tensor's device has."""

from __future__ import annotations

import torch


def has_triton(device: torch.device) -> bool:
    """Whether kernels run there: on NVIDIA's and AMD's GPUs. Elsewhere plain torch does."""
    return device.type == "cuda"
