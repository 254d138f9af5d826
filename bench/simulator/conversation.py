"""Turns of one conversation, each over the KV lists that the turn before has left."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from .decoder import Decoder
from .history import History
from .policies import Policy
from .request import KeptSet, Ledger, Request
from .stats import Stats
from .trace import Replay, Trace


class Restart(NamedTuple):
    """A retraction: prompt and output so far are prefilled, all of them beyond eviction."""

    outputs: int
    """Output tokens that there were."""
    reused: int
    """Logical tokens whose KV was still there."""


class Conversation:
    """Made by `Oracle.conversation`; `policy` may be set anew between turns."""

    def __init__(
        self, decoder: Decoder, stats: Stats | None, policy: Policy, page_size: int
    ) -> None:
        if page_size < 1:
            raise ValueError(f"page size {page_size}")
        self.decoder = decoder
        self.stats = stats
        self.policy = policy
        self.page_size = page_size
        self.tokens: list[int] = []
        """Prompt and output of the last turn."""
        self.history = History(decoder.new_cache())
        """Their KV, to the very last token."""

    @property
    def length(self) -> int:
        """Logical length."""
        return self.history.length

    @property
    def physical(self) -> int:
        """Resident tokens of a head."""
        return self.history.physical

    def fork(self) -> Conversation:
        """A copy to continue differently; the tensors are shared."""
        copy = Conversation(self.decoder, self.stats, self.policy, self.page_size)
        copy.tokens = self.tokens
        copy.history = self.history.fork()
        return copy

    def turn(
        self,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        cached: int,
        recorded: Sequence[KeptSet] | None = None,
        restarts: Sequence[Restart] = (),
        closes: Sequence[int] = (),
        tolerance: float = 1e-5,
        keep_logits: bool = False,
    ) -> Replay:
        """Judge given output tokens; a turn that raises leaves the conversation as it was.

        prompt_ids: the whole logical prompt.
        cached: how many of its tokens were not prefilled, but reused from the turns before.
        recorded: the kept positions of every round, in order, each shaped like `Round.kept`; one
            that differs is followed if all differing candidates score within `tolerance` of the
            edge of their set, else RoundMismatch is raised. A round before the step that feeds the
            last output token (of all, or before a restart) is held only if it is recorded.
        restarts: retractions, ascending.
        closes: output-token counts at which the private region is closed: as soon as the KV of so
            many is there, it is beyond eviction, and a new region begins.
        """
        prompt, outputs = list(prompt_ids), list(output_ids)
        _validate(prompt, outputs, restarts, closes)
        if prompt[:cached] != self.tokens[:cached]:
            raise ValueError(f"the first {cached} prompt tokens are not the conversation's")
        history, tokens = self.history.fork(), prompt + outputs
        ledger = Ledger(self.policy, self.stats, recorded, tolerance)
        trace = Trace(self.decoder, keep_logits)
        request = Request(self.decoder, history, self.page_size, ledger, prompt)
        firsts, reuses = zip(Restart(0, cached), *restarts, strict=True)
        ends = [*firsts[1:], len(outputs)]
        for first, end, reused in zip(firsts, ends, reuses, strict=True):
            hidden = request.prefill(tokens[: len(prompt) + first], reused)
            if first < end:
                trace.add(hidden, history.physical, outputs[first : first + 1])
                _decode(request, outputs, first + 1, end, closes, trace)
                _discard(request, outputs, end, closes)
        self.tokens, self.history = tokens, history
        return trace.replay(ledger, ends)


def _validate(
    prompt: list[int], outputs: list[int], restarts: Sequence[Restart], closes: Sequence[int]
) -> None:
    if not prompt:
        raise ValueError("empty prompt")
    bounds = [0, *(done for done, _ in restarts), len(outputs)]
    if any(first > last for first, last in pairwise(bounds)) or len(outputs) in bounds[1:-1]:
        raise ValueError(f"restarts {list(restarts)} in {len(outputs)} output tokens")
    if not all(0 <= done <= len(outputs) for done in closes):
        raise ValueError(f"closes {list(closes)} in {len(outputs)} output tokens")


def _decode(
    request: Request,
    outputs: list[int],
    step: int,
    end: int,
    closes: Sequence[int],
    trace: Trace,
) -> None:
    """Output tokens [step, end), each from the decode step that feeds the token before it."""
    while step < end:
        if step - 1 in closes:
            request.open_region()
        if request.steps_until_round() == 0:
            request.evict(step)
        # Up to the next round or close the inputs are known: the steps run as one causal chunk.
        stops = [end, *(done + 1 for done in closes if done >= step)]
        free = request.steps_until_round()
        if free is not None:
            stops.append(step + free)
        stop = min(stops)
        hidden = request.feed(outputs[step - 1 : stop - 1])
        trace.add(hidden, request.history.physical, outputs[step:stop])
        step = stop


def _discard(request: Request, outputs: list[int], end: int, closes: Sequence[int]) -> None:
    """Feed the last of `end` output tokens: a step that an overlapped schedule has begun by then.

    Where that did not happen, nobody reuses the token; but a round before it, or before the step
    after it that a retraction has stopped, is held for certain only if it is in the record.
    """
    _hold_recorded(request, end, end - 1 in closes)
    request.feed(outputs[end - 1 : end])
    _hold_recorded(request, end, end in closes)


def _hold_recorded(request: Request, end: int, closes: bool) -> None:
    if closes:
        request.open_region()
    if request.steps_until_round() == 0 and request.ledger.expects(request.history.length):
        request.evict(end)
