"""What a file of weights is known by: a hash of its header, which plugins in C++ make too. Standard library only."""

from __future__ import annotations


def fnv1a(data: bytes) -> str:
    """FNV-1a of 64 bits, as 16 lower-case hex digits."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"
