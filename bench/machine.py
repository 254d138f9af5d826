"""What a bench ran on."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch


def machine() -> str:
    """Architecture, the CPU model as Linux names it, and the GPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join([platform.machine(), next(names, "?"), *gpu])


@dataclass(frozen=True)
class Seen:
    """What a process of its own has seen, so that this one takes no memory of a GPU.

    Attributes:
        machine: see `machine`.
        card: the GPU's name, or "" where there is none.
        free: bytes of its memory that are free.
    """

    machine: str
    card: str = ""
    free: int = 0


def look() -> Seen:
    """Ask; what cannot be found out is said in place of the machine's name."""
    command = [sys.executable, "-c", "from bench.machine import _tell; _tell()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return Seen(f"not known: {done.stderr[-500:]}")
    return Seen(**json.loads(done.stdout.splitlines()[-1]))


def _tell() -> None:
    gpu = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if gpu else ""
    free = torch.cuda.mem_get_info()[0] if gpu else 0
    print(json.dumps({"machine": machine(), "card": card, "free": free}))


def versions() -> dict[str, str]:
    """Of what a server runs on."""
    return {"sglang": version("sglang"), "torch": torch.__version__}
