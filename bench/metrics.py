"""What a server does over time, by SGLang's own metrics."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

import requests
from prometheus_client.parser import text_string_to_metric_families

FLAGS = ["--enable-metrics"]
PERIOD_S = 0.1


def read(url: str) -> dict[str, float]:
    """The metrics of the server at `url`, by name without "sglang:", and mode where they have one.

    Values that only other labels tell apart are added up.
    """
    text = requests.get(f"{url}/metrics", timeout=60).text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            mode = sample.labels.get("mode")
            name = sample.name.removeprefix("sglang:") + (f" {mode}" if mode else "")
            found[name] = found.get(name, 0.0) + sample.value
    return found


@dataclass(frozen=True)
class Sample:
    """One look at the metrics.

    Attributes:
        time: Unix time.
        running: requests in the batch that decodes.
        slots: KV slots that are in use and cannot be reclaimed.
        throughput: generated tokens per second.
        decoded: tokens that were generated since the server started.
        retracted: how often a request lost its slots since then.
        read: KV slots that a decode step reads; what requests share counts once for each of them.
    """

    time: float
    running: int
    slots: int
    throughput: float
    decoded: int
    retracted: int
    read: int

    @classmethod
    def of(cls, url: str) -> Sample:
        now, found = time.time(), read(url)
        return cls(
            now,
            int(found.get("num_running_reqs", 0)),
            int(found.get("num_used_tokens", 0)),
            found.get("gen_throughput", 0.0),
            int(found.get("realtime_tokens_total decode", 0)),
            int(found.get("num_retracted_requests_total", 0)),
            int(found.get("decode_sum_seq_lens", 0)),
        )


class Watch:
    """Looks again and again; a context manager.

    The server, started with `FLAGS`, brings its figures up to date every `--decode-log-interval`
    decode steps: peaks in between are not seen.

    Args:
        url: of the server.
        on_look: called with each sample.

    Attributes:
        samples: in order; the first is from before the block, the last from behind it.
    """

    def __init__(self, url: str, on_look: Callable[[Sample], object] = lambda sample: None) -> None:
        self._url, self._on_look = url, on_look
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self.samples: list[Sample] = []

    def __enter__(self) -> Watch:
        self._look()
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
        if kind is None:
            self._look()

    @property
    def decoding(self) -> list[Sample]:
        """Samples with requests in the batch."""
        return [sample for sample in self.samples if sample.running]

    @property
    def peak_slots(self) -> int:
        return max((sample.slots for sample in self.samples), default=0)

    @property
    def retracted(self) -> int:
        """In the block."""
        return self.samples[-1].retracted - self.samples[0].retracted

    def _follow(self) -> None:
        while not self._stop.wait(PERIOD_S):
            with suppress(requests.RequestException):  # A busy server may be late.
                self._look()

    def _look(self) -> None:
        sample = Sample.of(self._url)
        self.samples.append(sample)
        self._on_look(sample)
