"""Everything that a GPU is needed for, in one command: see docs/benchmarks.md."""
