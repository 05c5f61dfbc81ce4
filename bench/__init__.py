"""Benchmarks: `make bench`, or `pytest bench --benchmark-only`."""
