"""Benchmarks: how to run them is in README.md; the code is in `kvstore/bench`."""
