"""Run one workload on several servers, two at a time and turn by turn, and say what each did."""

from __future__ import annotations

import argparse
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.agent.calls import Call, tokenize
from bench.agent.prompt import TEMPLATE, system_prompt
from bench.arms import Arm, running, triattention
from bench.decode_log import DecodeLog
from bench.models.tiny import make_model
from bench.server import STOCK_ENVIRONMENT, Endpoint

ARMS = ("prompt", "continuation", "stock", "radix-off")
PROMPT, CONTINUATION, STOCK, RADIX_OFF = ARMS
# Report cached tokens, use our template; the rest suits a small machine and a random model.
COMMON = ["--enable-cache-report", "--chat-template", str(TEMPLATE)]
COMMON += ["--constrained-json-disable-any-whitespace"]  # Else it may write blanks for ever.
COMMON += ["--stream-interval", "32", "--decode-log-interval", "1"]


class Workload(ABC):
    """What is measured, on one server.

    Args:
        endpoint: the server.
        arguments: `agents`, `turns`, `reasoning` and `prompt_tokens`.
        on_step: to be called after each step.
    """

    def __init__(
        self, endpoint: Endpoint, arguments: argparse.Namespace, on_step: Callable[[], object]
    ) -> None:
        self._endpoint = endpoint
        self._arguments = arguments
        self._on_step = on_step
        least = arguments.prompt_tokens
        self._system = system_prompt(lambda text: len(tokenize(endpoint, prompt=text)), least)

    @staticmethod
    @abstractmethod
    def steps(arguments: argparse.Namespace) -> int:
        """How many steps it has."""

    @staticmethod
    @abstractmethod
    def turns(arguments: argparse.Namespace) -> int:
        """How often `take_turn` is to be called."""

    @abstractmethod
    def warm_up(self) -> None:
        """Fill the cache with what all agents share, and let the server do everything once."""

    @abstractmethod
    def take_turn(self) -> list[Call]: ...


@dataclass(frozen=True)
class Outcome:
    """What one arm did, without its warm-up.

    Attributes:
        seconds: of all its turns.
        peak_slots: most KV slots in use; None if the server's log cannot be read.
        policy: the policy's report in `/server_info`; rounds and evicted tokens are differences.
    """

    name: str
    calls: list[Call]
    seconds: float
    peak_slots: int | None
    policy: dict[str, Any]

    @property
    def tokens_per_second(self) -> float:
        return sum(call.generated for call in self.calls) / self.seconds

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


class Session:
    """One arm while it is measured."""

    def __init__(self, name: str, endpoint: Endpoint, log: Path | None, workload: Workload) -> None:
        self.name = name
        self._endpoint = endpoint
        self._workload = workload
        endpoint.flush_cache()
        workload.warm_up()
        self._log = DecodeLog(log) if log else None  # From here on.
        self._before = self._policy()
        self._calls: list[Call] = []
        self._seconds = 0.0

    def take_turn(self) -> None:
        began = time.perf_counter()
        self._calls += self._workload.take_turn()
        self._seconds += time.perf_counter() - began

    def outcome(self) -> Outcome:
        if self._log:
            self._log.read_new()
        policy = self._policy()
        for counter in ("rounds", "evicted_tokens"):
            if counter in policy:
                policy[counter] -= self._before[counter]
        peak = self._log.peak_slots if self._log else None
        return Outcome(self.name, self._calls, self._seconds, peak, policy)

    def _policy(self) -> dict[str, Any]:
        report: dict[str, Any] = self._endpoint.internal_state().get("kv_policy", {})
        return report


def make_arms(arguments: argparse.Namespace) -> list[Arm]:
    """In pairs: those whose times are compared stand side by side."""
    policy = triattention(arguments.stats, arguments.budget, arguments.interval)
    common = [*COMMON, *arguments.server_arguments]
    return [
        Arm(PROMPT, [*common, *policy, "--kv-reuse", "prompt"]),
        Arm(CONTINUATION, [*common, *policy, "--kv-reuse", "continuation"]),
        Arm(STOCK, common, STOCK_ENVIRONMENT),
        Arm(RADIX_OFF, [*common, *policy, "--disable-radix-cache"]),
    ]


def measure(workload: type[Workload], arguments: argparse.Namespace) -> list[Outcome]:
    """All arms, or the one server of `--base-url`."""
    folder = Path(tempfile.mkdtemp(prefix="sglang-tri-agents-"))
    servers = 1 if arguments.base_url else len(ARMS)
    with tqdm(total=servers * workload.steps(arguments), unit="step") as bar:

        def begin(name: str, endpoint: Endpoint, log: Path | None) -> Session:
            return Session(name, endpoint, log, workload(endpoint, arguments, bar.update))

        turns = workload.turns(arguments)
        if arguments.base_url:
            endpoint = Endpoint(arguments.base_url.rstrip("/"))
            check_settings(endpoint.server_info())
            return _alternate([begin(arguments.base_url, endpoint, None)], turns, bar)
        model = arguments.model_path or make_model("qwen3", folder / "model")
        arms = make_arms(arguments)
        outcomes: list[Outcome] = []
        for pair in (arms[:2], arms[2:]):
            bar.set_description("starting " + " and ".join(arm.name for arm in pair))
            with running(pair, model, folder, bar.refresh) as started:
                sessions = [begin(name, server, server.log) for name, server in started.items()]
                outcomes += _alternate(sessions, turns, bar)
    return outcomes


def check_settings(info: dict[str, Any]) -> None:
    """Whether a server that somebody else started can be measured.

    Raises:
        SystemExit: it cannot; with what to change.
    """
    if not info["enable_cache_report"]:
        raise SystemExit("The server does not report cached tokens: add --enable-cache-report.")
    if info["reasoning_parser"]:
        raise SystemExit("The server holds grammars back until thinking ends: drop its parser.")


def _alternate(sessions: list[Session], turns: int, bar: tqdm) -> list[Outcome]:
    """A turn of each in turn, so that a slow moment of the machine strikes all."""
    for _ in range(turns):
        for session in sessions:
            bar.set_description(session.name)
            session.take_turn()
    return [session.outcome() for session in sessions]
