"""Statistics as the product measures them, by `sglang-tri calibrate` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.accuracy.calibration.texts import ANSWERS, CHAT, DEFAULT, LATER, PROSE

REFERENCE_TOKENS = 16384


@dataclass(frozen=True)
class Measurement:
    """What statistics are measured with.

    Attributes:
        text: a name of `texts`.
        tokens: of the text.
    """

    text: str
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.text} {self.tokens}"


REFERENCE = Measurement(DEFAULT, REFERENCE_TOKENS)


def plan(given: list[str]) -> list[Measurement]:
    """All measurements, the reference first; `given` names further texts."""
    sizes = (4096, REFERENCE_TOKENS)
    others = [name for name in dict.fromkeys((PROSE, CHAT, *given)) if name not in ANSWERS]
    return [
        REFERENCE,
        *(Measurement(DEFAULT, tokens) for tokens in (1024, 2048, 4096, 8192)),
        Measurement(LATER, 4096),
        *(Measurement(text, tokens) for text in others for tokens in sizes),
    ]


def measure(wanted: Measurement, model_dir: Path, folder: Path) -> Path:
    """Statistics in the official layout, in `folder`, where the text is NAME.txt.

    What is there is not measured again. Raises RuntimeError where `calibrate` fails.
    """
    path = folder / f"{wanted.text}-{wanted.tokens}.pt"
    if path.exists():
        return path
    command = [sys.executable, "-m", "sglang_tri.patches.cli", "calibrate", "-o", str(path)]
    command += ["--model-path", str(model_dir), "--dtype", "float32"]
    command += ["--kv-calibration-tokens", str(wanted.tokens)]
    if wanted.text != DEFAULT:
        command += ["--kv-calibration-text", str(folder / f"{wanted.text}.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    return path


def described(path: Path) -> dict[str, Any]:
    """Tokens and sequences that a statistics file says it was measured with."""
    metadata = torch.load(path, map_location="cpu", weights_only=True)["metadata"]
    return {field: metadata[field] for field in ("tokens", "sequences")}
