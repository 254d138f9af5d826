"""Ends a measurement before it is done: at a signal, or because its time is up."""

from __future__ import annotations

import argparse
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

CLOSING_S = 25.0  # For stopping the servers, and for writing what is there.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
_AT_ONCE_S = 1e-3  # A timer of 0 would never go off.


class CutOff(BaseException):
    """It is over; the message says why. `except Exception` must not hold it up."""


class TimeUp(CutOff):
    """By the limit that the user has set."""


class Interrupted(CutOff):
    """By a signal."""


class Clock:
    """Counts from its construction on.

    Args:
        limit: seconds for everything, the end included; None: as long as it takes.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds in which something may still be measured."""
        return math.inf if self.limit is None else self.limit - CLOSING_S - self.seconds


@contextmanager
def cut_off(clock: Clock) -> Iterator[None]:
    """In this block, SIGINT and SIGTERM raise, and so does `clock` once nothing is left of it.

    The first signal alone: a second one would disturb those who stop the servers. For the main
    thread.

    Raises:
        TimeUp, Interrupted: wherever the main thread is.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGALRM:
            raise TimeUp(f"--limit {clock.limit:g}: {CLOSING_S:g} s of it are for the end")
        raise Interrupted(f"ended by {signal.Signals(number).name}")

    before = {each: signal.signal(each, end) for each in _SIGNALS}
    if clock.limit is not None:
        signal.setitimer(signal.ITIMER_REAL, max(clock.left, _AT_ONCE_S))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """Signals that come in this block are answered at its end; for the main thread."""
    arrived: list[int] = []
    # Not blocked in the process's mask: a process that the block starts would inherit that.
    before = {
        each: signal.signal(each, lambda number, _: arrived.append(number)) for each in _SIGNALS
    }
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for number in arrived:
            signal.raise_signal(number)


def seconds_to_end(text: str) -> float:
    """What `--limit` of a command line says."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not CLOSING_S < seconds < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text} is not a number of more than {CLOSING_S:g} seconds, which the end takes"
        )
    return seconds
