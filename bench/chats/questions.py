"""What is asked: texts that a small model has much to say about."""

from __future__ import annotations

QUESTIONS = (
    "Write a long essay about the advantages and disadvantages of electric cars.",
    "Explain in great detail, in ten steps, how to plan and plant a vegetable garden.",
    "Write a long essay about how the steam engine changed work, travel and cities.",
    "Write a long essay about why sleep is important for body and mind.",
    "Write a long essay about why it is worth reading books.",
    "Write a long article about the life of bees.",
)
FOLLOW_UP = "Sum up what you have written in one sentence."
