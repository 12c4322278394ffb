"""The Jetson room, installed as `flashhead_edge.jetson`: the runtime that needs no torch.

Empty in this version. What it will hold, and what it may import, is in docs/architecture.md.
"""
