"""Prompts: questions of the reference model's tasks, whose answers need what is far back."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from bench.accuracy.reference_model.tasks import example

# Chains of 200 to 270 tokens, at depths that the reference model solves without eviction.
DEPTHS = {"registers": 20, "tree": 8, "variables": 26}
MARK = "</think>"
_FIRST_SEED = 7000


class Questions:
    """For the model in the folder `model`, by its own tokenizer.

    Attributes:
        think_end: token ids that end its thinking; empty where its chat template knows none.
    """

    def __init__(self, model: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        marked = MARK in str(self._tokenizer.chat_template)
        self.think_end: list[int] = self._encode(MARK) if marked else []

    def __call__(self, number: int, further: bool = False) -> list[int]:
        """Token ids of question `number`; `further`: of one that follows an answer."""
        task = list(DEPTHS)[number % len(DEPTHS)]
        question = example(task, DEPTHS[task], _FIRST_SEED + number).question
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n"
        return self._encode(f"\n{text}" if further else text)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids
