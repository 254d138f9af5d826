"""Byte-level tokenizers in the Hugging Face layout: one token a byte, specials after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

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
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
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
    vocab: Mapping[str, int],
    specials: Sequence[str],
    merges: Sequence[tuple[str, str]] = (),
    template: str = CHAT_TEMPLATE,
) -> None:
    """Write a byte-level BPE tokenizer into the folder `path`; `specials` follow the 256 bytes."""
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Marks of reasoning stay in texts, where reasoning parsers look for them.
    special = {text: text not in ("<think>", "</think>") for text in specials}
    tokenizer.add_tokens([AddedToken(t, special=s, normalized=False) for t, s in special.items()])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
        chat_template=template,
        **({"eos_token": EOS, "pad_token": "<|endoftext|>"} if specials else {}),
    ).save_pretrained(path)


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE vocabularies."""
    characters = bytes_to_unicode()
    return [characters[byte] for byte in range(BYTES)]


def special_id(text: str) -> int:
    return BYTES + SPECIALS.index(text)
