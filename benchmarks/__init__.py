"""Measurements whose results stand in `benchmarks/results/`."""
