"""Ask the probe inside a server (see `probe/kv_probe.py`)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


def ask(folder: Path, timeout_s: float = 60, profile: bool = False) -> dict[str, Any]:
    """The probe's report; resets the peak that it has seen.

    Args:
        profile: note from now on whose functions run, for the next report.
    """
    folder.mkdir(exist_ok=True)
    (folder / "asked").write_text("profile" if profile else "")
    (folder / "asked").rename(folder / "ask")
    deadline = time.monotonic() + timeout_s
    while not (folder / "answer").exists():
        if time.monotonic() > deadline:
            raise TimeoutError("the probe does not answer: is its plugin loaded?")
        time.sleep(0.05)
    report: dict[str, Any] = json.loads((folder / "answer").read_text())
    (folder / "answer").unlink()
    return report
