"""Time of work on a device, and what the device can do at best."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_COPY_BYTES = 1 << 30
_TINY_COPY_BYTES = 1 << 20
_MATRIX = 8192
_TINY_MATRIX = 64
# Keeps the device busy while the host enqueues what is timed: of the order of ten milliseconds.
_HEAD_START_CYCLES = 20_000_000


@dataclass(frozen=True)
class Times:
    """Milliseconds: median, lowest and highest of the repeats."""

    median: float
    lowest: float
    highest: float

    def times(self, factor: float) -> Times:
        return Times(self.median * factor, self.lowest * factor, self.highest * factor)


@dataclass(frozen=True)
class Limits:
    """Of the device, measured: bytes per second of a copy, operations per second of a product."""

    copy: float
    flops: float


def measure(
    call: Callable[[int], object],
    sets: int,
    repeats: int,
    device: torch.device,
    prepare: Callable[[], None] | None = None,
) -> Times:
    """Time `call(set)`, one set of data after the other.

    Args:
        repeats: timed calls; each set is called once before, so that everything is compiled.
        prepare: called before each pass over the sets, not timed.
    """
    taken = []
    for index in range(sets + repeats):
        if prepare is not None and index % sets == 0:
            prepare()
        elapsed = _milliseconds(call, index % sets, device)
        if index >= sets:
            taken.append(elapsed)
    return Times(statistics.median(taken), min(taken), max(taken))


def _milliseconds(call: Callable[[int], object], index: int, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        call(index)
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(_HEAD_START_CYCLES)
    first.record()
    call(index)
    last.record()
    torch.cuda.synchronize(device)
    return float(first.elapsed_time(last))


def limits(repeats: int, device: torch.device) -> Limits:
    """A copy from device memory to device memory, and a bfloat16 matrix product."""
    tiny = device.type == "cpu"
    size = _TINY_COPY_BYTES if tiny else _COPY_BYTES
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda _: target.copy_(source), 1, repeats, device)
    side = _TINY_MATRIX if tiny else _MATRIX
    matrix = torch.randn(side, side, device=device).bfloat16()
    product = measure(lambda _: matrix @ matrix, 1, repeats, device)
    return Limits(2e3 * size / copy.median, 2e3 * side**3 / product.median)


def free_bytes(device: torch.device) -> int:
    """Memory that a cell may take; a CPU's tiny cells always fit."""
    if device.type == "cpu":
        return 1 << 40
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def l2_bytes(device: torch.device) -> int:
    """Size of the last-level cache; nothing on a CPU."""
    if device.type == "cpu":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)
