"""The tasks: questions whose chains of thought need values that were written long before.

Every question has exactly one right chain, so an answer is right if and only if its chain is the
reference, token for token; `depth` says how long it gets. Arithmetic is modulo 10.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from .names import NAMES

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: (a + b) % 10,
    "-": lambda a, b: (a - b) % 10,
}
REGISTERS = 12


@dataclass(frozen=True)
class Example:
    """A question, the chain of thought that solves it, and the answer."""

    question: str
    chain: str
    answer: str


def tree(rng: random.Random, depth: int) -> Example:
    """Recursive evaluation, depth first, with backtracking.

    `depth` operators are nested: while the deepest is evaluated, the value of each one's other
    operand, itself a small expression, is pending. Chain: about 35 tokens a level.
    """
    names = iter(rng.sample(NAMES, len(NAMES)))
    definitions: list[str] = []
    chain: list[str] = []

    def leaf() -> tuple[str, int, list[str]]:
        name, value = next(names), rng.randrange(10)
        definitions.append(f"{name}{value}")
        return name, value, [f"{name}{value}"]

    def inner(left: int, right: int, nested: int) -> tuple[str, int, list[str]]:
        """An operator; `nested` levels are below it on one side, `left` or `right` leaves else."""
        name, sign = next(names), rng.choice("+-")
        deep_left = nested > 0 and rng.random() < 0.2
        first, a, lines_a = below(left, nested if deep_left else 0)
        second, b, lines_b = below(right, 0 if deep_left else nested)
        value = OPERATIONS[sign](a, b)
        definition = f"{name}={first}{sign}{second}"
        definitions.append(definition)
        close = f"{first}{a}{sign}{second}{b}={name}{value}"
        return name, value, [definition, *lines_a, *lines_b, close]

    def below(leaves: int, nested: int) -> tuple[str, int, list[str]]:
        if nested:
            return inner(rng.choice((1, 2, 2, 3)), 2, nested - 1)
        if leaves == 1:
            return leaf()
        return inner(leaves - 1, 1, 0) if rng.random() < 0.5 else inner(1, leaves - 1, 0)

    root, value, chain = below(0, depth)
    rng.shuffle(definitions)
    return Example(_lines(f"Evaluate {root}.", definitions), _chain(chain), f"{root}{value}")


def registers(rng: random.Random, depth: int) -> Example:
    """A program of `depth` steps over registers that carry values from step to step.

    Chain: 12 tokens a step.
    """
    names = rng.sample(NAMES, REGISTERS + depth)
    held, labels = names[:REGISTERS], names[REGISTERS:]
    values = {name: rng.randrange(10) for name in held}
    program = [f"{name}{value}" for name, value in values.items()]
    chain = []
    for label in labels:
        target, sign = rng.choice(held), rng.choice("+-")
        first, second = rng.sample(held, 2)
        a, b = values[first], values[second]
        values[target] = OPERATIONS[sign](a, b)
        program.append(f"{label}:{target}={first}{sign}{second}")
        chain.append(f"{label}:{first}{a}{sign}{second}{b}={target}{values[target]}")
    asked = rng.choice(held)
    answer = f"{asked}{values[asked]}"
    return Example(_lines(f"Run, print {asked}.", program), _chain(chain), answer)


def variables(rng: random.Random, depth: int) -> Example:
    """Variables that copy one another among distractors, `depth` statements in all.

    Chain: about 8 tokens a statement.
    """
    names = iter(rng.sample(NAMES, 2 * depth))
    values: dict[str, int] = {}
    program, chain = [], []
    for number in range(depth):
        label, kind = next(names), rng.random()
        if kind < 0.15 or number == 0:
            name, value = next(names), rng.randrange(10)
            statement = thought = f"{label}:{name}{value}"
        elif kind < 0.65:
            source, name = rng.choice(list(values)), next(names)
            value = values[source]
            statement, thought = (
                f"{label}:{name}={source}",
                f"{label}:{source}{value}={name}{value}",
            )
        else:
            word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8)))
            statement = thought = f"{label}#{word}"
            name = ""
        if name:
            values[name] = value
        program.append(statement)
        chain.append(thought)
    asked = rng.choice(list(values))
    question = _lines(f"Trace, print {asked}.", program)
    return Example(question, _chain(chain), f"{asked}{values[asked]}")


def _lines(header: str, lines: list[str]) -> str:
    return "\n".join([header, *lines])


def _chain(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


TASKS: dict[str, Callable[[random.Random, int], Example]] = {
    "tree": tree,
    "registers": registers,
    "variables": variables,
}


def example(task: str, depth: int, seed: int) -> Example:
    """Instance `seed` of a task; the same on every machine."""
    return TASKS[task](random.Random(f"{task} {depth} {seed}"), depth)
