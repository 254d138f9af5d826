"""The reference model's tokenizer: bytes, specials with `<think>`, and a token for every name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.models.tokenizer import BYTES, byte_characters, write_bpe

from .names import LETTERS
from .tasks import Example

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
PAD, START, END, THINK, STOP_THINKING = range(BYTES, BYTES + len(SPECIALS))
FIRST_LETTER = BYTES + len(SPECIALS)
VOCABULARY = -(-(FIRST_LETTER + len(LETTERS)) // 8) * 8

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m.get('reasoning_content') %}"
    "<think>\n{{ m['reasoning_content'].strip('\n') }}\n</think>\n{% endif %}"
    "{{ m['content'].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)

_LETTER_IDS = {letter: FIRST_LETTER + number for number, letter in enumerate(LETTERS)}


def write_tokenizer(path: Path) -> None:
    """Write it into the folder `path`, in the Hugging Face layout."""
    characters = byte_characters()
    vocab = {character: byte for byte, character in enumerate(characters)}
    vocab |= {special: BYTES + number for number, special in enumerate(SPECIALS)}
    merges = []
    for letter, token in _LETTER_IDS.items():
        first, second = (characters[byte] for byte in letter.encode())
        vocab[first + second] = token
        merges.append((first, second))
    write_bpe(path, vocab, SPECIALS, merges, CHAT_TEMPLATE)


def encode(text: str) -> list[int]:
    """Token ids of a text without specials; what the written tokenizer makes of it."""
    ids: list[int] = []
    for character in text:
        known = _LETTER_IDS.get(character)
        ids += character.encode() if known is None else [known]
    return ids


def prompt_ids(question: str) -> list[int]:
    """The chat template around a question, up to and with `<think>` and its line end."""
    opening = [START, *encode("user\n"), *encode(question), END, *encode("\n")]
    return [*opening, START, *encode("assistant\n"), THINK, *encode("\n")]


def chat_ids(turns: Sequence[Example]) -> tuple[list[int], list[bool]]:
    """Questions with their outputs, one after the other; and which tokens are output."""
    ids: list[int] = []
    written: list[bool] = []
    for turn in turns:
        prompt = [*(encode("\n") if ids else []), *prompt_ids(turn.question)]
        output = output_ids(turn)
        ids += [*prompt, *output]
        written += [False] * len(prompt) + [True] * len(output)
    return ids, written


def output_ids(example: Example) -> list[int]:
    """Chain, `</think>`, answer and the end of the turn: what a right answer consists of."""
    answer = encode(f"\n{example.answer}")
    return [*encode(example.chain), STOP_THINKING, *answer, END]
