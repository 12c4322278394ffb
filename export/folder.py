"""The folder that an export is written to: whether it may be, and what of the checkpoint goes along."""

from __future__ import annotations

from pathlib import Path

from flashhead_edge.checkpoint.atomic import regular
from flashhead_edge.errors import CheckpointError

# what a session and ONNX Runtime GenAI read beside the models
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*")
NOT_COPIED = ("*.safetensors.index.json", "quantize_config.json", "genai_config.json")


def is_export(folder: Path) -> bool:
    """Whether a folder was written by an export."""
    return (folder / "head.onnx").is_file()


def check_folder(out: str | Path, checkpoint: Path, overwrite: bool) -> Path:
    """Whether OUT may be written: its absolute path.

    Raises:
        CheckpointError: it exists and may not be overwritten, or it is, holds or lies in the checkpoint.
    """
    path, here = Path(out).expanduser().resolve(), checkpoint.expanduser().resolve()
    if path == here or path in here.parents or here in path.parents:
        raise CheckpointError(f"{path}: the output folder is the checkpoint {here}, holds it or lies in it, expected a folder apart from it; choose another")
    if path.exists():
        if not overwrite:
            raise CheckpointError(f"{path}: the output folder exists already, expected a new one; choose another name or pass --overwrite")
        if not path.is_dir() or (any(path.iterdir()) and not is_export(path)):
            raise CheckpointError(
                f"{path}: it is no folder that flashhead export wrote, and only those are overwritten; choose another name or remove it yourself"
            )
    return path


def copied_files(checkpoint: Path) -> list[Path]:
    """Settings and tokenizer, not the weights and not the head index, which the models hold."""
    found = {p for pattern in COPIED for p in checkpoint.glob(pattern) if regular(p) and not any(p.match(x) for x in NOT_COPIED)}
    return sorted(found)
