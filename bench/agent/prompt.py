"""What the agents send: the system prompt they share, their tasks, and the text between answers.

The text is what `template.jinja` makes of the same messages, so that a client that counts
tokens and one that sends messages hold the same conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from bench.agent.tools import TOOLS

TEMPLATE = Path(__file__).with_name("template.jinja")
TURN_END = "<|im_end|>\n"
ANSWER_START = "<|im_start|>assistant\n<think>\n"
THINK_END = "\n</think>\n"
TASKS = (
    "Plan a week of training for a mountain tour and keep the numbers in the notebook.",
    "Find out on which weekday each instalment of a loan falls due, and what remains.",
    "Sort the measurements of the day, and say which of them cannot be right.",
    "Compare the wording of three answers and count what they have in common.",
)
_INTRODUCTION = (
    "You are an agent that works with tools. Think first, at length, and write down every "
    "intermediate result. Then call exactly one tool: answer with one JSON object and nothing "
    "else. Its result comes back as a message of the role tool. The tools are:\n"
)
_RULES = (
    "Before you call {tool}, say what you expect of it, and compare the result with that.",
    "Never call {tool} twice with the same arguments; its earlier result still stands above.",
    "If {tool} returns something that surprises you, doubt your own steps before its result.",
)


def system_prompt(count_tokens: Callable[[str], int], least: int) -> str:
    """Tool descriptions, then as many working rules as make `least` tokens."""
    text = _INTRODUCTION
    for tool in TOOLS:
        text += f"\n{tool.name}: {tool.description}\n{_json(tool.call_schema)}\n"
    text += "\nRules:\n"
    number = 0
    while count_tokens(text) < least:
        number += 1
        rule = _RULES[number % len(_RULES)].format(tool=TOOLS[number % len(TOOLS)].name)
        text += f"{number}. {rule}\n"
    return text


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def task(agent: int) -> str:
    """A task of its own for each agent; tasks of few agents differ from the first character on."""
    return f"{agent}. {TASKS[agent % len(TASKS)]}"


def messages(system: str, agent: int) -> list[dict[str, str]]:
    """The beginning of an agent's conversation, as chat messages."""
    return [{"role": "system", "content": system}, {"role": "user", "content": task(agent)}]


def opening(system: str, agent: int) -> str:
    """The same as text, up to where the model begins to think."""
    return (
        f"<|im_start|>system\n{system}{TURN_END}"
        f"<|im_start|>user\n{task(agent)}{TURN_END}{ANSWER_START}"
    )


def after_call(result: str) -> str:
    """From the end of a tool call to where the model thinks again."""
    return f"{TURN_END}<|im_start|>tool\n{result}{TURN_END}{ANSWER_START}"
