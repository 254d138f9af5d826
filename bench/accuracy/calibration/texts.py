"""Texts that statistics are measured with, and other texts that they are judged by."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.accuracy.calibration import questions
from bench.accuracy.calibration.sampling import BATCH, Speaker
from sglang_tri.statistics.calibration_text import Source

DEFAULT = "default"
"""The product's own calibration text, Python's language reference."""
LATER = "later"
"""The same reference from its middle on: another sample of the same kind of text."""
PROSE = "prose"
"""Newton's Opticks (1730), which a package that SGLang requires has among its test data."""
CHAT = "chat"
"""The model's own answers."""
LONG = "long"
"""An answer of the model that does not end."""

HALVES = ("first", "second")
"""A method is chosen on the first half of the judged texts, its figures come from the second."""
ANSWERS = tuple(f"{kind}-{half}" for kind in (CHAT, LONG) for half in HALVES)
"""Names of files with judged answers."""

_BOOK = "3rdparty/libbacktrace/Isaac.Newton-Opticks.txt"
_CODE = {"first": ("difflib", "argparse"), "second": ("tarfile", "ipaddress")}
_LICENCE = Path(__file__).parents[3] / "LICENSE"
# The prose that is measured with ends before a quarter of the book.
_PLACES = {"first": (0.45,), "second": (0.65, 0.85)}
_ANSWER = 400


@dataclass(frozen=True)
class Text:
    """A judged text.

    Attributes:
        kind: "code", "prose", "chat" or "long".
        half: one of HALVES.
        ids: its tokens.
    """

    name: str
    kind: str
    half: str
    ids: tuple[int, ...]


def find_prose() -> Path | None:
    """The book, where the package that has it is installed."""
    package = importlib.util.find_spec("tvm_ffi")
    places = (package.submodule_search_locations or ()) if package else ()
    return next((Path(p) / _BOOK for p in places if (Path(p) / _BOOK).exists()), None)


def write_texts(
    folder: Path, model_dir: Path, given: Mapping[str, Path], measured: int, judged: int
) -> None:
    """Make files NAME.txt to measure with, and those of answers to be judged.

    given: files to take instead, by name; measured, judged: tokens that are needed of answers.
    Files that are there stay.

    Raises:
        ValueError: there is no prose, or the model has no chat template.
    """
    for name, path in given.items():
        _write(folder, name, [path.read_text(encoding="utf-8")])
    if not (folder / f"{PROSE}.txt").exists():
        book = find_prose()
        if book is None:
            raise ValueError(f"no prose found: give --texts {PROSE}=FILE")
        _write(folder, PROSE, [book.read_text(encoding="utf-8")])
    reference = Source(None).read()
    _write(folder, LATER, [reference[len(reference) // 2 :]])
    if not all((folder / f"{name}.txt").exists() for name in (CHAT, *ANSWERS)):
        _write_answers(folder, Speaker(model_dir), measured, judged)


def _write_answers(folder: Path, speaker: Speaker, measured: int, judged: int) -> None:
    asked = [question for half in HALVES for question in questions.JUDGED[half]]
    answers = dict(zip(asked, speaker.conversations(asked, 1, _ANSWER), strict=True))
    long = [questions.LONG[half] for half in HALVES]
    # So long that all judged tokens behind the question are the model's.
    answers |= zip(long, speaker.conversations(long, 2, judged, judged), strict=True)
    for half in HALVES:
        _write(folder, f"{CHAT}-{half}", [answers[one] for one in questions.JUDGED[half]])
        _write(folder, f"{LONG}-{half}", [answers[questions.LONG[half]]])
    if (folder / f"{CHAT}.txt").exists():
        return
    found: list[str] = []
    seed = 3
    while speaker.count(found) < measured:
        begin = len(found) % len(questions.MEASURED)
        found += speaker.conversations(questions.MEASURED[begin : begin + BATCH], seed, _ANSWER)
        seed += 1
    _write(folder, CHAT, found)


def _write(folder: Path, name: str, texts: list[str]) -> None:
    (folder / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")


def judged_texts(folder: Path, tokenizer: Any, tokens: int) -> list[Text]:
    """The judged texts, `tokens` tokens of each, or as many as it has."""
    found = []
    for half in HALVES:
        for name, kind, content in _contents(folder, half):
            ids = tokenizer.encode(content[: tokens * 8], add_special_tokens=False)[:tokens]
            found.append(Text(name, kind, half, tuple(ids)))
    return found


def _contents(folder: Path, half: str) -> Iterator[tuple[str, str, str]]:
    """Name, kind and content of a half's texts."""
    for module in _CODE[half]:
        source = Path(str(importlib.import_module(module).__file__))
        yield f"{module}.py", "code", source.read_text(encoding="utf-8")
    book = (folder / f"{PROSE}.txt").read_text(encoding="utf-8")
    for place in _PLACES[half]:
        yield f"prose at {place:.0%}", "prose", book[int(place * len(book)) :]
    if half == HALVES[0]:
        yield "licence", "prose", _LICENCE.read_text(encoding="utf-8")
    for kind in (CHAT, LONG):
        yield f"{kind}, {half}", kind, (folder / f"{kind}-{half}.txt").read_text(encoding="utf-8")
