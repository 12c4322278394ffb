"""TensorRT: the decoder in plugin nodes and the builder of engines, over the nodes and the file of weights of `program`. See docs/tensorrt.md.

`lowering` needs onnx-ir, `graph` the onnx package; `builder`, `versions` and `manifest` need no package beside TensorRT, since
engines are built on boards where no exporter is installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashhead_edge.export.tensorrt.engines import build_engines
    from flashhead_edge.export.tensorrt.export import ExportedTensorRT, export_tensorrt

_HOME = {"ExportedTensorRT": "export", "export_tensorrt": "export", "build_engines": "engines"}
__all__ = ["ExportedTensorRT", "build_engines", "export_tensorrt"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
