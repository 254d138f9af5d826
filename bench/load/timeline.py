"""What a server does over time, read off its log while it works."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bench.decode_log import DecodeLine, DecodeLog

PERIOD_S = 0.1


@dataclass(frozen=True)
class Sample:
    """A line of the log, and the Unix time at which it was read."""

    time: float
    line: DecodeLine


class Timeline:
    """Reads a log as it grows; a context manager.

    Attributes:
        samples: the lines, in order.
        retracted: how often a request was retracted.
    """

    def __init__(self, log: Path) -> None:
        self._log = DecodeLog(log)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self.samples: list[Sample] = []

    @property
    def retracted(self) -> int:
        return self._log.retracted

    def __enter__(self) -> Timeline:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._read()

    def _follow(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self._read()

    def _read(self) -> None:
        now = time.time()
        self.samples += [Sample(now, line) for line in self._log.read_new()]
