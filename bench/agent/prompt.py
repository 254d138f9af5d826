"""What the agents send: the system prompt they share, their task, and the text between answers.

All of it is text that `template.jinja` makes of messages, so that a client that counts tokens and
one that sends messages hold the same conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jinja2

from bench.agent.tools import TOOLS

TEMPLATE = Path(__file__).with_name("template.jinja")
THINK_END = "\n</think>\n"
TASK = "Find out on which weekday each instalment of a loan falls due, and what remains."
_INTRODUCTION = (
    "You are an agent that works with tools. Think first, at length, and write down every "
    "intermediate result. Then call exactly one tool: answer with one JSON object and nothing "
    "else. Its result comes back as a message of the role tool. The tools are:\n"
)
_RULE = "Before you call {tool}, say what you expect of it, and compare the result with that."


def system_prompt(count_tokens: Callable[[str], int], least: int) -> str:
    """Tool descriptions, then as many working rules as make `least` tokens."""
    text, number = _INTRODUCTION, 0
    for tool, schema in TOOLS.items():
        text += f"\n{tool.__name__}: {tool.__doc__}\n{json.dumps(schema, separators=(',', ':'))}\n"
    names = [tool.__name__ for tool in TOOLS]
    text += "\nRules:\n"
    while count_tokens(text) < least:
        number += 1
        text += f"{number}. {_RULE.format(tool=names[number % len(names)])}\n"
    return text


def messages(system: str, agent: int) -> list[dict[str, str]]:
    """The beginning of a conversation; the tasks of few agents differ from the first character."""
    user = {"role": "user", "content": f"{agent}. {TASK}"}
    return [{"role": "system", "content": system}, user]


def rendered(history: list[dict[str, str]]) -> str:
    """The text of a conversation, up to where the model begins to think."""
    template = jinja2.Template(TEMPLATE.read_text())
    return template.render(messages=history, add_generation_prompt=True)


def after_call(result: str) -> str:
    """From the end of a tool call to where the model thinks again."""
    return "<|im_end|>\n" + rendered([{"role": "tool", "content": result}])
