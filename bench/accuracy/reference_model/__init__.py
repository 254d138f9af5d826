"""A small reasoning model of our own: its tasks, its tokenizer, its training and its evaluation."""

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"
FOLDER = _WEIGHTS / "concentrated"
"""The trained model, in the Hugging Face layout, with its query statistics."""
DIFFUSE = _WEIGHTS / "diffuse"
"""The one that it was trained on from, whose queries lie less close to their means."""
LONG = _WEIGHTS / "long"
"""FOLDER's, trained on for chains of more than 500 tokens."""
