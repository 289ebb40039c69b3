"""Measured side by side, contestants alternating in one run; `python -m benchmarks --help`."""
