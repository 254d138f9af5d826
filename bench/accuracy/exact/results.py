"""What a part of the check has found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.goal import Goal


@dataclass(frozen=True)
class Result:
    """Goals with what was measured for them, and further figures."""

    goals: list[Goal]
    figures: dict[str, Any] = field(default_factory=dict)


def need(text: str, measured: str, met: bool | np.bool_ | None) -> Goal:
    """A goal that a part fails without; `met` is None if this run cannot tell."""
    return Goal(text, measured, None if met is None else bool(met), required=True)
