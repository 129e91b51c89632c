"""Layers and whole models against torch, in turn: `python -m benchmarks`, which is pytest with pytest-benchmark."""
