"""Benchmarks: one script an operation, and one for the whole step. ``python -m benchmarks --help`` lists them."""
