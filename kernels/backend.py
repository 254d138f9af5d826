"""Which of the two back ends a tensor's device has, and what its compiler can do."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Traits:
    """What kernels are shaped by.

    Attributes:
        warp: threads that run in step.
        fp8: whether the device converts 8-bit floats.
        bf16: whether matrices of bfloat16 can be multiplied: not by Triton's interpreter.
        tensor_memory: whether tensor cores add up in memory of their own, as Blackwell's do.
    """

    warp: int = 32
    fp8: bool = True
    bf16: bool = True
    tensor_memory: bool = False


def has_triton(device: torch.device) -> bool:
    """Whether kernels run there: on NVIDIA's and AMD's GPUs. Elsewhere plain torch does."""
    return device.type == "cuda"


def traits(device: torch.device) -> Traits:
    """Of a GPU; a CPU is one that Triton's interpreter plays."""
    if device.type == "cpu":
        return Traits(bf16=False)
    if torch.version.hip is not None:
        return Traits(warp=64)
    capability = torch.cuda.get_device_capability(device)
    # Before 8.9 there is no instruction for 8-bit floats; GPUs of 10.x have tensor memory.
    return Traits(fp8=capability >= (8, 9), tensor_memory=capability[0] == 10)
