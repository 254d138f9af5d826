"""What a bench ran on."""

from __future__ import annotations

import platform
from pathlib import Path


def machine() -> str:
    """Architecture, and the CPU model as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    return f"{platform.machine()}, {next(names, '?')}"
