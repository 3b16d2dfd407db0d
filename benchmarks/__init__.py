"""Benchmarks and the scripts behind the numbers in the docs."""
