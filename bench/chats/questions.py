"""What is asked.

A model may write an invented name in other tokens than its tokenizer makes of the text, and then
the history that is sent back is not found. So these ask for texts with few of them.
"""

from __future__ import annotations

QUESTIONS = (
    "Tell a very long story about two brothers who cross a desert to find a lost city.",
    "Write a long essay about the advantages and disadvantages of electric cars.",
    "Explain in great detail, in ten steps, how to plan and plant a vegetable garden.",
    "Write a long essay about how the steam engine changed work, travel and cities.",
    "Write a long essay about the Roman Empire, from its beginning to its end.",
    "Write a long essay about why it is worth reading books.",
    "Write a long essay about the history of the printing press.",
    "Write a long article about the life of bees.",
)
FOLLOW_UP = "Sum up what you have written in one sentence."
