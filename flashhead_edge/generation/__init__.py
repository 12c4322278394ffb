"""Decoding over transformers models: load an engine, then `stream`, `exact_stream` or `generate`."""

from flashhead_edge.generation.decode import Stream, Summary, Token, exact_stream, generate, stream
from flashhead_edge.generation.engine import Engine, load_engine, prompt_ids

__all__ = ["Engine", "Stream", "Summary", "Token", "exact_stream", "generate", "load_engine", "prompt_ids", "stream"]
