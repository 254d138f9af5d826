"""Byte-level tokenizers in the Hugging Face layout: one token a byte, specials after them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS = "<|im_end|>"
PRINTABLE = (*range(32, 127), ord("\n"))
BYTES = 256

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(path: Path, size: int = 0) -> None:
    """Write a tokenizer into the folder `path`, without merges.

    Args:
        size: of the vocabulary, if it is to be larger than bytes and specials: the rest are ids
            that no text is encoded with, but that are decoded to text.
    """
    vocab = {char: byte for byte, char in enumerate(byte_characters())}
    if size:
        vocab |= {text: special_id(text) for text in SPECIALS}
        vocab |= {f"_{token}": token for token in range(len(vocab), size)}
    write_bpe(path, vocab, SPECIALS)


def write_printable_tokenizer(path: Path) -> None:
    """One of printable ASCII only; its texts have as many tokens for the other."""
    characters = byte_characters()
    write_bpe(path, {characters[byte]: token for token, byte in enumerate(PRINTABLE)}, ())


def write_bpe(
    path: Path,
    vocab: dict[str, int],
    specials: tuple[str, ...],
    merges: Sequence[str] = (),
    template: str = CHAT_TEMPLATE,
) -> None:
    """Write a byte-level BPE tokenizer into the folder `path`; `specials` follow the 256 bytes."""
    path.mkdir(parents=True, exist_ok=True)
    added = [
        {
            "id": BYTES + number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            # Marks of reasoning stay in texts, where reasoning parsers look for them.
            "special": text not in ("<think>", "</think>"),
        }
        for number, text in enumerate(specials)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "trim_offsets": True},
        "post_processor": None,
        "decoder": {**byte_level, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": list(merges)},
    }
    write_json(path / "tokenizer.json", tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": template,
    }
    if specials:
        config |= {"eos_token": EOS, "pad_token": "<|endoftext|>"}
    write_json(path / "tokenizer_config.json", config)


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE vocabularies."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(BYTES) if byte not in visible]
    return [chr(b) if b in visible else chr(BYTES + hidden.index(b)) for b in range(BYTES)]


def special_id(text: str) -> int:
    return BYTES + SPECIALS.index(text)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
