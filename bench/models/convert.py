"""A GGUF file as a folder that SGLang and transformers load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

# By the name that the file gives; transformers reads all of them like GPT-2's.
_PRE_TOKENIZERS = {
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
}


def convert(gguf: Path, out: Path, dtype: torch.dtype) -> None:
    """Write weights in `dtype`, tokenizer and chat template of `gguf` into `out`."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    model.to(dtype).save_pretrained(out)
    read_tokenizer(gguf).save_pretrained(out)


def read_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as the model's makers have it.

    transformers leaves out of a GGUF file which tokens are added ones, takes another token for the
    end of text than the file names, and knows not all ways to split text.
    """
    fields = _fields(gguf)
    tokens: list[str] = fields["tokens"]
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    kinds = zip(tokens, fields["token_type"], strict=True)
    added = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            AddedToken(token, special=added[TokenType(kind)], normalized=False)
            for token, kind in kinds
            if kind in added
        ]
    )
    tokenizer.eos_token = tokens[fields["eos_token_id"]]
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    if fields["pre"] in _PRE_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = _PRE_TOKENIZERS[fields["pre"]]
    return tokenizer


def _fields(gguf: Path) -> dict[str, Any]:
    """What the file says of its tokenizer."""
    prefix = "tokenizer.ggml."
    return {
        name.removeprefix(prefix): field.contents()
        for name, field in GGUFReader(gguf).fields.items()
        if name.startswith(prefix)
    }
