"""Workloads, as arguments of SGLang's own client (`python -m sglang.benchmark.serving`)."""

from __future__ import annotations

from dataclasses import dataclass

REASONING = "reasoning"
_JOINT = 2  # Tokens that the client writes between system prompt and question.


@dataclass(frozen=True)
class Workload:
    """What is sent to a server, all at once.

    Attributes:
        arguments: for the client.
        requests: how many.
        groups: system prompts, each shared by as many requests; 0 if nothing is shared.
        shared: tokens of a system prompt.
        private: tokens of question and output, at the most.
        output: tokens of all outputs together; None if they are drawn.
        as_text: whether prompts are sent as text; else as ids of the model's vocabulary.
    """

    name: str
    arguments: list[str]
    requests: int
    groups: int
    shared: int
    private: int
    output: int | None
    as_text: bool = True

    def pool_for(self, concurrency: int) -> int:
        """KV slots in which `concurrency` such requests fit to the last token."""
        return self.groups * self.shared + concurrency * self.private

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
    sizes = {
        "num-groups": groups,
        "prompts-per-group": per_group,
        "system-prompt-len": system,
        "question-len": question,
        "output-len": output,
    }
    arguments = ["--dataset-name", "generated-shared-prefix"]
    for flag, size in sizes.items():
        arguments += [f"--gsp-{flag}", str(size)]
    requests, private = groups * per_group, _JOINT + question + output
    return Workload(name, arguments, requests, groups, system, private, requests * output)


def reasoning(requests: int, system: int, question: int, output: int) -> Workload:
    """Long outputs behind one system prompt."""
    name = f"{REASONING} {system}+{output}"
    return shared_prefix(name, 1, requests, system, question, output)


def random_lengths(requests: int, prompt: int, output: int) -> Workload:
    """The client's random workload, lengths up to `prompt` and `output` tokens.

    Its prompts count up through the vocabulary from random starts: in a small one some coincide.
    """
    arguments = ["--dataset-name", "random-ids", "--num-prompts", str(requests)]
    arguments += ["--random-input-len", str(prompt), "--random-output-len", str(output)]
    arguments += ["--tokenize-prompt"]
    name, private = f"random {prompt}+{output}", prompt + output
    return Workload(name, arguments, requests, 0, 0, private, None, as_text=False)
