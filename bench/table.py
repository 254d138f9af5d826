"""Tables as plain text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tabulate import tabulate


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; the first column is flush left, the others flush right."""
    head, *body = rows
    sides = ("left", *("right" for _ in head[1:]))
    return tabulate(body, head, tablefmt="plain", disable_numparse=True, colalign=sides)


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"
