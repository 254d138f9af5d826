"""Judges statistics on texts: what they would keep, and what eviction by them costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from bench.accuracy.calibration.keeping import Panel, Shares, Watching
from bench.accuracy.calibration.reading import Reading
from bench.accuracy.calibration.texts import Text
from bench.simulator import Policy, Stats, TriAttention, make_policy
from bench.simulator.decoder import Decoder

RECENT = 16
CHANCE = "chance"
"""Two random choices, for the floor of shares."""
RANDOM = "random"
"""A policy without statistics, for the scale of losses."""


@dataclass(frozen=True)
class Setting:
    """Budget and interval in tokens."""

    budget: int
    interval: int
    mode: str


class Results:
    """Rows of outcomes, kept in a file of JSON lines as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self.rows = [json.loads(line) for line in path.read_text().splitlines()]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows += rows
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def has(self, **fields: object) -> bool:
        """Whether a row has all of these."""
        return any(all(row.get(k) == v for k, v in fields.items()) for row in self.rows)


class Study:
    """All statistics of one model."""

    def __init__(self, decoder: Decoder, statistics: Mapping[str, Stats], results: Results) -> None:
        """statistics: by name; what the others are compared with comes first."""
        self.decoder = decoder
        self.statistics = statistics
        self.results = results
        self.panel = Panel(list(statistics.values()), decoder.rope)

    def judge(self, text: Text, settings: Sequence[Setting], losses: Sequence[str]) -> None:
        """What there are no results of yet.

        losses: the statistics by which the model also reads, in the first setting.
        """
        readings: dict[tuple[int, int], Reading] = {}
        for setting in settings:
            size = setting.budget, setting.interval
            asked = self._missing("kept", text, setting, [*self.statistics, CHANCE])
            lost = self._missing("loss", text, setting, [*losses, RANDOM])
            if setting != settings[0]:
                lost = []
            if size not in readings and (asked or lost):
                readings[size] = Reading(self.decoder, text.ids, TriAttention(*size, RECENT))
            if asked:
                self._compare(text, setting, readings[size], asked)
            if lost:
                self._lose(text, setting, readings[size], lost)

    def _missing(self, what: str, text: Text, setting: Setting, names: Sequence[str]) -> list[str]:
        """Those of these names that the results do not have."""
        about = {"what": what, "text": text.name, **asdict(setting)}
        return [name for name in names if not self.results.has(statistics=name, **about)]

    def _compare(
        self, text: Text, setting: Setting, reading: Reading, names: Sequence[str]
    ) -> None:
        size = setting.budget, setting.interval
        watching = Watching(*size, RECENT, setting.mode, self.panel)
        reading.watch(watching)
        about = {"what": "kept", "text": text.name, "half": text.half, **asdict(setting)}
        about["rounds"] = len(watching.rounds)
        by_name = dict(zip(self.statistics, zip(*watching.rounds, strict=True), strict=True))
        by_name[CHANCE] = tuple(watching.by_chance)
        self.results.add([{**about, "statistics": n, **_means(by_name[n])} for n in names])

    def _lose(self, text: Text, setting: Setting, reading: Reading, names: Sequence[str]) -> None:
        size = setting.budget, setting.interval
        full = float(reading.full().mean())
        about = {"what": "loss", "text": text.name, "half": text.half, **asdict(setting)}
        about |= {"tokens": len(text.ids) - 1 - reading.fed, "full": round(full, 5)}
        for name in names:
            policy: Policy = TriAttention(*size, RECENT, setting.mode)
            if name == RANDOM:
                policy = make_policy("random", *size, recent=RECENT)
            found = float(reading.evicting(policy, self.statistics.get(name)).mean())
            self.results.add([{**about, "statistics": name, "above": round(found - full, 5)}])


def _means(rounds: Sequence[Shares]) -> dict[str, float]:
    fields = ("kept", "contested", "evicted")
    return {field: round(mean(getattr(one, field) for one in rounds), 5) for field in fields}
