"""Model folders: read weights tensor by tensor, read and write FlashHead checkpoints. See docs/checkpoints.md.

Names are looked up when they are first used, so that what needs numpy alone does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashhead_edge.checkpoint.assets import PublishedClusters, read_index, read_published
    from flashhead_edge.checkpoint.loading import cache_arguments, check_device, chosen_device, load_model
    from flashhead_edge.checkpoint.source import Source, open_source
    from flashhead_edge.checkpoint.tokenizer import load_tokenizer
    from flashhead_edge.checkpoint.weights import HeadWeights, fingerprint, read_head
    from flashhead_edge.checkpoint.write import check_output, check_update, update_index, write_checkpoint

_HOME = {
    "PublishedClusters": "assets",
    "read_index": "assets",
    "read_published": "assets",
    "cache_arguments": "loading",
    "check_device": "loading",
    "chosen_device": "loading",
    "load_model": "loading",
    "load_tokenizer": "tokenizer",
    "Source": "source",
    "open_source": "source",
    "HeadWeights": "weights",
    "fingerprint": "weights",
    "read_head": "weights",
    "check_output": "write",
    "check_update": "write",
    "update_index": "write",
    "write_checkpoint": "write",
}

__all__ = [
    "HeadWeights",
    "PublishedClusters",
    "Source",
    "cache_arguments",
    "check_device",
    "chosen_device",
    "check_output",
    "check_update",
    "fingerprint",
    "load_model",
    "load_tokenizer",
    "open_source",
    "read_head",
    "read_index",
    "read_published",
    "update_index",
    "write_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
