"""A model's own answers, as text with the marks of its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPERATURE = 0.7
BATCH = 20
"""Questions that are answered together."""


class Speaker:
    """Answers questions with a chat model, in float32 on the CPU."""

    def __init__(self, model_dir: Path) -> None:
        """Load it; raises ValueError where its tokenizer has no chat template."""
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{model_dir}: no chat template")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    def conversations(
        self, questions: Sequence[str], seed: int, most: int, least: int = 0
    ) -> list[str]:
        """One text a question: template, question, answer of at least and at most so many tokens.

        Sampled at TEMPERATURE from the whole vocabulary.
        """
        torch.manual_seed(seed)
        found: list[str] = []
        for begin in range(0, len(questions), BATCH):
            found += self._batch(questions[begin : begin + BATCH], most, least)
        return found

    def count(self, texts: Sequence[str]) -> int:
        """Their tokens."""
        return sum(len(self.tokenizer.encode(text)) for text in texts)

    @torch.inference_mode()
    def _batch(self, questions: Sequence[str], most: int, least: int) -> list[str]:
        prompts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
            for question in questions
        ]
        read = self.tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")
        written = self.model.generate(
            **read,
            do_sample=True,
            temperature=TEMPERATURE,
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
            max_new_tokens=most,
            min_new_tokens=least,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        answers = written[:, read["input_ids"].shape[1] :].tolist()
        return [
            prompt + self.tokenizer.decode(self._ended(answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _ended(self, answer: list[int]) -> list[int]:
        """Up to its end mark, which stays."""
        end = self.tokenizer.eos_token_id
        return answer[: answer.index(end) + 1] if end in answer else answer
