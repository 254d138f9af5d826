"""The agents' tools: what the model is told of them, which calls its grammar allows, what they do.

Every argument is bounded, so that a model of random weights ends its calls too.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from datetime import date, timedelta
from typing import Any

Schema = dict[str, Any]
OPERATIONS = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}
LONGEST_CALL = 160
"""Tokens; a call ends before that in any tokenizer."""


def calculate(operation: str, a: int, b: int) -> dict[str, Any]:
    """Adds, subtracts or multiplies two integers."""
    return {"result": OPERATIONS[operation](a, b)}


def count_text(text: str) -> dict[str, Any]:
    """Counts characters, words and different letters."""
    letters = len(set(text) - {" "})
    return {"characters": len(text), "words": len(text.split()), "letters": letters}


def shift_date(month: int, days: int) -> dict[str, Any]:
    """The date that lies some days after the first day of a month of 2026, with its weekday."""
    day = date(2026, month, 1) + timedelta(days)
    return {"date": day.isoformat(), "weekday": day.strftime("%A")}


def _integer(smallest: int, largest: int) -> Schema:
    return {"type": "integer", "minimum": smallest, "maximum": largest}


def _call(tool: Callable[..., Any], **arguments: Schema) -> Schema:
    """JSON schema of the calls of a tool, from those of its arguments."""

    def closed(**properties: Schema) -> Schema:
        required = list(properties)
        fields = {"properties": properties, "required": required, "additionalProperties": False}
        return {"type": "object", **fields}

    return closed(name={"const": tool.__name__}, arguments=closed(**arguments))


NUMBER = _integer(0, 9999)
# Letters: neither escapes nor the text of special tokens, which tokenizers read in two ways.
TEXT = {"type": "string", "pattern": "^[a-z ]{1,24}$"}
TOOLS: dict[Callable[..., Any], Schema] = {
    calculate: _call(calculate, operation={"enum": list(OPERATIONS)}, a=NUMBER, b=NUMBER),
    count_text: _call(count_text, text=TEXT),
    shift_date: _call(shift_date, month=_integer(1, 12), days=_integer(0, 999)),
}
"""Each with the JSON schema of its calls."""
CALL_SCHEMA = {"anyOf": list(TOOLS.values())}


def execute(call: str) -> str:
    """Run one call, as the model wrote it; returns the result as JSON.

    Raises:
        ValueError: the call is no JSON, or names no tool.
    """
    request = json.loads(call)
    (tool,) = (tool for tool in TOOLS if tool.__name__ == request["name"])
    return json.dumps(tool(**request["arguments"]))
