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
        private: tokens of question and output.
    """

    name: str
    arguments: list[str]
    requests: int
    groups: int
    shared: int
    private: int

    def pool_for(self, concurrency: int) -> int:
        """KV slots in which `concurrency` such requests fit to the last token."""
        return self.groups * self.shared + concurrency * self.private


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
    private = _JOINT + question + output
    return Workload(name, arguments, groups * per_group, groups, system, private)


def reasoning(requests: int, system: int, question: int, output: int) -> Workload:
    """Long outputs behind one system prompt."""
    name = f"{REASONING} {system}+{output}"
    return shared_prefix(name, 1, requests, system, question, output)


def random_lengths(requests: int, prompt: int, output: int) -> Workload:
    """The client's random workload: nothing shared, lengths up to `prompt` and `output` tokens."""
    arguments = ["--dataset-name", "random-ids", "--num-prompts", str(requests)]
    arguments += ["--random-input-len", str(prompt), "--random-output-len", str(output)]
    arguments += ["--tokenize-prompt"]
    return Workload(f"random {prompt}+{output}", arguments, requests, 0, 0, prompt + output)
