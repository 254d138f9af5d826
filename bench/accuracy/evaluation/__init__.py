"""Accuracy of eviction policies on the reference model's tasks."""
