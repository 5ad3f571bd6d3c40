"""Step time and memory against peers. See docs/benchmarks.md."""
