"""The roofline: what was reached, under what the device can do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.kernelbench.cells import Result
from bench.kernelbench.timing import Limits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = {"score": "o", "select, holes": "s", "round": "D", "torch round": "x"}


def write(results: Sequence[Result], limits: Limits, title: str, path: Path) -> None:
    """Left operations per second over operations per byte, right bandwidth over bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _roofline(left, results, limits)
    _bandwidth(right, results, limits)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _roofline(axes: Axes, results: Sequence[Result], limits: Limits) -> None:
    ridge = limits.flops / limits.copy
    across = [0.05, ridge, max(4 * ridge, 1.0)]
    roof = [min(x * limits.copy, limits.flops) / 1e12 for x in across]
    axes.plot(across, roof, color="black", label="copy bandwidth, bfloat16 products")
    for operation, marker in _MARKERS.items():
        some = [result for result in results if result.operation == operation]
        intensity = [each.work.flops / each.work.bytes for each in some]
        speed = [each.work.flops / each.times.median / 1e9 for each in some]
        axes.plot(intensity, speed, marker, label=operation)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.legend()


def _bandwidth(axes: Axes, results: Sequence[Result], limits: Limits) -> None:
    axes.axhline(limits.copy / 1e9, color="black", label="copy bandwidth")
    for operation in dict.fromkeys(result.operation for result in results):
        some = sorted(
            (each.work.bytes / 1e6, each.bytes_per_second / 1e9)
            for each in results
            if each.operation == operation
        )
        axes.plot(*zip(*some, strict=True), ".-", label=operation)
    axes.set(xscale="log", yscale="log", xlabel="MB that have to be moved", ylabel="GB/s")
    axes.legend(fontsize="small")
