"""Tables of a study, and its choice."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import sem

from bench.accuracy.calibration.study import Setting
from bench.accuracy.calibration.texts import DEFAULT, HALVES
from bench.table import table

WANTED = 0.99
"""Share of the kept set that is asked for."""

Row = dict[str, Any]


def overlap_table(rows: Sequence[Row], setting: Setting, half: str) -> str:
    """Percent in common with the reference, mean over a half's texts ± standard error."""
    fields = ("kept", "contested", "evicted")
    lines = [["statistics", *fields, "lowest kept"]]
    own = select(rows, "kept", setting, half)
    for name in dict.fromkeys(row["statistics"] for row in own):
        found = [row for row in own if row["statistics"] == name]
        cells = [_spread([100 * row[field] for row in found], 1) for field in fields]
        lines.append([name, *cells, f"{100 * min(row['kept'] for row in found):.1f}"])
    return table(lines)


def loss_table(rows: Sequence[Row], setting: Setting) -> str:
    """Nats a token above full KV by half, mean over texts ± standard error.

    The last column is the paired difference from the reference over all texts.
    """
    lines = [["statistics", *HALVES, "above reference, all"]]
    own = [row for half in HALVES for row in select(rows, "loss", setting, half)]
    names = list(dict.fromkeys(row["statistics"] for row in own))
    base = {row["text"]: row["above"] for row in own if row["statistics"] == names[0]}
    for name in names:
        found = [row for row in own if row["statistics"] == name]
        cells = [_spread([r["above"] for r in found if r["half"] == half], 4) for half in HALVES]
        differences = [row["above"] - base[row["text"]] for row in found]
        lines.append([name, *cells, "" if name == names[0] else _spread(differences, 4, "+")])
    return table(lines)


def choose(rows: Sequence[Row], setting: Setting) -> int | None:
    """The fewest tokens of the default text whose mean share of kept tokens is WANTED.

    On the first half, fewer than the reference has; None where there are none.
    """
    own = select(rows, "kept", setting, HALVES[0])
    enough = []
    for name in list(dict.fromkeys(row["statistics"] for row in own))[1:]:
        kept = [row["kept"] for row in own if row["statistics"] == name]
        if (size := _default_size(name)) and statistics.mean(kept) >= WANTED:
            enough.append(size)
    return min(enough, default=None)


def _default_size(name: str) -> int | None:
    """Tokens of the default text, where statistics come from that, split as usual."""
    text, _, tokens = name.partition(" ")
    return int(tokens) if text == DEFAULT and tokens.isdigit() else None


def select(rows: Sequence[Row], what: str, setting: Setting, half: str) -> list[Row]:
    """Rows of one kind, "kept" or "loss"."""
    wanted = {"what": what, "half": half, **vars(setting)}
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def report(rows: Sequence[Row], settings: Sequence[Setting]) -> str:
    """All tables as text."""
    parts = []
    for setting in settings:
        for half in HALVES:
            tables = overlap_table(rows, setting, half)
            title = f"{_named(setting)}, {half} half: percent in common with the reference"
            parts.append(f"{title}\n{tables}")
        parts.append(f"fewest tokens with {WANTED:.0%} of kept sets: {choose(rows, setting)}")
    losses = loss_table(rows, settings[0])
    parts.append(f"nats a token above full KV, {_named(settings[0])}\n{losses}")
    return "\n\n".join(parts)


def _named(setting: Setting) -> str:
    return f"{setting.mode}, budget {setting.budget}, interval {setting.interval}"


def _spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean ± standard error."""
    middle = f"{statistics.mean(values):{sign}.{digits}f}"
    if len(values) < 2:
        return middle
    return f"{middle} ± {sem(values):.{digits}f}"
