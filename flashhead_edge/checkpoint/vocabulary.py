"""How many tokens a model folder's tokenizer can name: rows of the head beyond them are padding. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashhead_edge.checkpoint.jsonfiles import read_json
from flashhead_edge.errors import CheckpointError


def named_tokens(folder: Path) -> int | None:
    """The tokenizer's highest id + 1, added tokens included; None where the folder has no tokenizer."""
    ids: list[int] = []
    try:
        if (folder / "tokenizer.json").is_file():
            data = read_json(folder / "tokenizer.json")
            vocab = (data.get("model") or {}).get("vocab") or {}
            ids += [max(vocab.values())] if isinstance(vocab, dict) and vocab else [len(vocab) - 1]
            ids += [int(token["id"]) for token in data.get("added_tokens") or []]
        elif (folder / "vocab.json").is_file():
            ids.append(max(read_json(folder / "vocab.json").values()))
        elif (folder / "tokenizer.model").is_file():
            from flashhead_edge.checkpoint.tokenizer import load_tokenizer

            ids.append(max(load_tokenizer(folder).get_vocab().values()))
        if not ids:
            return None
        if (folder / "added_tokens.json").is_file():
            ids += [int(i) for i in read_json(folder / "added_tokens.json").values()]
        if (folder / "tokenizer_config.json").is_file():
            ids += [int(i) for i in read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}]
        return int(max(ids)) + 1
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: the tokenizer files do not have the expected form ({error!r}); fetch the model again") from error


def returnable_tokens(folder: Path, config: dict[str, Any], rows: int) -> int:
    """V: tokens that a head with `rows` rows can return.

    A FlashHead checkpoint says it; else it is what the tokenizer can name, else every row.
    """
    ours = config.get("flash_head")
    stored = ours.get("vocab_size") if isinstance(ours, dict) else None
    named = stored if isinstance(stored, int) and stored > 0 else named_tokens(folder)
    return rows if named is None else min(rows, named)
