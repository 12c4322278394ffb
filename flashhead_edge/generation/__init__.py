"""Decoding with the fast head: load an engine, then `stream`, `exact_stream` or `generate`.

The loop needs numpy alone. `load_engine` opens a checkpoint through transformers; the engine of a folder exported to ONNX is
`flashhead_edge.jetson.open_engine`. `Engine` and `load_engine` are looked up when they are first used, since they load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashhead_edge.generation.cache import PromptCache
from flashhead_edge.generation.decode import Stream, Summary, Token, exact_stream, generate, stream
from flashhead_edge.generation.grammar import Grammar, compile_grammar
from flashhead_edge.generation.logprobs import Logprobs
from flashhead_edge.generation.protocols import BodySession, TextEngine
from flashhead_edge.generation.text import prompt_ids

if TYPE_CHECKING:
    from flashhead_edge.generation.engine import Engine, load_engine

__all__ = [
    "BodySession", "Engine", "Grammar", "Logprobs", "PromptCache", "Stream", "Summary", "TextEngine", "Token", "compile_grammar", "exact_stream", "generate",
    "load_engine", "prompt_ids", "stream",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("Engine", "load_engine"):
        from flashhead_edge.generation import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
