"""Benchmarks: every number is checked against the fp64 reference before it is timed."""
