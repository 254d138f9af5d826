"""Read SGLang's log: running requests, slots in use, throughput, retractions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(
    r"Decode batch.*?#running-req: (\d+), #token: (\d+).*?gen throughput \(token/s\): ([\d.]+)"
)
_RETRACTED = re.compile(r"#retracted_reqs: (\d+)")


@dataclass(frozen=True)
class DecodeLine:
    """One log line.

    Attributes:
        running: requests in the batch.
        slots: KV slots that are in use and cannot be reclaimed.
        throughput: generated tokens per second since the line before.
    """

    running: int
    slots: int
    throughput: float


class DecodeLog:
    """Follows a growing log file.

    Attributes:
        lines: what was read so far.
        retracted: how often a request was retracted, in what was read so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self.lines: list[DecodeLine] = []
        self.retracted = 0

    def read_new(self) -> list[DecodeLine]:
        """Lines that were completed since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        log = complete.decode(errors="replace")
        new = [
            DecodeLine(int(found[1]), int(found[2]), float(found[3]))
            for found in _LINE.finditer(log)
        ]
        self.retracted += sum(int(found[1]) for found in _RETRACTED.finditer(log))
        self.lines += new
        return new

    @property
    def peak_slots(self) -> int:
        return max((line.slots for line in self.lines), default=0)
