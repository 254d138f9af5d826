"""A small reasoning model of our own: its tasks, its tokenizer, its training and its evaluation."""

from pathlib import Path

FOLDER = Path(__file__).parent / "weights"
"""The trained model, in the Hugging Face layout, with its query statistics."""
