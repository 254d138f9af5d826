"""The study of how much text statistics need, on tiny models."""

from __future__ import annotations

import itertools
from pathlib import Path
from statistics import mean

import pytest
import torch

from bench.accuracy.calibration.findings import choose, overlap_table
from bench.accuracy.calibration.keeping import Panel, chance, shares
from bench.accuracy.calibration.reading import PROMPT, Reading
from bench.accuracy.calibration.study import RECENT, Results, Setting, Study
from bench.accuracy.calibration.texts import Text
from bench.models.tiny import make_model
from bench.simulator import Oracle, Request, Stats, TriAttention
from bench.simulator.history import History
from bench.simulator.request import Ledger
from tests.tiny_stats import calibration_text, make_stats

KINDS = ("qwen3", "yarn")
# Printable bytes are their own token ids in the tiny models.
IDS = tuple(calibration_text(200, seed=7).encode())
SIZE = 48, 24


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Oracle]:
    folder = tmp_path_factory.mktemp("study")
    for kind in KINDS:
        make_stats(make_model(kind, folder / kind), folder / kind / "stats.pt", tokens=512)
    return {kind: Oracle(folder / kind, folder / kind / "stats.pt") for kind in KINDS}


def statistics_of(oracle: Oracle) -> Stats:
    assert oracle.stats is not None
    return oracle.stats


@pytest.mark.parametrize("kind", KINDS)
def test_all_statistics_score_as_each_alone(models: dict[str, Oracle], kind: str) -> None:
    decoder, statistics = models[kind].decoder, [statistics_of(models[name]) for name in KINDS]
    for place, stats in enumerate(statistics):
        policy = TriAttention(*SIZE)
        ledger = Ledger(policy, stats, None, 0.0)
        request = Request(decoder, History(decoder.new_cache()), 1, ledger, IDS[:8])
        request.feed(list(IDS[:72]))
        candidates = request.candidates()
        found = Panel(statistics, decoder.rope).scores(candidates)[place]
        torch.testing.assert_close(found, policy.scores(candidates), rtol=1e-10, atol=1e-10)


def test_shares_by_hand() -> None:
    """Six tokens, three kept; the third stays with both. They differ in one of each kind."""
    one = torch.tensor([[1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    other = torch.tensor([[0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    found = shares(one, other, protected=1)
    assert (found.kept, found.contested, found.evicted) == pytest.approx((2 / 3, 1 / 2, 2 / 3))
    same = shares(one, one, protected=1)
    assert (same.kept, same.contested, same.evicted) == (1, 1, 1)


def test_chance_is_the_mean_over_all_choices() -> None:
    """Of seven tokens the last stays, and two of the others."""
    marks = []
    for pair in itertools.combinations(range(6), 2):
        mark = torch.zeros(7, dtype=torch.bool)
        mark[[*pair, 6]] = True
        marks.append(mark)
    found = [shares(one, other, 1) for one in marks for other in marks]
    expected = chance(7, 3, 1)
    for field in ("kept", "contested", "evicted"):
        assert mean(getattr(s, field) for s in found) == pytest.approx(getattr(expected, field))


def test_reading_loses_what_the_simulator_says(models: dict[str, Oracle]) -> None:
    oracle, policy = models["qwen3"], TriAttention(*SIZE, RECENT)
    reading = Reading(oracle.decoder, IDS, policy)
    replay = oracle.replay(IDS[:PROMPT], IDS[PROMPT:], policy)
    expected = -torch.tensor(replay.logprobs[reading.fed + 1 - PROMPT :])
    found = reading.evicting(policy, oracle.stats)
    assert len(replay.rounds) > 2
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)
    assert (found - reading.full()).abs().max() > 1e-2


def test_a_text_that_ends_before_a_round_is_refused(models: dict[str, Oracle]) -> None:
    with pytest.raises(ValueError, match="they end before a round"):
        Reading(models["qwen3"].decoder, IDS[:60], TriAttention(*SIZE, RECENT))


def test_a_study(models: dict[str, Oracle], tmp_path: Path) -> None:
    """Equal statistics keep all the same at the same loss, another model's do not."""
    own, other = (statistics_of(models[kind]) for kind in KINDS)
    names = {"default 16384": own, "default 4096": own, "default 1024": other}
    settings = [Setting(*SIZE, mode) for mode in ("per-head", "per-layer-per-head", "union")]
    text = Text("words", "prose", "first", IDS)
    Study(models["qwen3"].decoder, names, Results(tmp_path / "rows")).judge(
        text, settings, list(names)
    )
    again = Results(tmp_path / "rows")
    rows = list(again.rows)
    for row in [row for row in rows if row["what"] == "kept"]:
        found = row["kept"], row["contested"], row["evicted"]
        if row["statistics"] in ("default 16384", "default 4096"):
            assert found == (1, 1, 1)
        else:
            assert max(found) < 0.95
    losses = {row["statistics"]: row["above"] for row in rows if row["what"] == "loss"}
    assert losses["default 16384"] == losses["default 4096"] != losses["default 1024"]
    assert len(losses) == 4
    assert [choose(rows, setting) for setting in settings] == [4096] * 3
    overlaps = [line.split() for line in overlap_table(rows, settings[0], "first").splitlines()]
    assert ["default", "4096", *["100.0"] * 4] in overlaps
    Study(models["qwen3"].decoder, names, again).judge(text, settings, list(names))
    assert again.rows == rows


def test_the_choice() -> None:
    """The smallest that is enough on the first half; the reference itself is none."""
    setting = Setting(*SIZE, "per-head")
    kept = {"default 16384": 1.0, "default 1024": 0.98, "default 4096": 0.99, "default 8192": 1.0}
    kept |= {"prose 2048": 1.0, "default 2048, sequences of 8192": 1.0}
    rows = [
        {"what": "kept", "half": half, "statistics": name, "kept": share - change, **vars(setting)}
        for name, share in kept.items()
        for half, changes in (("first", (0.001, -0.001)), ("second", (0.5,)))
        for change in changes
    ]
    assert choose(rows, setting) == 4096
    assert choose([r for r in rows if r["statistics"] != "default 4096"], setting) == 8192
    assert choose([r for r in rows if r["statistics"][8:] not in ("4096", "8192")], setting) is None
