"""How many tokens of which text query statistics need: `python -m bench.accuracy.calibration`."""
