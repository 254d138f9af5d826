"""The oracle over several turns: compressed history, forks, retractions, closed regions."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.models.tiny import make_model
from bench.simulator import (
    Conversation,
    NoEviction,
    Oracle,
    Policy,
    Replay,
    Restart,
    Round,
    RoundMismatch,
    TriAttention,
)
from tests.test_simulator import early
from tests.tiny_stats import calibration_text, make_stats

LAYERS, HEADS, KV_HEADS = 4, 4, 2
KEEP, MORE = 12, 4
# A set of its own for each layer and head.
POLICY = TriAttention(KEEP, MORE, recent=4, mode="per-layer-per-head")
PROMPT = list(calibration_text(37, seed=3).encode())
ANSWER = list(calibration_text(51, seed=4).encode())
TALK = PROMPT + ANSWER
TEXT = list(calibration_text(300, seed=5).encode())
ASKED, ANSWERED = 9, 40
BOTH_PAGES = pytest.mark.parametrize("page", [1, 4])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_model("qwen3", tmp_path_factory.mktemp("conversations") / "qwen3")
    make_stats(path, path / "stats.pt", tokens=512)
    return path


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    """In float64, where it makes no difference which steps run as one chunk."""
    return Oracle(folder, folder / "stats.pt", torch.float64)


def first_turn(
    oracle: Oracle, page: int = 1, policy: Policy = POLICY, **more: Any
) -> tuple[Conversation, Replay]:
    talk = oracle.conversation(policy, page)
    return talk, talk.turn(PROMPT, ANSWER, 0, **more)


def second_turn(talk: Conversation, cached: int, text: list[int] = TEXT) -> Replay:
    """The first ASKED of `text` are the question, the next ANSWERED the answer."""
    return talk.turn(TALK + text[:ASKED], text[ASKED : ASKED + ANSWERED], cached)


def same(one: Any, other: Any) -> None:
    np.testing.assert_allclose(one, other, atol=1e-8)


def up(tokens: int, page: int) -> int:
    return math.ceil(tokens / page) * page


def schedule(
    physical: int,
    length: int,
    outputs: int,
    page: int,
    closes: tuple[int, ...] = (),
    more: int = MORE,
    early: int = 0,
) -> tuple[list[tuple[int, int]], list[int]]:
    """Rounds as (logical length, candidates), and what is resident at each output token.

    physical, length: of the prompt; more: the interval; early: so much precedes the first round
    of the first region what is due.
    """
    start, rounds, resident = up(physical, page), [], [physical]
    due = KEEP + more - early
    for step in range(1, outputs):
        if step - 1 in closes:
            start, due = up(physical, page), KEEP + more
        if physical - start >= due:
            rounds.append((length, physical - start))
            physical, due = start + KEEP, KEEP + more
        physical, length = physical + 1, length + 1
        resident.append(physical)
    return rounds, resident


def held(replay: Replay) -> list[tuple[int, int]]:
    return [(done.length, done.candidates) for done in replay.rounds]


def begins(rounds: list[Round]) -> list[int]:
    """For each round the logical position where its region begins."""
    found: list[int] = []
    length = 0
    for done in rounds:
        fresh = done.kept.min() >= length
        found.append(done.length - done.candidates if fresh else found[-1])
        length = done.length
    return found


def compressed(rounds: list[Round]) -> tuple[int, int]:
    """The span of one region: from its begin to beyond the last token evicted anywhere."""
    (begin,) = set(begins(rounds))
    sets = rounds[-1].kept.reshape(-1, KEEP).tolist()
    gone = set().union(*(set(range(begin, rounds[-1].length)) - set(kept) for kept in sets))
    return begin, max(gone) + 1


def positions(talk: Conversation) -> torch.Tensor:
    """Resident ones: [layers, kv heads, tokens]."""
    return torch.stack([kv.positions for kv in talk.history.cache])


def masked_logprobs(path: Path, ids: list[int], rounds: list[Round], cached: int) -> np.ndarray:
    """transformers' log-probabilities of ids[1:], the evicted hidden from later queries by masks.

    cached: what follows was computed after all rounds that were held before it or in it.
    """
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="sdpa"
    )
    for norm in (part for part in model.modules() if hasattr(part, "variance_epsilon")):
        # transformers' own computes in float32 whatever comes in.
        norm.forward = partial(rms_norm, norm.weight, norm.variance_epsilon)
    visible = torch.ones(LAYERS, HEADS, len(ids), len(ids), dtype=torch.bool).tril()
    for done, begin in zip(rounds, begins(rounds), strict=True):
        gone = torch.zeros(LAYERS, KV_HEADS, len(ids), dtype=torch.bool)
        gone[..., begin : done.length] = True
        gone.scatter_(2, torch.tensor(done.kept).expand(LAYERS, KV_HEADS, -1), False)
        since = min(done.length, cached) if done.length <= len(TALK) else done.length
        visible[:, :, since:] &= ~gone.repeat_interleave(HEADS // KV_HEADS, 1)[:, :, None]
    masks = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, float("-inf"))
    for layer, mask in zip(model.model.layers, masks, strict=True):
        layer.self_attn.register_forward_pre_hook(
            lambda _m, args, kw, mask=mask: (args, {**kw, "attention_mask": mask[None]}),
            with_kwargs=True,
        )
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


def rms_norm(weight: torch.Tensor, eps: float, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


@pytest.mark.parametrize("cached", [0, 1, 36, 37, 60, len(TALK) - 1, len(TALK)])
def test_without_eviction_turns_are_one_text(oracle: Oracle, cached: int) -> None:
    whole = oracle.replay(PROMPT, ANSWER + TEXT[: ASKED + ANSWERED], NoEviction())
    talk, first = first_turn(oracle, policy=NoEviction())
    second = second_turn(talk, cached)
    same(first.logprobs, whole.logprobs[: len(ANSWER)])
    same(second.logprobs, whole.logprobs[-ANSWERED:])
    assert (second.physical == whole.physical[-ANSWERED:]).all()
    assert talk.length == talk.physical == len(TALK) + ASKED + ANSWERED


@BOTH_PAGES
@pytest.mark.parametrize("trimmed", [0, 4])
@pytest.mark.parametrize("closes", [(), (22,)])
def test_turns_are_transformers_under_masks(
    oracle: Oracle, folder: Path, page: int, trimmed: int, closes: tuple[int, ...]
) -> None:
    """Log-probabilities and schedule of two turns, the first of one region or two."""
    talk, first = first_turn(oracle, page, closes=closes)
    assert (held(first), first.physical.tolist()) == schedule(37, 37, len(ANSWER), page, closes)
    kept, before = talk.physical, positions(talk)
    cached = len(TALK) - trimmed
    second = second_turn(talk, cached)
    delta = len(TALK) - kept
    assert delta == MORE * len(first.rounds)
    assert (held(second), second.physical.tolist()) == schedule(
        kept + ASKED, len(TALK) + ASKED, ANSWERED, page
    )
    assert len(second.rounds) >= 5
    start = up(kept + ASKED, page)
    assert min(done.kept.min() for done in second.rounds) >= start + delta
    after = positions(talk)
    assert (after[..., :kept] == before).all()
    assert (after[..., kept:start] == torch.arange(kept, start) + delta).all()
    rounds = [*first.rounds, *second.rounds]
    assert len(set(begins(rounds))) == len(closes) + 2
    ids = TALK + TEXT[: ASKED + ANSWERED]
    expected = masked_logprobs(folder, ids, rounds, cached)
    same(second.logprobs, expected[-ANSWERED:])
    # Of the first turn's, those that were not computed anew from a thinner history.
    same(first.logprobs[: cached - 36], expected[36 : len(TALK) - 1][: cached - 36])


@BOTH_PAGES
def test_cuts(oracle: Oracle, page: int) -> None:
    """Not within a compressed span; elsewhere, what lay behind the cut leaves no trace."""
    talk, first = first_turn(oracle, page)
    early = talk.fork()
    second = second_turn(talk, len(TALK))
    whole = talk.tokens
    (begin, end), (later, latest) = compressed(first.rounds), compressed(second.rounds)
    assert begin + KEEP < end < len(TALK) < later < latest < len(whole)
    before = positions(talk)
    for cut in (begin + 1, begin + KEEP, end - 1, later + 1, latest - 1):
        with pytest.raises(ValueError, match=f"cut at {cut} in compressed tokens"):
            talk.turn([*whole, 65], TEXT[:3], cut)
        assert (talk.length, talk.tokens) == (len(whole), whole)
        assert torch.equal(positions(talk), before)

    def answer(past: Conversation, cached: int) -> np.ndarray:
        return past.fork().turn([*whole, 65], TEXT[:30], cached).logprobs

    plain = oracle.replay([*whole, 65], TEXT[:30], POLICY, page).logprobs
    compressed_once, twice = answer(early, len(TALK)), answer(talk, len(whole))
    for cut in (0, 20, begin):
        same(answer(talk, cut), plain)
    for cut in (len(TALK), len(TALK) + 3, later):
        same(answer(talk, cut), compressed_once)
    same(answer(talk, len(whole) - 1), twice)
    # Here the last round's protected tokens are computed anew, from what it left.
    assert np.abs(answer(talk, latest) - twice).max() > 0
    anew = talk.fork()
    anew.turn(whole, [], 20)
    same(answer(anew, end - 1), plain)
    differences = [plain - compressed_once, compressed_once - twice]
    assert min(np.abs(difference).max() for difference in differences) > 0.01


def test_forks_do_not_disturb_each_other(oracle: Oracle) -> None:
    talk, _ = first_turn(oracle, 4)
    before = positions(talk)
    alone = [second_turn(first_turn(oracle, 4)[0], len(TALK), text) for text in (TEXT, TEXT[99:])]
    forks = [talk.fork(), talk.fork()]
    for fork, text, expected in zip(forks, (TEXT, TEXT[99:]), alone, strict=True):
        same(second_turn(fork, len(TALK), text).logprobs, expected.logprobs)
    assert [fork.length for fork in forks] == [len(TALK) + ASKED + ANSWERED] * 2
    assert talk.tokens == TALK
    assert torch.equal(positions(talk), before)
    same(second_turn(talk, len(TALK)).logprobs, alone[0].logprobs)


@BOTH_PAGES
@pytest.mark.parametrize("reused", [0, 30, 83])
def test_restart_is_a_turn_with_the_outputs_so_far(oracle: Oracle, page: int, reused: int) -> None:
    talk = oracle.conversation(POLICY, page)
    first = talk.turn(PROMPT, TEXT[:47], 0)
    second = talk.turn(PROMPT + TEXT[:47], TEXT[47:90], reused)
    third = talk.turn(PROMPT + TEXT[:90], TEXT[90:110], 0)
    pieces = [first, second, third]
    restarts = [Restart(47, reused), Restart(90, 0)]
    judged = oracle.replay(PROMPT, TEXT[:110], POLICY, page, restarts=restarts)
    same(judged.logprobs, np.concatenate([piece.logprobs for piece in pieces]))
    assert judged.physical.tolist() == [n for piece in pieces for n in piece.physical.tolist()]
    assert held(judged) == [done for piece in pieces for done in held(piece)]
    assert (judged.physical[47] < 37 + 47) == (reused > 37)


def test_restart_without_an_output_token_between(oracle: Oracle) -> None:
    """The second one finds all that the first one's prefill had written."""
    twice = [Restart(47, 30), Restart(47, 83)]
    judged = oracle.replay(PROMPT, TEXT[:90], POLICY, restarts=twice)
    once = oracle.replay(PROMPT, TEXT[:90], POLICY, restarts=[Restart(47, 30)])
    same(judged.logprobs, once.logprobs)
    assert held(judged) == held(once)


