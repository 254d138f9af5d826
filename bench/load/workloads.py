"""What is sent to which servers: workloads of SGLang's own client, and presets of their sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product

REASONING, NEVER = "reasoning", "never evicted"
RICH = "rich"
PRODUCTION, CONSTRAINED, POLICY = "production", "constrained", "triattention"
WAITING = "waiting"  # The policy where each round waits for the whole forward pass before it.
ARMS = (PRODUCTION, CONSTRAINED, WAITING, POLICY)
CLIPPED = "clip "  # Production SGLang with another estimate of output tokens, which follows.
WAVES = 4  # Of the load that is never evicted from: one is over too soon to be compared.
_BELOW = 16  # Its outputs are shorter than the budget, by one part in so many.
_JOINT = 2  # Tokens that the client writes between system prompt and question.


@dataclass(frozen=True)
class Workload:
    """Requests for SGLang's client; lengths are in tokens.

    Attributes:
        requests: how many.
        system: of the system prompt. Where it is 0, nothing is shared, prompts are random ids, and
            question and output are the most that the client draws. (Its ids count up through the
            vocabulary from random starts: in a small one some prompts coincide.)
        groups: system prompts, each shared by as many requests.
        at_once: requests at a time; 0: all.
    """

    name: str
    requests: int
    system: int
    question: int
    output: int
    groups: int = 1
    at_once: int = 0

    @property
    def arguments(self) -> list[str]:
        """For the client."""
        if self.system:
            sizes = f"--dataset-name generated-shared-prefix --gsp-num-groups {self.groups}"
            sizes += f" --gsp-prompts-per-group {self.requests // self.groups}"
            sizes += f" --gsp-system-prompt-len {self.system} --gsp-question-len {self.question}"
            sizes += f" --gsp-output-len {self.output}"
        else:
            sizes = f"--tokenize-prompt --dataset-name random-ids --num-prompts {self.requests}"
            sizes += f" --random-input-len {self.question} --random-output-len {self.output}"
        limit = f" --max-concurrency {self.at_once}" if self.at_once else ""
        return (sizes + limit).split()

    def times(self, factor: int) -> Workload:
        """`factor` times as many requests, one after another: no more at once than before."""
        at_once = self.at_once or (self.requests if factor > 1 else 0)
        return replace(self, requests=self.requests * factor, at_once=at_once)

    def pool_for(self, concurrency: float) -> int:
        """KV slots in which `concurrency` requests with system prompts fit to the last token."""
        private = _JOINT + self.question + self.output
        return self.groups * self.system + round(concurrency * private)


@dataclass(frozen=True)
class Pool:
    """A size of the pool, and what is measured in it.

    Attributes:
        name: how many reasoning requests stock SGLang has room for (4.4: for 4 and a part of a
            fifth); `rich`: for all.
        slots: KV slots.
        arms: names of the servers that are compared, production and the policy among them.
    """

    name: str
    slots: int
    workloads: list[Workload]
    arms: list[str]


@dataclass(frozen=True)
class Preset:
    """Sizes of everything, by default those of `tiny`; flags of the bench change some."""

    gpu: bool = False  # Whether it has Qwen3-8B's shape and needs one; else the model is tiny.
    server: Sequence[str] = ("--stream-interval", "8")  # Arguments of all servers.
    most: int = 64  # `--max-running-requests`.
    budget: int = 32
    interval: int = 16
    arms: Sequence[str] = (PRODUCTION, CONSTRAINED, POLICY)
    clips: Sequence[int] = (32,)  # Estimates of output tokens.
    systems: Sequence[int] = (128,)  # Tokens of the reasoning load's system prompt, one by one,
    outputs: Sequence[int] = (160,)  # of its outputs, one by one,
    question: int = 32  # and of its questions.
    sent: dict[str, int] = field(  # To each pool: how many of these requests.
        default_factory=lambda: {"4": 20, "8": 32, "16": 48, "32": 64, RICH: 32}
    )
    pools: Sequence[str] = ()  # Which of these; empty: all.
    others: Sequence[Workload] = (
        Workload("shared prefix", 32, system=256, question=32, output=48, groups=4),
        Workload("random 256+192", 32, system=0, question=256, output=192),
    )
    untouched: int = 32  # Requests at once of a further load that is never evicted from.
    others_in: Sequence[str] = (RICH,)  # The pools of other loads: elsewhere they take too long.
    goal: float = 1.2  # Least ratio to production SGLang where memory is short.
    stats: str = "auto"  # Query statistics.
    repeats: int = 2
    times: int = 1  # As many requests, no more of them at once.
    workloads: Sequence[str] = ()  # What their names begin with; empty: all.

    def all_pools(self) -> list[Pool]:
        """For each length of prompt and output, in the order of `sent`."""
        lengths = list(product(self.systems, self.outputs))
        names = self.pools or self.sent
        pools = [self._pool(name, *pair, pair == lengths[0]) for pair in lengths for name in names]
        return [pool for pool in pools if pool.workloads]

    def planned(self) -> Counter[str]:
        """How many runs there are to be of each arm with each workload in each pool."""
        pools = self.all_pools()
        loads = [(workload.name, pool) for pool in pools for workload in pool.workloads]
        names = [f"{name}, pool {pool.name}, {arm}" for name, pool in loads for arm in pool.arms]
        return Counter(dict.fromkeys(names, self.repeats))

    def _pool(self, name: str, system: int, output: int, first: bool) -> Pool:
        sent = self.sent[name]
        reasoning = Workload(f"{REASONING} {system}+{output}", sent, system, self.question, output)
        slots = reasoning.pool_for(sent if name == RICH else float(name))
        others = self._others(system) if first and name in self.others_in else ()
        wanted = tuple(self.workloads) or ""
        chosen = [each for each in (reasoning, *others) if each.name.startswith(wanted)]
        # Where there is room for all, estimates of lengths change nothing.
        clips = () if name == RICH else (f"{CLIPPED}{tokens}" for tokens in self.clips)
        arms = list(dict.fromkeys([PRODUCTION, *clips, *self.arms]))
        return Pool(name, slots, [workload.times(self.times) for workload in chosen], arms)

    def _others(self, system: int) -> list[Workload]:
        output = self.budget - -(-self.budget // _BELOW)
        name = f"{NEVER} {system}+{output}"
        never = Workload(name, self.untouched, system, self.question, output)
        return [*self.others, never.times(WAVES)]


PRESETS = {
    "tiny": Preset(),
    # Minutes on one GPU of 80 GB: weights take 16 GB of each server, its pool 1.4.
    "quick": Preset(
        gpu=True,
        # Few graphs are captured soon.
        server=(
            *("--stream-interval", "8", "--mem-fraction-static", "0.85"),
            *("--cuda-graph-bs-decode", "1", "4", "8", "16", "24", "32"),
            "--disable-prefill-cuda-graph",
        ),
        most=32,
        budget=256,
        interval=32,
        arms=(PRODUCTION, POLICY),
        clips=(),
        systems=(64,),
        outputs=(2048,),
        sent={"4.4": 24, RICH: 24},
        pools=("4.4",),
        others=(),
        untouched=24,
        others_in=("4.4",),
        goal=2.5,
    ),
}
