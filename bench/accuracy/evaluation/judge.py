"""Whether the model solves an instance under a policy."""

from __future__ import annotations

from dataclasses import dataclass

from bench.accuracy.reference_model.tasks import Example
from bench.accuracy.reference_model.tokenizer import output_ids, prompt_ids
from bench.simulator import Oracle, Request
from bench.simulator.baselines import FutureAttention
from bench.simulator.history import History
from bench.simulator.policies import Policy
from bench.simulator.request import Ledger


@dataclass(frozen=True)
class Outcome:
    """One instance under one policy."""

    solved: bool
    correct: int
    """Tokens of the output before the first wrong one."""
    length: int
    """Tokens of the right output."""
    rounds: int

    @property
    def progress(self) -> float:
        """Share of the output before the first wrong token."""
        return self.correct / self.length


def judge(oracle: Oracle, policy: Policy, question: Example) -> Outcome:
    """Whether the greedy answer to a question is the right one, chain and all."""
    return follow(oracle, policy, prompt_ids(question.question), output_ids(question))


def follow(oracle: Oracle, policy: Policy, prompt: list[int], expected: list[int]) -> Outcome:
    """Decode greedily as far as the output is the expected one.

    Greedy decoding gives the expected output if and only if its next token is the most probable at
    every step: they are fed, in chunks that end where a round is held, up to the first that is not.
    """
    if isinstance(policy, FutureAttention):
        policy.look_ahead(oracle.decoder, [*prompt, *expected])
    ledger = Ledger(policy, oracle.stats, None, 0.0)
    history = History(oracle.decoder.new_cache())
    request = Request(oracle.decoder, history, 1, ledger, prompt)
    hidden = request.prefill(prompt, 0)
    done = 0
    while True:
        greedy = oracle.decoder.logits(hidden).argmax(dim=-1).tolist()
        wanted = expected[done : done + len(greedy)]
        right = agreeing(greedy, wanted)
        done += right
        if right < len(greedy) or done == len(expected):
            solved = done == len(expected)
            return Outcome(solved, done, len(expected), len(ledger.rounds))
        if request.steps_until_round() == 0:
            request.evict(done)
        free = request.steps_until_round()
        end = len(expected) if free is None else done + free
        hidden = request.feed(expected[done - 1 : min(end, len(expected)) - 1])


def agreeing(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences of one length begin with in common."""
    pairs = zip(one, other, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(one))
