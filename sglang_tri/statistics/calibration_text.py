"""What a model reads while its queries are measured."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from sglang_tri.errors import KvPolicyError

LONGEST = 2048
"""Tokens of a sequence, at most: of longer ones attention takes most of the time, on a CPU."""

# Tokenizers in use make more tokens of ordinary text: a long one need not be read to its end.
_CHARACTERS_PER_TOKEN = 8
# In ordinary text hardly any stretch of this many tokens occurs twice, in repeated lines all do.
_WINDOW = 8
_LEAST_DISTINCT = 0.25


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    bos_token_id: int | None

    def encode(
        self, text: str, *, add_special_tokens: bool = True, verbose: bool = True
    ) -> list[int]: ...


@dataclass(frozen=True)
class Sequences:
    """Calibration text as a model reads it.

    Attributes:
        ids: token ids of sequences that do not see each other, all but the last equally long.
        sha256: of the ids and where they are split.
    """

    ids: tuple[tuple[int, ...], ...]
    sha256: str

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


@dataclass(frozen=True)
class Source:
    """Where a text comes from.

    Attributes:
        path: a file in UTF-8, or None for the default: Python's own reference, prose and code.
        flag: the option that named it, for messages.
        tokens_flag: the option that says how many tokens of it are taken.
    """

    path: str | None
    flag: str = "--kv-calibration-text"
    tokens_flag: str = "--kv-calibration-tokens"

    def __str__(self) -> str:
        return "the default text" if self.path is None else f"{self.flag} {self.path}"

    def read(self) -> str:
        """The text.

        Raises:
            KvPolicyError: the file cannot be read as UTF-8 text.
        """
        if self.path is None:
            from pydoc_data.topics import topics

            return "\n\n".join(topics[name] for name in sorted(topics))
        try:
            return Path(self.path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise KvPolicyError(
                f"{self} cannot be read ({error}): give a text file in UTF-8."
            ) from error


def tokenize(source: Source, tokenizer: Tokenizer, tokens: int, length: int) -> Sequences:
    """The beginning of a text as sequences of at most `length` tokens, `tokens` in all.

    Each begins with the tokenizer's BOS token where the tokenizer begins texts with one.

    Raises:
        KvPolicyError: the text cannot be read, is too short, or repeats itself.
    """
    start, text = _start(tokenizer), source.read()
    ids = _encode(tokenizer, text[: tokens * _CHARACTERS_PER_TOKEN])
    if len(ids) < tokens:
        ids = _encode(tokenizer, text)
    body = length - len(start)
    pieces = [ids[begin : begin + body] for begin in range(0, len(ids), body)]
    sequences, missing = [], tokens
    for piece in pieces:
        sequence = tuple([*start, *piece][:missing])
        missing -= len(sequence)
        if len(sequence) > len(start):
            sequences.append(sequence)
    if missing:
        raise KvPolicyError(
            f"{source} has {tokens - missing} tokens, less than {source.tokens_flag} {tokens}: "
            "give a longer text or a smaller number."
        )
    _check_variety(ids[:tokens], source)
    return Sequences(tuple(sequences), _sha256(sequences))


def _start(tokenizer: Tokenizer) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("")[:1] == [bos] else []


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    # Not verbose: tokenizers warn of texts that are longer than the model's context.
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def _check_variety(ids: Sequence[int], source: Source) -> None:
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(ids), _WINDOW)
    distinct = len(np.unique(windows, axis=0)) / len(windows)
    if distinct < _LEAST_DISTINCT:
        raise KvPolicyError(
            f"{source} repeats itself: only {distinct:.0%} of its stretches of {_WINDOW} tokens "
            "are distinct. Statistics of it would describe that text, not the model: give "
            "ordinary text or code."
        )


def _sha256(sequences: Sequence[Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(np.array([len(sequence), *sequence], dtype="<i8").tobytes())
    return digest.hexdigest()
