"""python -m flashhead_edge: the command line."""

from flashhead_edge.cli import main

main()