@BOTH_PAGES
@pytest.mark.parametrize("close", [16, 19, 22, 59, 60])
def test_close_begins_a_region_with_its_own_budget(oracle: Oracle, page: int, close: int) -> None:
    talk = oracle.conversation(POLICY, page)
    judged = talk.turn(PROMPT, TEXT[:60], 0, closes=[close])
    assert (held(judged), judged.physical.tolist()) == schedule(37, 37, 60, page, (close,))
    earlier = [done for done in judged.rounds if done.length < 37 + close]
    later = judged.rounds[len(earlier) :]
    assert (len(earlier) > 0) == (close > (16 if page == 1 else 19))
    # What the first region held at the close is still there at the end: the second has the rest.
    kept = 37 + close - MORE * len(earlier)
    start, delta = up(kept, page), MORE * len(earlier)
    assert all(done.kept.min() >= start + delta for done in later)
    assert (positions(talk) < 37 + close).sum(-1).unique().tolist() == [kept]
    assert talk.physical - start <= KEEP + MORE + 1
    before = oracle.replay(PROMPT, TEXT[: close + 1], POLICY, page)
    same(judged.logprobs[: close + 1], before.logprobs[:60])
    assert held(before)[: len(earlier)] == held(judged)[: len(earlier)]


@BOTH_PAGES
def test_round_before_the_discarded_step(oracle: Oracle, page: int) -> None:
    """An overlapped schedule holds it, and has the last token's KV, when the end becomes known."""
    due = {1: 85, 4: 88}[page]
    answer = TEXT[: due + 1 - len(PROMPT)]
    question = PROMPT + answer + TEXT[200:209]
    ahead, talk, behind = (oracle.conversation(POLICY, page) for _ in range(3))
    record = [done.kept for done in ahead.turn(PROMPT, [*answer, 65], 0).rounds]
    judged = talk.turn(PROMPT, answer, 0, recorded=record)
    assert (len(judged.rounds), judged.surplus) == (len(record) - 1, 1)
    assert (talk.length, talk.physical) == (due + 1, ahead.physical - 1)
    for rounds, closes in ((None, []), (record[:-1], []), (record, [len(answer) - 1])):
        behind.turn(PROMPT, answer, 0, recorded=rounds, closes=closes)
        assert (behind.length, behind.physical) == (talk.length, talk.physical + MORE)
    found, expected = (past.turn(question, TEXT[:30], due + 1) for past in (talk, ahead))
    same(found.logprobs, expected.logprobs)


