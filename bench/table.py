"""Tables as plain text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

WIDEST = 1000  # Characters; no line is folded.


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; the first column is flush left, the others flush right."""
    head, *body = rows
    made = Table(box=None, pad_edge=False, padding=(0, 1))
    for number, name in enumerate(head):
        made.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in body:
        made.add_row(*row)
    console = Console(width=WIDEST, color_system=None, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(made)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"
