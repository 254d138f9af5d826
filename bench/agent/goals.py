"""What the benches of agents are to show: each goal with what was measured."""

from __future__ import annotations

import statistics
from collections import defaultdict

from bench.agent.arms import CONTINUATION, PROMPT, STOCK, Outcome
from bench.agent.calls import Call, ExactAgent
from bench.goal import Goal
from sglang_tri.config import KvPolicyConfig

FASTER, LONG_REASONING = 0.2, 1000
RECENT = KvPolicyConfig.recent


def judge(outcomes: list[Outcome], reasoning: int) -> list[Goal]:
    """All goals of these arms, or of the one server of `--base-url`."""
    if len(outcomes) == 1:
        return _only_new(outcomes[0])
    arms = {outcome.name: outcome for outcome in outcomes}
    return [
        *_only_new(arms[STOCK]),
        *_only_new(arms[CONTINUATION]),
        *(_shared_hits(arms[name], arms[STOCK]) for name in (PROMPT, CONTINUATION)),
        _first_token(arms[CONTINUATION], arms[PROMPT], reasoning),
    ]


def _only_new(arm: Outcome) -> list[Goal]:
    """A later request prefills what is new; one goal for each path."""
    goals = []
    for path in dict.fromkeys(call.path for call in arm.calls):
        later = [call for call in arm.calls if call.path == path and call.known]
        worst = max((call.prefilled - call.new for call in later), default=0)
        prefilled, new = sum(call.prefilled for call in later), sum(call.new for call in later)
        goals.append(
            Goal(
                f"{arm.name}, {path}: later requests prefill new tokens and at most {RECENT} more",
                f"at most {worst} more; {prefilled} prefilled, {new} new in {len(later)} requests",
                worst <= RECENT if later else None,
                # Text may be tokenised anew in another way: no fault of the server's.
                required=path == ExactAgent.path,
            )
        )
    return goals


def _shared_hits(arm: Outcome, stock: Outcome) -> Goal:
    ours, theirs = (
        min(call.cached for call in outcome.calls if not call.known) for outcome in (arm, stock)
    )
    text = f"{arm.name}: the shared prompt hits as in stock"
    return Goal(text, f"{ours} tokens cached at least, stock {theirs}", ours == theirs, True)


def _first_token(arm: Outcome, baseline: Outcome, reasoning: int) -> Goal:
    """Time to first token of all requests of a turn together, in turns after the first."""
    text = f"{arm.name}: time to first token of later turns <= {FASTER} x {baseline.name}'s"
    ours, theirs = waits(arm.calls), waits(baseline.calls)
    if reasoning < LONG_REASONING or not ours:
        needed = f"needs --reasoning {LONG_REASONING} or more, and --turns 2"
        return Goal(text, needed, None, False)
    ratio = statistics.median(ours) / statistics.median(theirs)
    seconds = f"{statistics.median(ours):.2f} s, {statistics.median(theirs):.2f} s"
    return Goal(text, f"{ratio:.2f} x (medians {seconds})", ratio <= FASTER, False)


def waits(calls: list[Call]) -> list[float]:
    """Seconds that each agent waited for first tokens in each turn after the first."""
    turns: dict[tuple[str, int, int], float] = defaultdict(float)
    for call in calls:
        if call.turn > 1:
            turns[call.path, call.agent, call.turn] += call.first_token_s
    return list(turns.values())
