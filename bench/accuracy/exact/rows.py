"""Rows of K and V, before and after every round, are bit for bit what the trace says was moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

import numpy as np

from .parts import Result, need

Done = Mapping[str, np.ndarray]
"""A round's file; `sglang_tri.round.trace` has its content."""
KINDS = ("keys", "values")


def check(trace: Path) -> Result:
    """All rounds of a server, by what it wrote into the folder `trace`."""
    problems: list[str] = []
    requests = rounds = followed = rows = 0
    for _, paths in groupby(sorted(trace.glob("*.npz")), lambda path: path.stem.rsplit("-", 1)[0]):
        requests += 1
        before: Done | None = None
        positions = np.zeros((1, 1, 0), np.int64)
        for path in paths:
            with np.load(path) as loaded:
                done = dict(loaded)
            if before is None or before["start"] != done["start"]:  # Another private region.
                before, positions = None, np.zeros((*done["places"].shape[:2], 0), np.int64)
            positions = np.take_along_axis(_candidates(done, positions), done["places"], -1)
            found = [*_moved_wrongly(done), *(_written_since(before, done) if before else ())]
            if not np.array_equal(np.sort(positions, -1), done["kept"]):
                found.append("places are not those of the kept positions")
            problems += [f"{path.stem}: {problem}" for problem in found]
            rows += sum(done[f"{kind}_after"][..., 0].size for kind in KINDS)
            rounds += 1
            followed += before is not None
            before = done
    moved = "; ".join(problems[:3]) or f"{rows} rows in {rounds} rounds"
    text = "moved rows are those that were chosen, and nobody else writes there"
    goals = [
        need(text, moved, not problems and rounds > 0),
        need("rounds follow one another", f"{followed} of {rounds}", followed > 0),
    ]
    counts = {"requests": requests, "rounds": rounds, "rows": rows}
    return Result(goals, {**counts, "problems": problems[:20]})


def _candidates(done: Done, known: np.ndarray) -> np.ndarray:
    """Logical positions in slot order, int64 [layers or 1, kv_heads or 1, candidates].

    known: of those that the round before has left.
    """
    logical, new = int(done["logical"]), done["keys_before"].shape[1] - known.shape[-1]
    added = np.broadcast_to(np.arange(logical - new, logical), (*known.shape[:2], new))
    return np.concatenate([known, added], -1)


def _moved_wrongly(done: Done) -> Iterator[str]:
    """A slot's row after the round is the one of the candidate that it holds."""
    places = done["places"]
    if (np.diff(np.sort(places, -1), axis=-1) == 0).any():
        yield "a candidate lies in two slots"
    for kind in KINDS:
        before, after = done[f"{kind}_before"], done[f"{kind}_after"]
        layers, _, heads, _ = after.shape
        every = np.broadcast_to(places, (layers, heads, places.shape[-1]))
        expected = np.take_along_axis(before, every.transpose(0, 2, 1)[..., None], 1)
        if not np.array_equal(expected, after):
            yield f"{kind} {_where(expected, after)} are not those of the candidates moved there"


def _written_since(before: Done, done: Done) -> Iterator[str]:
    """Kept slots hold at the next round what they held behind this one."""
    for kind in KINDS:
        left = before[f"{kind}_after"]
        found = done[f"{kind}_before"][:, : left.shape[1]]
        if not np.array_equal(left, found):
            yield f"{kind} {_where(left, found)} were written to since the round before"


def _where(one: np.ndarray, two: np.ndarray) -> str:
    """The first row that differs, of how many."""
    differing = np.argwhere((one != two).any(-1))
    layer, slot, head = differing[0]
    return f"of layer {layer}, slot {slot}, head {head} and {len(differing) - 1} more"