@BOTH_PAGES
@pytest.mark.parametrize(("all_anew", "overlap"), [(True, True), (False, True), (False, False)])
def test_round_before_a_restart(oracle: Oracle, page: int, all_anew: bool, overlap: bool) -> None:
    """Of the step that was under way; the record has it, though its token was dropped."""
    due = {1: 85, 4: 88}[page]
    count, reused = due + 1 - len(PROMPT), 0 if all_anew else due
    text = TEXT[: count + 40]
    ahead = oracle.replay(PROMPT, TEXT[: count + overlap], POLICY, page)
    record = [done.kept for done in ahead.rounds]
    talk = oracle.conversation(POLICY, page)
    first = talk.turn(PROMPT, text[:count], 0, recorded=record)
    second = talk.turn(PROMPT + text[:count], text[count:], reused)
    record += [done.kept for done in second.rounds]
    restarts = [Restart(count, reused)]
    judged = oracle.replay(PROMPT, text, POLICY, page, recorded=record, restarts=restarts)
    same(judged.logprobs, np.concatenate([first.logprobs, second.logprobs]))
    assert held(judged) == held(first) + held(second)
    assert (judged.surplus, judged.followed) == (int(overlap), 0)


@BOTH_PAGES
@pytest.mark.parametrize("closes", [(), (9,), (30,)])
def test_first_rounds_are_early(oracle: Oracle, page: int, closes: tuple[int, ...]) -> None:
    """As the prompt of a turn has it, and again after a restart; not behind a close."""
    more, recent = 12, 2
    policy = TriAttention(KEEP, more, recent=recent)
    talk = oracle.conversation(policy, page)
    first = talk.turn(PROMPT, ANSWER, 0, closes=closes)
    question = TALK + TEXT[:ASKED]
    earlier = [early(prompt, more, recent, page) for prompt in (PROMPT, question)]
    assert 0 < earlier[0] != earlier[1]
    expected = schedule(37, 37, len(ANSWER), page, closes, more, earlier[0])
    assert (held(first), first.physical.tolist()) == expected
    asked, kept = len(question), talk.physical + ASKED
    second = talk.turn(question, TEXT[ASKED : ASKED + ANSWERED], len(TALK))
    assert held(second) == schedule(kept, asked, ANSWERED, page, (), more, earlier[1])[0]
    restarted = oracle.replay(PROMPT, ANSWER, policy, page, restarts=[Restart(20, 0)])
    again = schedule(57, 57, len(ANSWER) - 20, page, (), more, earlier[0])[0]
    assert held(restarted)[-len(again) :] == again


