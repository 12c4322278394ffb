"""What is in an exported model, as JSON: its part, dialect, sizes, agreement, and what goes in and comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flashhead_edge.errors import CheckpointError
from flashhead_edge.jetson.folder import AGAIN, FORMAT, is_exported
from flashhead_edge.jetson.onnxruntime_sessions import NATIVE, native_library, open_model, vector_unit
from flashhead_edge.jetson.tensorrt_folder import is_tensorrt, read_manifest

WITHOUT_STEP = ("body", "body_native", "rescore")  # parts that make no step of the head


def describe_model(path: str | Path) -> dict[str, Any]:
    """Describe one .onnx file, every model of an exported folder, or what an export for TensorRT says of itself.

    Raises:
        CheckpointError: no file or folder of an export, or a damaged one.
        EngineError: ONNX Runtime is missing or too old for the model.
    """
    path = Path(path)
    if is_tensorrt(path):
        return {"folder": str(path), **read_manifest(path).document}
    if is_tensorrt(path.parent):
        raise CheckpointError(f"{path}: a model of an export for TensorRT, which ONNX Runtime does not read, expected the folder; inspect {path.parent}")
    if path.is_dir():
        if not is_exported(path):
            raise CheckpointError(f"{path}: no exported model, expected a folder that flashhead export onnx wrote; check the path")
        files = [f for f in sorted(path.glob("*.onnx")) if f.stem not in NATIVE or native_library() is not None]  # which no other installation can open
        models = {file.stem: _model(file) for file in files}
        shared = [m.pop("calibration") for m in models.values()]
        data = {file.name: file.stat().st_size for file in sorted(path.glob("*.data"))}
        return {"folder": str(path), "calibration": shared[0], "data_bytes": data, "native_operators_here": vector_unit() or "none", "models": models}
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, expected a model.onnx or the folder of an export; check the path")
    return {"file": str(path), **_model(path)}


def _model(path: Path) -> dict[str, Any]:
    session = open_model(path, 1)
    about = session.get_modelmeta().custom_metadata_map
    if "flashhead.format" not in about:
        raise CheckpointError(f"{path}: the model does not come from flashhead export (its metadata has no flashhead.format); export a FlashHead checkpoint")
    if about["flashhead.format"] != FORMAT:
        raise CheckpointError(f"{path}: the model does not come from flashhead export {FORMAT} (flashhead.format is {about.get('flashhead.format')}); {AGAIN}")
    try:
        settings, agreement = json.loads(about["flashhead.settings"]), json.loads(about["flashhead.agreement"])
        return {
            "part": about["flashhead.part"],
            "dialect": about["flashhead.dialect"],
            "opset": int(about["flashhead.opset"]),
            "stages": json.loads(about["flashhead.functions"]),
            "fingerprint": about["flashhead.fingerprint"],
            "written_by": about["flashhead.version"],
            "inputs": {v.name: f"{v.type} {v.shape}" for v in session.get_inputs() if not v.name.startswith("past_key_values.")},
            "outputs": {v.name: f"{v.type} {v.shape}" for v in session.get_outputs() if not v.name.startswith("present.")},
            "cached_layers": sum(v.name.endswith(".key") for v in session.get_inputs()),
            "bytes_per_step": agreement.get("bytes_per_step") if about["flashhead.part"] not in WITHOUT_STEP else None,
            "settings": settings,
            "calibration": agreement,
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the metadata of the export does not have the expected form ({error!r}); {AGAIN}") from error
