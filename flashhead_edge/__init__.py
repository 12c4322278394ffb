"""FlashHead: the output head of a language model, at a fraction of its bytes.

    import flashhead_edge
    head = flashhead_edge.load_head("smollm2-flashhead")   # a checkpoint that `flashhead convert` wrote
    head.attach(model)                                     # transformers' own generate now uses it

Importing this package loads neither torch nor transformers: the names below load what they need when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashhead_edge.errors import FlashHeadError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from flashhead_edge.integrations.hf import FlashHead

__version__ = "0.1.0"
__all__ = ["FlashHead", "FlashHeadError", "load_head", "__version__"]


def load_head(folder: str | Path, device: str | torch.device = "cpu") -> FlashHead:
    """The head of the FlashHead checkpoint in `folder`, ready to attach to its model.

    Raises:
        CheckpointError: the folder holds no FlashHead checkpoint, or a damaged one.
    """
    from flashhead_edge.integrations.hf import FlashHead

    return FlashHead.load(folder, device)


def __getattr__(name: str) -> Any:
    if name == "FlashHead":
        from flashhead_edge.integrations.hf import FlashHead

        return FlashHead
    raise AttributeError(f"module 'flashhead_edge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
