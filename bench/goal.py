"""A goal of a bench, with what was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        met: None if this run cannot tell.
        required: whether missing it fails the bench.
    """

    text: str
    measured: str
    met: bool | None
    required: bool

    @property
    def failed(self) -> bool:
        return self.required and self.met is False

    def __str__(self) -> str:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        return f"[{verdict}] {self.text}: {self.measured}"
