"""What this machine's CPU can do."""

from __future__ import annotations

import torch

# Names of the instructions in `torch.cpu.get_capabilities`, of x86 and of ARM.
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def multiplies_bfloat16() -> bool:
    """Whether it has instructions for bfloat16; without them float32 is faster."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in _BFLOAT16)
