"""Tables as plain text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def table(rows: list[list[str]]) -> str:
    """Columns as wide as they must be; the first is flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *cells = (
            f"{cell:>{width}}" if i else f"{cell:<{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *cells]).rstrip())
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"
