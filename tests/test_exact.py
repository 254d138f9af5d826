"""The exact check of servers: a real run on the CPU, and that each of its parts can fail."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.accuracy.client import Answer, Ask, Recorded, at_once
from bench.accuracy.exact import __main__ as exact
from bench.accuracy.exact import identical, outputs, pool, rows, turns
from bench.accuracy.exact.judge import Judge, Limits
from bench.accuracy.exact.parts import Part, Result, need, show, show_servers, write
from bench.accuracy.exact.questions import DEPTHS, Questions
from bench.accuracy.exact.servers import BUDGET, INTERVAL
from bench.accuracy.reference_model import FOLDER
from bench.accuracy.reference_model.tasks import example
from bench.accuracy.reference_model.tokenizer import STOP_THINKING, prompt_ids
from bench.cutoff import CLOSING_S, Clock, TimeUp, cut_off
from bench.simulator.oracle import Oracle
from bench.simulator.registry import make_policy
from sglang_tri import statistics as stats
from tests.interpreted import ON_GPU

RECENT = 16
FLOAT32 = Limits.of("float32")


@pytest.mark.server
@pytest.mark.full
def test_a_run_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "exact.json"
    monkeypatch.setattr(sys, "argv", ["exact", "--page-size", "16", "--json", str(figures)])
    status = exact.main()
    said = capsys.readouterr().out
    assert status == 0, said
    found = json.loads(figures.read_text())
    assert found["ok"]
    parts = {part["name"]: part for part in found["parts"]}
    judged = [parts[name]["figures"] for name in ("outputs", "turns")]
    assert list(parts) == [
        *("identical", "outputs", "turns", "pool", "rows", "graphs"),
        exact.WITHOUT_GRAPHS,
    ]
    for figure in judged:
        assert figure["control"]["mean"] > 0.1
        assert figure["recorded"]["mean"] < (Limits.of("bfloat16").error if ON_GPU else 1e-5)
    rounds = sum(each["rounds"] for figure in judged for each in figure["of_each"])
    assert parts["rows"]["figures"]["rounds"] > rounds, "those of the short requests, too"
    assert found["machine"]
    assert found["servers"]["policy-16"]["page_size"] == 16
    assert found["servers"]["policy-16"]["attention_backend"]
    assert found["servers"]["policy-16"]["graph_share"]["decode"] is not None


def test_an_untraced_batch_with_wrong_rows_fails() -> None:
    control, least = {"mean": 0.8}, outputs.UNTRACED_FACTOR
    assert outputs.far_off("{}", control, {"mean": 0.02}, least).met
    assert outputs.far_off("{}", control, {"mean": 0.7}, least).failed


def test_requests_that_hang_do_not_hold_up_the_end() -> None:
    answered = threading.Event()
    began = time.monotonic()
    with pytest.raises(TimeUp), cut_off(Clock(CLOSING_S + 0.5)):
        at_once(lambda _: answered.wait(60), [1, 2], 2)
    answered.set()
    assert time.monotonic() - began < 30


def missed(result: Result) -> list[str]:
    return [goal.text for goal in result.goals if goal.failed]


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exact") / "stats.pt"
    stats.save_as(stats.load(FOLDER / "stats.safetensors"), path)
    return path


@pytest.fixture(scope="module")
def judge(statistics: Path) -> Judge:
    return Judge(FOLDER, statistics, [STOP_THINKING], FLOAT32)


@pytest.fixture(scope="module")
def served(statistics: Path, judge: Judge) -> tuple[Answer, Recorded]:
    """What a faultless server would have answered and recorded."""
    ask = Ask(Questions(FOLDER)(0), 200)
    policy = make_policy("triattention", BUDGET, INTERVAL, mode="per-head")
    made = Oracle(FOLDER, statistics).generate(ask.prompt, ask.tokens, policy)
    meta = {"cached_tokens": 0, "kv_policy": {"rounds": len(made.rounds)}}
    answer = Answer(ask, "rid", made.output_ids.tolist(), made.logprobs, "", meta)
    kept, lengths = zip(*((done.kept, done.length) for done in made.rounds), strict=True)
    return answer, Recorded(list(kept), list(lengths))


def judged(judge: Judge, answer: Answer, recorded: Recorded) -> Result:
    verdict = judge.verdict(judge.conversation(answer, 1), answer, recorded)
    return Result(outputs.goals([verdict], FLOAT32))


def shifted(recorded: Recorded) -> Recorded:
    """A history of rounds that keep the candidate behind each that is kept, but for the recent."""
    sets = recorded.kept[0].shape[:2]
    theirs = ours = np.zeros((*sets, 0), np.int64)
    all_ours = []
    first = int(recorded.kept[0].min())
    for kept, length in zip(recorded.kept, recorded.lengths, strict=True):
        new = np.broadcast_to(np.arange(first, length), (*sets, length - first))
        theirs, ours = (np.concatenate([known, new], -1) for known in (theirs, ours))
        places = np.stack(
            [
                [np.isin(c, k).nonzero()[0] for c, k in zip(*pair, strict=True)]
                for pair in zip(theirs, kept, strict=True)
            ]
        )
        places[..., :-RECENT] = (places[..., :-RECENT] + 1) % (theirs.shape[-1] - RECENT)
        ours = np.take_along_axis(ours, np.sort(places, -1), -1)
        theirs, first = kept, length
        all_ours.append(ours)
    return Recorded(all_ours, recorded.lengths)


def test_faultless_outputs(judge: Judge, served: tuple[Answer, Recorded]) -> None:
    assert missed(judged(judge, *served)) == []


def test_sets_that_are_off_by_one(judge: Judge, served: tuple[Answer, Recorded]) -> None:
    answer, recorded = served
    texts = missed(judged(judge, answer, shifted(recorded)))
    assert any("10 times those" in text for text in texts), texts
    assert any("score units" in text for text in texts), texts


def test_rounds_elsewhere(judge: Judge, served: tuple[Answer, Recorded]) -> None:
    answer, recorded = served
    later = replace(recorded, lengths=[length + 1 for length in recorded.lengths])
    assert missed(judged(judge, answer, later)) == ["rounds are where the simulator has them"]


def test_an_error_of_a_hundredth(judge: Judge, served: tuple[Answer, Recorded]) -> None:
    """The control may be far more than ten times as far off: float32 has a limit of its own."""
    answer, recorded = served
    wrong = replace(answer, logprobs=answer.logprobs - 0.01)
    assert missed(judged(judge, wrong, recorded)) == [
        "errors with recorded sets are at most 0.0001 nats in the mean"
    ]


def test_another_log_probability(served: tuple[Answer, Recorded]) -> None:
    answer = served[0]
    assert missed(identical.compare([answer] * 2, [answer] * 2)) == []
    logprobs = answer.logprobs.copy()
    logprobs[7] = np.nextafter(logprobs[7], 0)
    other = identical.compare([answer] * 2, [answer, replace(answer, logprobs=logprobs)])
    assert missed(other) == ["so are all log-probabilities, bit for bit"]
    assert other.figures["first_other_token"] == [None, 7]


def test_a_trace_that_changes_something(served: tuple[Answer, Recorded]) -> None:
    answer = served[0]
    assert not outputs.same_untraced(answer, answer).failed
    assert outputs.same_untraced(answer, replace(answer, logprobs=answer.logprobs + 1e-6)).failed
    assert outputs.same_untraced(answer, replace(answer, meta={})).failed


@pytest.mark.parametrize(
    ("history", "cached", "failing"), [("compressed", 8, 0), ("exact", 8, 1), ("compressed", 5, 1)]
)
def test_reuse(history: str, cached: int, failing: int) -> None:
    first = Answer(Ask([1] * 5, 5), "", [2] * 5, np.zeros(5), "", {})
    meta = {"cached_tokens": cached, "kv_policy": {"history": history}}
    second = Answer(Ask([*first.tokens, 3], 5), "", [2] * 5, np.zeros(5), "", meta)
    goals = turns.reuse([first], [second], page_size=4)
    assert sum(goal.failed for goal in goals) == failing


LAYERS, HEADS, KEPT, NEW, BYTES = 2, 2, 4, 3, 8


def two_rounds() -> list[dict[str, np.ndarray]]:
    """Of one request, behind 10 tokens of prompt."""
    rng = np.random.default_rng(0)
    rounds: list[dict[str, np.ndarray]] = []
    positions = np.zeros((1, HEADS, 0), np.int64)
    for logical in (10 + KEPT + NEW, 10 + KEPT + 2 * NEW):
        done: dict[str, np.ndarray] = {"logical": np.array(logical), "start": np.array(10)}
        new = np.arange(logical - KEPT - NEW + positions.shape[-1], logical)
        every = np.concatenate([positions, np.broadcast_to(new, (1, HEADS, len(new)))], -1)
        done["places"] = rng.permuted(np.tile(np.arange(KEPT + NEW), (1, HEADS, 1)), axis=-1)[
            ..., :KEPT
        ]
        positions = np.take_along_axis(every, done["places"], -1)
        done["kept"] = np.sort(positions, -1)
        for kind in rows.KINDS:
            before = rng.integers(0, 256, (LAYERS, KEPT + NEW, HEADS, BYTES)).astype(np.uint8)
            if rounds:
                before[:, :KEPT] = rounds[-1][f"{kind}_after"]
            heads = [before[:, done["places"][0, head], head] for head in range(HEADS)]
            done |= {f"{kind}_before": before, f"{kind}_after": np.stack(heads, 2)}
        rounds.append(done)
    return rounds


def flip(number: int, name: str, *index: int) -> Callable[[list[dict[str, np.ndarray]]], None]:
    """One bit of an array, or an odd number for an even one."""

    def tamper(rounds: list[dict[str, np.ndarray]]) -> None:
        rounds[number][name][index] ^= 1

    return tamper


def same_place_twice(rounds: list[dict[str, np.ndarray]]) -> None:
    rounds[1]["places"][0, 0, 0] = rounds[1]["places"][0, 0, 1]


@pytest.mark.parametrize(
    ("tamper", "problem"),
    [
        (flip(0, "keys_after", 1, 2, 1, 7), "keys of layer 1, slot 2, head 1 and 0 more are not"),
        (flip(1, "values_after", 0, 3, 0, 0), "values of layer 0, slot 3, head 0 and 0 more are"),
        (flip(1, "keys_before", 0, 1, 1, 5), "were written to since the round before"),
        (flip(0, "kept", 0, 0, 0), "places are not those of the kept positions"),
        (same_place_twice, "a candidate lies in two slots"),
    ],
)
def test_rows(
    tmp_path: Path, tamper: Callable[[list[dict[str, np.ndarray]]], None], problem: str
) -> None:
    def found() -> Result:
        for number, done in enumerate(rounds):
            np.savez(tmp_path / f"rid-{number + 1:05d}.npz", **done)  # type: ignore[arg-type]
        return rows.check(tmp_path)

    rounds = two_rounds()
    assert missed(found()) == []
    tamper(rounds)
    result = found()
    assert missed(result) == ["moved rows are those that were chosen, and nobody else writes there"]
    assert any(problem in text for text in result.figures["problems"])


def test_no_rows(tmp_path: Path) -> None:
    assert len(missed(rows.check(tmp_path))) == 2


@pytest.mark.parametrize(("used", "log"), [(0, "idle"), (3, "idle"), (0, "memory leak detected!")])
def test_slots_that_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: int, log: str
) -> None:
    (tmp_path / "log").write_text(log)
    counts = iter([0, 9])
    meta = {"prompt_tokens": 100}
    server: Any = SimpleNamespace(
        log=tmp_path / "log",
        kv_policy=lambda: {"requests_evicted": next(counts)},
        generate=lambda **body: {"output_ids": [1], "meta_info": meta},
    )
    load = {"num_used_tokens": used, "max_total_num_tokens": 128}
    monkeypatch.setattr(pool, "run", lambda server, short: short.ending)
    monkeypatch.setattr(pool, "idle", lambda server: load)
    texts = missed(pool.check(server, Questions(FOLDER)))
    expected = ["free and cached slots are the whole pool"] if used else []
    assert texts == expected + (["SGLang reports no leak"] if "leak" in log else [])


def test_questions_are_those_of_the_model() -> None:
    questions = Questions(FOLDER)
    for number, task in enumerate(DEPTHS):
        assert questions(number) == prompt_ids(example(task, DEPTHS[task], 7000 + number).question)
    assert questions.think_end == [STOP_THINKING]


def test_a_run_that_was_cut_off(tmp_path: Path) -> None:
    """It says what is known, and not that all is well."""
    done, failed, nothing = (
        Part("one", 1, [need("text", "measured", met)], {}, 1.0) for met in (True, False, None)
    )
    path = tmp_path / "new" / "exact.json"
    for parts, finished, ok in (
        ([done, nothing], False, None),
        ([done, nothing], True, True),
        ([done, failed], True, False),
    ):
        write(path, {"machine": "this"}, parts, finished)
        found = json.loads(path.read_text())
        assert found["ok"] is ok
        assert [part["ok"] for part in found["parts"]] == [part.ok for part in parts]
    lines = show([done, failed, nothing]).splitlines()
    assert [line.split("1.0")[1].strip() for line in lines[1:]] == [
        "ok",
        "FAILED",
        "not applicable here",
    ]


def test_servers_that_failed_are_shown() -> None:
    share = {"decode": 0.5, "prefill": None}
    good = {"attention_backend": "triton", "dtype": "float32", "graph_share": share}
    lines = show_servers({"policy-1": good, "stock-1": {"error": "none"}}).splitlines()
    assert lines[1].split() == ["policy-1", "triton", "float32", "50%", "-"]
    assert lines[2].split() == ["stock-1", "failed", "-", "-"]
