"""One-letter names for nodes, registers, variables and labels: one token each."""

from __future__ import annotations

import string

GREEK = "αβγδεζηθικλμνξοπρστυφχψω"
CYRILLIC = "".join(chr(code) for code in range(0x410, 0x450))
LATIN = "".join(chr(code) for code in range(0xC0, 0x100) if chr(code).isalpha())
LETTERS = GREEK + CYRILLIC + LATIN
"""Letters of two bytes: the tokenizer merges them."""
NAMES = string.ascii_letters + LETTERS
