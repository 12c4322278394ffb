"""The export room, installed as `flashhead_edge.export`: a head and its decoder as ONNX graphs. See docs/onnx.md."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashhead_edge.export.onnx import Exported, export_onnx

_HOME = {"Exported": "onnx", "export_onnx": "onnx"}
__all__ = ["Exported", "export_onnx"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