def test_what_is_no_continuation_is_refused(oracle: Oracle) -> None:
    talk, first = first_turn(oracle)
    question = TALK + TEXT[:ASKED]
    changed = [*TALK[:50], TALK[50] + 1, *question[51:]]
    with pytest.raises(ValueError, match="first 51 prompt tokens are not the conversation's"):
        talk.turn(changed, TEXT[:9], 51)
    with pytest.raises(ValueError, match=f"first {len(TALK) + 1} prompt tokens are not"):
        talk.turn(question, TEXT[:9], len(TALK) + 1)
    for cached in (-1, len(TALK)):
        with pytest.raises(ValueError, match=f"{cached} tokens reused of a prompt of {len(TALK)}"):
            talk.turn(TALK, TEXT[:9], cached)
    for close in (-1, 10):
        with pytest.raises(ValueError, match="closes"):
            talk.turn(question, TEXT[:9], 0, closes=[close])
    with pytest.raises(RoundMismatch, match=r"round 1, .* not in the record"):
        talk.turn(PROMPT, TEXT[:60], 0, recorded=[first.rounds[0].kept], tolerance=math.inf)
    assert (talk.tokens, talk.length, talk.physical) == (TALK, len(TALK), first.physical[-1] + 1)
    talk.turn(changed, TEXT[:9], 37)
    assert (talk.tokens, talk.length) == (changed + TEXT[:9], len(changed) + 9)
    for reused, message in ((44, "cut at 44 in compressed"), (84, "84 tokens reused of a prompt")):
        with pytest.raises(ValueError, match=message):
            oracle.replay(PROMPT, TEXT[:60], POLICY, restarts=[Restart(47, reused)])
    with pytest.raises(ValueError, match="page size 0"):
        oracle.conversation(POLICY, 0)
