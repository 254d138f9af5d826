"""Workloads, as arguments of SGLang's own client (`python -m sglang.benchmark.serving`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

REASONING, NEVER = "reasoning", "never evicted"
_BELOW = 16  # By one part in so many.
_JOINT = 2  # Tokens that the client writes between system prompt and question.


@dataclass(frozen=True)
class Workload:
    """What is sent to a server, all at once unless `sizes` say otherwise.

    Attributes:
        dataset: the client's name for it.
        sizes: options of the client, without dashes.
        counter: the one of them that the number of requests is proportional to.
        requests: how many.
        groups: system prompts, each shared by as many requests; 0 if nothing is shared.
        shared: tokens of a system prompt.
        private: tokens of question and output, at the most.
        output: tokens of all outputs together; None if they are drawn.
        as_text: whether prompts are sent as text; else as ids of the model's vocabulary.
    """

    name: str
    dataset: str
    sizes: dict[str, int]
    counter: str
    requests: int
    groups: int
    shared: int
    private: int
    output: int | None
    as_text: bool = True

    @property
    def arguments(self) -> list[str]:
        """For the client."""
        sizes = [text for flag, size in self.sizes.items() for text in (f"--{flag}", str(size))]
        ids = [] if self.as_text else ["--tokenize-prompt"]
        return ["--dataset-name", self.dataset, *sizes, *ids]

    def times(self, factor: int) -> Workload:
        """`factor` times as many requests, one after another: no more at once than before."""
        if factor == 1:
            return self
        count = self.sizes[self.counter] * factor
        at_once = self.sizes.get("max-concurrency", self.requests)
        return replace(
            self,
            sizes={**self.sizes, self.counter: count, "max-concurrency": at_once},
            requests=self.requests * factor,
            output=None if self.output is None else self.output * factor,
        )

    def pool_for(self, concurrency: float) -> int:
        """KV slots in which `concurrency` such requests fit to the last token."""
        return self.groups * self.shared + round(concurrency * self.private)

    def read_twice(self, running: int) -> float:
        """Slots that a step reads again, because `running` requests share them."""
        if not self.groups:
            return 0.0
        present = self.groups * (1 - (1 - 1 / self.groups) ** running)  # Groups, as expected.
        return self.shared * (running - present)


def shared_prefix(
    name: str, groups: int, per_group: int, system: int, question: int, output: int
) -> Workload:
    """The client's generated-shared-prefix workload; all lengths in tokens."""
    counter = "gsp-prompts-per-group"
    sizes = {
        "gsp-num-groups": groups,
        counter: per_group,
        "gsp-system-prompt-len": system,
        "gsp-question-len": question,
        "gsp-output-len": output,
    }
    requests, private = groups * per_group, _JOINT + question + output
    return Workload(
        name,
        "generated-shared-prefix",
        sizes,
        counter,
        requests,
        groups,
        system,
        private,
        requests * output,
    )


def reasoning(requests: int, system: int, question: int, output: int) -> Workload:
    """Long outputs behind one system prompt."""
    name = f"{REASONING} {system}+{output}"
    return shared_prefix(name, 1, requests, system, question, output)


def never_evicted(requests: int, system: int, question: int, budget: int) -> Workload:
    """As `reasoning`, with outputs that stay below a policy's `budget`: no round is ever due."""
    output = budget - -(-budget // _BELOW)
    return shared_prefix(f"{NEVER} {system}+{output}", 1, requests, system, question, output)


def random_lengths(requests: int, prompt: int, output: int) -> Workload:
    """The client's random workload, lengths up to `prompt` and `output` tokens.

    Its prompts count up through the vocabulary from random starts: in a small one some coincide.
    """
    counter = "num-prompts"
    sizes = {counter: requests, "random-input-len": prompt, "random-output-len": output}
    name, private = f"random {prompt}+{output}", prompt + output
    return Workload(
        name, "random-ids", sizes, counter, requests, 0, 0, private, None, as_text=False
    )
