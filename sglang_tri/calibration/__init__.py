"""Statistics from a model's own queries: text, sums over tokens, and a cache of results."""
