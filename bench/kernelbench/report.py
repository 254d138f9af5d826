"""Results as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.goal import Goal
from bench.kernelbench.cells import Result
from bench.kernelbench.goals import arithmetic, round_percent
from bench.kernelbench.timing import Limits
from bench.table import table

_HEADER = ["model", "requests", "n", "operation", "ms (min-max)", "GB/s", "% of copy", "vs round"]


@dataclass(frozen=True)
class Run:
    """All that one run of the bench found.

    Attributes:
        notes: cells that were left out, and why; what the kept sets came to.
        meaningful: whether times say anything.
    """

    machine: str
    limits: Limits
    results: Sequence[Result]
    notes: Sequence[str]
    goals: Sequence[Goal]
    meaningful: bool

    def text(self) -> str:
        """For the terminal."""
        lines = [f"{self.machine}", _limits(self.limits), "", self._table(), *_explained(), ""]
        rounds = [result for result in self.results if result.operation == "round"]
        lines += [arithmetic(result, self.limits.copy) for result in rounds]
        lines += [*self.notes, "", *map(str, self.goals)]
        return "\n".join(lines)

    def _table(self) -> str:
        rounds = {result.cell: result for result in self.results if result.operation == "round"}
        rows = [_row(each, rounds[each.cell], self.limits.copy) for each in self.results]
        return table([_HEADER, *rows])

    def write(self, path: Path) -> None:
        """As JSON: milliseconds, bytes and bytes per second."""
        values = {
            "machine": self.machine,
            "times_mean_something": self.meaningful,
            "copy_bytes_per_second": self.limits.copy,
            "product_flops_per_second": self.limits.flops,
            "results": [_values(each, self.limits.copy) for each in self.results],
            "notes": list(self.notes),
            "goals": [asdict(goal) for goal in self.goals],
        }
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _limits(limits: Limits) -> str:
    return (
        f"copy bandwidth {limits.copy / 1e9:.1f} GB/s (read and written), "
        f"bfloat16 products {limits.flops / 1e12:.1f} TFLOP/s"
    )


def _explained() -> list[str]:
    return [
        "GB/s count each byte that has to be read or written once. @r: timed with r requests,",
        "scaled to all. vs round: time in relation to the product's whole round. Times are the",
        "device's: it is kept busy while the first launches are enqueued.",
    ]


def _row(result: Result, whole: Result, copy: float) -> list[str]:
    cell, times = result.cell, result.times
    scaled = result.measured_requests != cell.requests
    return [
        cell.model.name,
        str(cell.requests),
        str(cell.candidates),
        result.operation + (f" @{result.measured_requests}" if scaled else ""),
        f"{times.median:.3f} ({times.lowest:.3f}-{times.highest:.3f})",
        f"{result.bytes_per_second / 1e9:.1f}",
        f"{result.percent_of(copy):.1f}",
        f"{times.median / whole.times.median:.2f}",
    ]


def _values(result: Result, copy: float) -> dict[str, object]:
    cell = result.cell
    values: dict[str, object] = {
        "model": cell.model.name,
        "requests": cell.requests,
        "candidates": cell.candidates,
        "budget": cell.budget,
        "operation": result.operation,
        "measured_requests": result.measured_requests,
        "ms": asdict(result.times),
        "bytes": result.work.bytes,
        "flops": result.work.flops,
        "moved_rows_per_layer": result.moved,
        "bytes_per_second": result.bytes_per_second,
        "percent_of_copy": result.percent_of(copy),
    }
    if result.operation == "round":
        values["percent_of_decode"] = round_percent(result, copy)
    return values
