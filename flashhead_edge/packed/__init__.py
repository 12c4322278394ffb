"""The 4-bit formats that people have, read without torch and without the change of a bit (docs/checkpoints.md)."""

from flashhead_edge.packed.coded import Coded4, Coded8, dense, requantised
from flashhead_edge.packed.weights import Weights, open_weights

__all__ = ["Coded4", "Coded8", "Weights", "dense", "open_weights", "requantised"]
