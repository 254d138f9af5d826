"""Time of work on a GPU, and what the GPU can do at best."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable

import torch

_WARM_UP = 2
# float32 numbers: 512 MiB, more than any last-level cache holds.
_FLUSH = 128 << 20
# Keeps the device busy while the host enqueues what is timed: of the order of ten milliseconds.
_HEAD_START_CYCLES = 20_000_000


def measure(
    call: Callable[[], object],
    repeats: int,
    device: torch.device,
    prepare: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Milliseconds that the device takes for `call`, which finds nothing in a cache.

    `triton.testing.do_bench` would time how fast Python launches plain torch, whose kernels are
    short, and has no place for `prepare`, which is called before each call, and not timed.

    Returns:
        The median, lowest and highest of `repeats` calls.
    """
    flush = torch.zeros(1 if device.type == "cpu" else _FLUSH, device=device)
    taken = []
    for _ in range(_WARM_UP + repeats):
        prepare()
        # Read, not written: lines to be written back would share the timed call's bandwidth.
        flush.sum()
        taken.append(timeit.timeit(call, number=1) * 1e3 if device.type == "cpu" else _once(call))
    taken = taken[_WARM_UP:]
    return {"median": statistics.median(taken), "lowest": min(taken), "highest": max(taken)}


def _once(call: Callable[[], object]) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START_CYCLES)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def limits(repeats: int, device: torch.device) -> tuple[float, float]:
    """Bytes per second of a copy in device memory, FLOP per second of bfloat16 products."""
    size, side = (1 << 20, 64) if device.type == "cpu" else (1 << 30, 8192)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), repeats, device)
    matrix = torch.randn(side, side, device=device).bfloat16()
    product = measure(lambda: matrix @ matrix, repeats, device)
    return 2e3 * size / copy["median"], 2e3 * side**3 / product["median"]
