"""What the parts of the check have found, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.goal import Goal
from bench.table import table


@dataclass(frozen=True)
class Result:
    """Goals with what was measured for them, and further figures."""

    goals: list[Goal]
    figures: dict[str, Any] = field(default_factory=dict)


def need(text: str, measured: object, met: bool | np.bool_ | None) -> Goal:
    """A goal that a part fails without; `met` is None if this run cannot tell."""
    return Goal(text, str(measured), None if met is None else bool(met), required=True)


@dataclass(frozen=True)
class Part:
    """One part of the check, for one page size; it took so many seconds."""

    name: str
    page_size: int
    goals: list[Goal]
    figures: dict[str, Any]
    seconds: float

    @property
    def ok(self) -> bool | None:
        """None if this run could not tell."""
        if any(goal.failed for goal in self.goals):
            return False
        return True if any(goal.met for goal in self.goals) else None

    @property
    def verdict(self) -> str:
        return {True: "ok", False: "FAILED", None: "not applicable here"}[self.ok]


def write(path: Path, about: dict[str, Any], parts: Sequence[Part], finished: bool) -> None:
    """All that is known by now; `ok` is null until all of it is."""
    ok = all(part.ok is not False for part in parts) if finished else None
    content = {"ok": ok, **about, "parts": [{**asdict(part), "ok": part.ok} for part in parts]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def show(parts: Sequence[Part]) -> str:
    rows = [["part", "page size", "seconds", "result"]]
    rows += [[p.name, str(p.page_size), f"{p.seconds:.1f}", p.verdict] for p in parts]
    return table(rows)


def show_servers(servers: Mapping[str, dict[str, Any]]) -> str:
    """Attention backends, and how many of the steps ran in graphs."""
    rows = [["server", "attention", "dtype", "decode in graphs", "prefill in graphs"]]
    for name, found in servers.items():
        graphs = [found.get("graph_share", {}).get(phase) for phase in ("decode", "prefill")]
        cells = [found.get("attention_backend", "failed"), found.get("dtype", "")]
        rows.append([name, *cells, *("-" if g is None else f"{g:.0%}" for g in graphs)])
    return table(rows)
