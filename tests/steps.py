"""What a server's log says of its decode steps."""

from __future__ import annotations

import re
from pathlib import Path

_STEP = re.compile(r"Decode batch.*?#running-req: (\d+), #token: (\d+)")


def decode_steps(log: Path, begin: int) -> list[tuple[int, int]]:
    """Running requests, and KV slots in use, of each step that was logged.

    Args:
        begin: size in bytes that the log had before the first of them.
    """
    text = log.read_bytes()[begin:].decode(errors="replace")
    return [(int(running), int(slots)) for running, slots in _STEP.findall(text)]
