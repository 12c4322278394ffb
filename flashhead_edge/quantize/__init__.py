"""A model's linear layers in 4 bits (W4A16): activation-aware scaling and clipping, layer by layer. See docs/quantize.md."""

from flashhead_edge.quantize.run import quantize

__all__ = ["quantize"]
