"""What was found, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.goal import Goal
from bench.table import table


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        goals: what it needs; one that is not met fails it.
        figures: what was measured.
        seconds: wall-clock time.
    """

    name: str
    page_size: int
    goals: list[Goal]
    figures: dict[str, Any]
    seconds: float

    @property
    def ok(self) -> bool | None:
        """None if this run could not tell."""
        if any(goal.met is False for goal in self.goals):
            return False
        return True if any(goal.met for goal in self.goals) else None

    @property
    def verdict(self) -> str:
        return {True: "ok", False: "FAILED", None: "not applicable here"}[self.ok]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def write(path: Path, about: dict[str, Any], parts: Sequence[Part], finished: bool) -> None:
    """All that is known by now; `ok` is null until all of it is."""
    ok = all(part.ok is not False for part in parts) if finished else None
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"ok": ok, **about, "parts": [part.as_json() for part in parts]}
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def show(parts: Sequence[Part]) -> str:
    rows = [["part", "page size", "seconds", "result"]]
    rows += [[p.name, str(p.page_size), f"{p.seconds:.1f}", p.verdict] for p in parts]
    return table(rows)


def show_servers(servers: dict[str, dict[str, Any]]) -> str:
    """Attention backends, and how many of the logged steps ran in graphs."""
    rows = [["server", "attention", "dtype", "decode in graphs", "prefill in graphs"]]
    for name, found in servers.items():
        shares = found.get("graph_share", {})
        cells = [found.get("attention_backend", "failed"), found.get("dtype", "")]
        graphs = [shares.get(phase) for phase in ("Decode", "Prefill")]
        rows.append([name, *cells, *("-" if g is None else f"{g:.0%}" for g in graphs)])
    return table(rows)
