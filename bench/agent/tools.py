"""The agents' tools: what the model is told of them, which calls its grammar allows, what they do.

Every argument is bounded, so that a model of random weights ends its calls too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

Schema = dict[str, Any]
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
}


@dataclass(frozen=True)
class Tool:
    """A tool.

    Attributes:
        name: how a call names it; the `Toolbox` method of that name does the work.
        description: for the model.
        arguments: JSON schema of each argument; all are required.
    """

    name: str
    description: str
    arguments: dict[str, Schema]

    @property
    def call_schema(self) -> Schema:
        """JSON schema of a call."""
        arguments = _closed_object(self.arguments)
        return _closed_object({"name": {"const": self.name}, "arguments": arguments})


def _closed_object(properties: dict[str, Schema]) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _integer(smallest: int, largest: int) -> Schema:
    return {"type": "integer", "minimum": smallest, "maximum": largest}


def _text(longest: int) -> Schema:
    # Letters: neither escapes nor the text of special tokens, which tokenizers read in two ways.
    return {"type": "string", "pattern": f"^[a-z ]{{1,{longest}}}$"}


TOOLS = (
    Tool(
        "calculate",
        "Adds, subtracts or multiplies two integers.",
        {"operation": {"enum": list(OPERATIONS)}, "a": _integer(0, 9999), "b": _integer(0, 9999)},
    ),
    Tool("count_text", "Counts characters, words and different letters.", {"text": _text(24)}),
    Tool(
        "shift_date",
        "The date that lies some days after the first day of a month of 2026, with its weekday.",
        {"month": _integer(1, 12), "days": _integer(0, 999)},
    ),
    Tool(
        "take_note",
        "Writes a value into the notebook and returns the whole notebook.",
        {"key": _text(8), "value": _text(16)},
    ),
    Tool(
        "sort_numbers",
        "Sorts integers and returns them with their median.",
        {
            "numbers": {
                "type": "array",
                "items": _integer(0, 999),
                "minItems": 1,
                "maxItems": 6,
            }
        },
    ),
)
CALL_SCHEMA: Schema = {"anyOf": [tool.call_schema for tool in TOOLS]}


class Toolbox:
    """One agent's tools, with its notebook."""

    def __init__(self) -> None:
        self._notes: dict[str, str] = {}
        self._tools = {tool.name: getattr(self, tool.name) for tool in TOOLS}

    def execute(self, call: str) -> str:
        """Run one call, as the model wrote it; returns the result as JSON.

        Raises:
            ValueError: the call is no JSON.
            KeyError: there is no such tool.
        """
        request = json.loads(call)
        return json.dumps(self._tools[request["name"]](**request["arguments"]))

    def calculate(self, operation: str, a: int, b: int) -> dict[str, Any]:
        return {"result": OPERATIONS[operation](a, b)}

    def count_text(self, text: str) -> dict[str, Any]:
        letters = len(set(text) - {" "})
        return {"characters": len(text), "words": len(text.split()), "letters": letters}

    def shift_date(self, month: int, days: int) -> dict[str, Any]:
        day = date(2026, month, 1) + timedelta(days)
        return {"date": day.isoformat(), "weekday": day.strftime("%A")}

    def take_note(self, key: str, value: str) -> dict[str, Any]:
        self._notes[key] = value
        return {"notes": self._notes}

    def sort_numbers(self, numbers: list[int]) -> dict[str, Any]:
        ordered = sorted(numbers)
        return {"sorted": ordered, "median": ordered[len(ordered) // 2]}
