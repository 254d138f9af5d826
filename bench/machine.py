"""What a bench ran on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch


def machine() -> str:
    """Architecture, the CPU model as Linux names it, and the GPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join([platform.machine(), next(names, "?"), *gpu])


def versions() -> dict[str, str]:
    """Of what a server runs on."""
    return {"sglang": version("sglang"), "torch": torch.__version__}
