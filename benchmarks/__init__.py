"""Benchmarks: each file is run by itself; ``gpu`` is what a GPU is measured with."""
