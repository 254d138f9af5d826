"""Parts of the exact check of a server: `python -m bench.accuracy.exact`."""
