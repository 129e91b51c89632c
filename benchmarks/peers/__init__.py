"""sparsegan beside what a user would run instead: `make bench-peers`, or `python -m benchmarks.peers`."""
