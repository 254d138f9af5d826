"""Rows of K and V, before and after every round, are bit for bit what the trace says was moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from .results import Result, need

Done = Mapping[str, np.ndarray]
KINDS = ("keys", "values")


def check(trace: Path) -> Result:
    """All rounds of a server, by what it wrote into the folder `trace`."""
    files: dict[str, list[Path]] = {}
    for path in sorted(trace.glob("*.npz")):
        files.setdefault(path.stem.rsplit("-", 1)[0], []).append(path)
    problems: list[str] = []
    rounds = followed = rows = 0
    for paths in files.values():
        request = Request()
        for path in paths:
            with np.load(path) as loaded:
                done = dict(loaded)
            problems += [f"{path.stem}: {problem}" for problem in request.problems(done)]
            rows += sum(done[f"{kind}_after"][..., 0].size for kind in KINDS)
        rounds += len(paths)
        followed += request.followed
    return Result(
        [
            need(
                "moved rows are those that were chosen, and nobody else writes there",
                "; ".join(problems[:3]) or f"{rows} rows in {rounds} rounds",
                not problems and rounds > 0,
            ),
            need("rounds follow one another", f"{followed} of {rounds}", followed > 0),
        ],
        {"requests": len(files), "rounds": rounds, "rows": rows, "problems": problems[:20]},
    )


class Request:
    """Follows one request from round to round.

    Attributes:
        followed: rounds that came after another one in the same private region.
    """

    def __init__(self) -> None:
        self.followed = 0
        self._before: Done | None = None
        self._positions = np.zeros((1, 1, 0), np.int64)

    def problems(self, done: Done) -> list[str]:
        """What is wrong with its next round; its file's content is in `sglang_tri.trace`."""
        before = self._before
        if before is not None and int(before["start"]) != int(done["start"]):
            before = None
        found = [*_moved_wrongly(done), *(_written_since(before, done) if before else ())]
        candidates = self._candidates(done, goes_on=before is not None)
        self._positions = np.take_along_axis(candidates, done["places"], -1)
        if not np.array_equal(np.sort(self._positions, -1), done["kept"]):
            found.append("places are not those of the kept positions")
        self.followed += before is not None
        self._before = done
        return found

    def _candidates(self, done: Done, goes_on: bool) -> np.ndarray:
        """Logical positions in slot order, int64 [layers or 1, kv_heads or 1, candidates]."""
        sets, logical = done["places"].shape[:2], int(done["logical"])
        known = self._positions if goes_on else np.zeros((*sets, 0), np.int64)
        new = done["keys_before"].shape[1] - known.shape[-1]
        return np.concatenate(
            [known, np.broadcast_to(np.arange(logical - new, logical), (*sets, new))], -1
        )


def _moved_wrongly(done: Done) -> Iterable[str]:
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


def _written_since(before: Done, done: Done) -> Iterable[str]:
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
