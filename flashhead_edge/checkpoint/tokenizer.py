"""A model's tokenizer in memory, from any source and from FlashHead checkpoints: through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flashhead_edge.checkpoint.source import Source, open_source
from flashhead_edge.errors import CheckpointError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(source: Source | str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not isinstance(source, Source):
        path = Path(source)
        there = any((path / file).is_file() for file in TOKENIZERS)
        source = Source(path, None, {}, path.name, trust_remote_code) if there else open_source(source, trust_remote_code=trust_remote_code)
    if source.gguf is not None:
        from flashhead_edge.checkpoint import gguf

        return gguf.load_tokenizer(source.gguf)
    folder, trust = source.folder, source.trust_remote_code or trust_remote_code
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, (OSError, ValueError, KeyError, AttributeError, TypeError)):
            raise  # the library tokenizers says with a plain Exception that its file is damaged
        raise CheckpointError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)}); add the tokenizer's files to the folder") from error
    return tokenizer
