"""Scratch memory of fixed size, handed out anew for each chunk of a round."""

from __future__ import annotations

import math
import sys

import torch

# What every piece starts at a multiple of, in bytes.
ALIGNMENT = 256


class Workspace:
    """Memory from which tensors are taken one behind the other until `reset`.

    Work on one stream may use it again and again: what was enqueued earlier is finished earlier.

    Args:
        size: bytes; None allocates each tensor by itself.
        device: where.
    """

    def __init__(self, size: int | None, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.memory = (
            None if size is None else torch.empty(size, dtype=torch.uint8, device=self.device)
        )
        self._used = 0
        self._counters = torch.zeros(0, dtype=torch.int32, device=self.device)

    @classmethod
    def or_new(cls, workspace: Workspace | None, device: torch.device) -> Workspace:
        """`workspace`, or one that allocates."""
        return cls(None, device) if workspace is None else workspace

    @property
    def size(self) -> int:
        """Bytes that may be taken."""
        return sys.maxsize if self.memory is None else self.memory.numel()

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return self._used

    def reset(self, used: int = 0) -> None:
        """What was taken behind the first `used` bytes may be taken again."""
        self._used = used

    def counters(self, number: int) -> torch.Tensor:
        """int32 [number] of zeros, which whoever counts with them leaves at zero again."""
        if number > self._counters.numel():
            self._counters = torch.zeros(number, dtype=torch.int32, device=self.device)
        return self._counters[:number]

    def take(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor.

        Raises:
            ValueError: there is not enough left.
        """
        if self.memory is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > self.memory.numel():
            raise ValueError(
                f"{size} bytes do not fit into a workspace of {self.memory.numel()} "
                f"of which {self._used} are in use"
            )
        piece = self.memory[self._used : self._used + size]
        self._used += aligned(size)
        return piece.view(dtype).view(shape)


def aligned(size: int) -> int:
    """`size` rounded up to where the next piece starts."""
    return -(-size // ALIGNMENT) * ALIGNMENT
