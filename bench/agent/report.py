"""What the bench of agents tells: tables, and goals with what was measured."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from bench.agent.answers import Answer, total
from bench.agent.loops import EXACT
from bench.goal import Goal
from bench.table import table
from sglang_tri.config import KvPolicyConfig

PROMPT, CONTINUATION, STOCK, RADIX_OFF = "prompt", "continuation", "stock", "radix-off"
FASTER, LONG_REASONING = 0.2, 1000
RECENT = KvPolicyConfig.recent


@dataclass
class Outcome:
    """What one arm did, without its warm-up.

    Attributes:
        seconds: of all its turns.
        peak_slots: most KV slots in use.
    """

    name: str
    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    peak_slots: int = 0


def arm_table(outcomes: list[Outcome]) -> str:
    """One row for each arm; hits are the cached share of the prompts' tokens."""
    counts = ("rounds", "evicted", "cached", "prefilled")
    paths = list(dict.fromkeys(answer.path for answer in outcomes[0].answers))
    rows = [["arm", "tokens/s", "peak slots", *counts, *(f"hits {path}" for path in paths)]]
    for arm in outcomes:
        row = [
            arm.name,
            f"{total(arm.answers, 'generated') / arm.seconds:.0f}",
            str(arm.peak_slots),
        ]
        row += [str(total(arm.answers, count)) for count in counts]
        for path in paths:
            mine = [answer for answer in arm.answers if answer.path == path]
            row.append(f"{total(mine, 'cached') / total(mine, 'prompt'):.1%}")
        rows.append(row)
    return table(rows)


def turn_table(outcomes: list[Outcome]) -> str:
    """One row for each kind of request in each turn of each arm."""
    counts = ("cached", "prefilled", "new")
    rows = [["arm", "turn", "request", "first token p50", "p95", *counts]]
    for arm in outcomes:
        requests = defaultdict(list)
        for answer in arm.answers:
            requests[answer.turn, answer.kind].append(answer)
        for (turn, kind), answers in requests.items():
            times = np.percentile([1e3 * answer.first_token_s for answer in answers], [50, 95])
            row = [arm.name, str(turn), kind, *(f"{time:.0f} ms" for time in times)]
            rows.append([*row, *(str(total(answers, count)) for count in counts)])
    return table(rows)


def judge(outcomes: list[Outcome], reasoning: int) -> list[Goal]:
    """All goals of these arms, or of the one server of `--base-url`.

    Args:
        reasoning: tokens in a turn.
    """
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
    for path in dict.fromkeys(answer.path for answer in arm.answers):
        later = [answer for answer in arm.answers if answer.path == path and answer.known]
        worst = max((answer.prefilled - answer.new for answer in later), default=0)
        prefilled, new = total(later, "prefilled"), total(later, "new")
        text = f"{arm.name}, {path}: later requests prefill new tokens and at most {RECENT} more"
        measured = (
            f"at most {worst} more; {prefilled} prefilled, {new} new in {len(later)} requests"
        )
        # Text may be tokenised anew in another way: no fault of the server's.
        goals.append(Goal(text, measured, worst <= RECENT if later else None, path == EXACT))
    return goals


def _shared_hits(arm: Outcome, stock: Outcome) -> Goal:
    ours, theirs = (
        min(answer.cached for answer in outcome.answers if not answer.known)
        for outcome in (arm, stock)
    )
    text = f"{arm.name}: the shared prompt hits as in stock"
    return Goal(text, f"{ours} tokens cached at least, stock {theirs}", ours == theirs, True)


def _first_token(arm: Outcome, baseline: Outcome, reasoning: int) -> Goal:
    text = f"{arm.name}: time to first token of later turns <= {FASTER} x {baseline.name}'s"
    waited = [waits(outcome.answers) for outcome in (arm, baseline)]
    if reasoning < LONG_REASONING or not all(waited):
        needed = f"needs --reasoning {LONG_REASONING} or more, and --turns 2"
        return Goal(text, needed, None, False)
    ours, theirs = map(median, waited)
    measured = f"{ours / theirs:.2f} x (medians {ours:.2f} s, {theirs:.2f} s)"
    return Goal(text, measured, ours / theirs <= FASTER, False)


def waits(answers: list[Answer]) -> list[float]:
    """Seconds that each agent waited for first tokens in each turn after the first."""
    turns: dict[tuple[str, int, int], float] = defaultdict(float)
    for answer in answers:
        if answer.turn > 1:
            turns[answer.path, answer.agent, answer.turn] += answer.first_token_s
    return list(turns.values())
