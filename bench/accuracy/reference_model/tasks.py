"""The tasks: questions whose chains of thought need values that were written long before.

Every question has exactly one right chain, so an answer is right if and only if its chain is the
reference, token for token; `depth` says how long it gets. Arithmetic is modulo 10.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from .names import NAMES

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: (a + b) % 10,
    "-": lambda a, b: (a - b) % 10,
}
WORDS = ("apple", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor", "ink")
"""What distractors say."""
HELD_AT_FIRST = 12
"""Registers that a program begins with, at most; few steps have fewer."""
Side = Callable[[], tuple[str, int, list[str]]]
"""Makes an operand: its name, its value and the lines of its evaluation."""


@dataclass(frozen=True)
class Example:
    """A question, the chain of thought that solves it, and the answer."""

    question: str
    chain: str
    answer: str


def tree(rng: random.Random, depth: int) -> Example:
    """Recursive evaluation, depth first, with backtracking.

    `depth` operators are nested: while the deepest is evaluated, the values of the others' other
    operands, each a small expression, are pending. Chain: about 34 tokens a level. A definition is
    its name and what it stands for, a digit or two names and a sign: what is looked up by a name
    is the token behind it, which small models learn soonest.
    """
    names = iter(rng.sample(NAMES, len(NAMES)))
    definitions: list[str] = []
    chain: list[str] = []

    def leaf() -> tuple[str, int, list[str]]:
        name, value = next(names), rng.randrange(10)
        definitions.append(f"{name}{value}")
        return name, value, [f"{name}{value}"]

    def inner(left: Side, right: Side) -> tuple[str, int, list[str]]:
        name, sign = next(names), rng.choice("+-")
        first, a, lines_a = left()
        second, b, lines_b = right()
        value = OPERATIONS[sign](a, b)
        definition = f"{name}{first}{sign}{second}"
        definitions.append(definition)
        close = f"{first}{a}{sign}{second}{b}={name}{value}"
        return name, value, [definition, *lines_a, *lines_b, close]

    def small(leaves: int) -> tuple[str, int, list[str]]:
        if leaves == 1:
            return leaf()
        sides: list[Side] = [partial(small, leaves - 1), leaf]
        rng.shuffle(sides)
        return inner(*sides)

    def nested(levels: int) -> tuple[str, int, list[str]]:
        if levels == 1:
            return inner(leaf, leaf)
        sides: list[Side] = [partial(small, rng.choice((1, 2, 2, 3))), partial(nested, levels - 1)]
        # Mostly the small one is evaluated first, and its value pending.
        return inner(*(sides if rng.random() < 0.8 else reversed(sides)))

    root, value, chain = nested(depth)
    rng.shuffle(definitions)
    return Example(_lines(f"Evaluate {root}.", definitions), _chain(chain), f"{root}{value}")


def registers(rng: random.Random, depth: int) -> Example:
    """A straight-line program of `depth` steps; each writes a register of its own, once.

    Operands are drawn among all that are held, however long ago they were written. Chain: 12
    tokens a step.
    """
    return programs(rng, [depth])[0]


def programs(rng: random.Random, depths: Sequence[int]) -> list[Example]:
    """A chat: each question's program goes on with the registers of those before."""
    count = min(HELD_AT_FIRST, depths[0] + 2)
    names = iter(rng.sample(NAMES, count + 2 * sum(depths)))
    values = {next(names): rng.randrange(10) for _ in range(count)}
    program = [f"{name}{value}" for name, value in values.items()]
    turns = []
    for depth in depths:
        chain = []
        for _ in range(depth):
            label, target, sign = next(names), next(names), rng.choice("+-")
            first, second = rng.sample(list(values), 2)
            a, b = values[first], values[second]
            values[target] = OPERATIONS[sign](a, b)
            program.append(f"{label}:{target}={first}{sign}{second}")
            chain.append(f"{label}:{first}{a}{sign}{second}{b}={target}{values[target]}")
        asked = rng.choice(list(values))
        question = _lines(f"Run, print {asked}.", program)
        turns.append(Example(question, _chain(chain), f"{asked}{values[asked]}"))
        program = []
    return turns


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
            statement = thought = f"{label}#{rng.choice(WORDS)}"
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


def chat(depths: Sequence[int], seed: int) -> list[Example]:
    """Programs that go on with each other's registers, instance `seed`."""
    return programs(random.Random(f"chat {depths} {seed}"), depths)


def example(task: str, depth: int, seed: int) -> Example:
    """Instance `seed` of a task; the same on every machine."""
    return TASKS[task](random.Random(f"{task} {depth} {seed}"), depth)
