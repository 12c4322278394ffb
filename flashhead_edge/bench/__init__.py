"""The measured comparisons: one module a command, `python -m flashhead_edge.bench.NAME --help`."""
