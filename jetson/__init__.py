"""The Jetson room, installed as `flashhead_edge.jetson`: text from a folder that `flashhead export` wrote, without torch and transformers.

`open_engine` gives an engine for the loop in `flashhead_edge.generation`. What computes is a backend (`backend.py`); `onnxruntime` on a
CPU, `tensorrt` on an NVIDIA GPU. Names are looked up when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashhead_edge.jetson.backend import Backend
    from flashhead_edge.jetson.engine import ExportedEngine, open_engine
    from flashhead_edge.jetson.folder import ExportSettings, is_exported
    from flashhead_edge.jetson.onnxruntime_backend import OnnxHead, OnnxRuntime
    from flashhead_edge.jetson.tensorrt_backend import TensorRT
    from flashhead_edge.jetson.tensorrt_folder import is_tensorrt
    from flashhead_edge.jetson.tokenizer import ChatTokenizer

_HOME = {
    "Backend": "backend",
    "ExportedEngine": "engine",
    "open_engine": "engine",
    "ExportSettings": "folder",
    "is_exported": "folder",
    "OnnxHead": "onnxruntime_backend",
    "OnnxRuntime": "onnxruntime_backend",
    "TensorRT": "tensorrt_backend",
    "is_tensorrt": "tensorrt_folder",
    "ChatTokenizer": "tokenizer",
}

__all__ = ["Backend", "ChatTokenizer", "ExportSettings", "ExportedEngine", "OnnxHead", "OnnxRuntime", "TensorRT", "is_exported", "is_tensorrt", "open_engine"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
