"""Tokenizer and chat template of a model folder, through the libraries tokenizers and jinja2 alone.

It has the few methods of transformers' tokenizers that the loop calls (`generation.text.Tokenizer`), with the same results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashhead_edge.checkpoint.chat_template import conversation_text
from flashhead_edge.checkpoint.jsonfiles import read_json
from flashhead_edge.errors import CheckpointError, SettingsError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, eq=False)
class ChatTokenizer:
    """A tokenizer with its chat template."""

    backend: Tokenizer
    chat_template: str | None
    special_tokens_map: Mapping[str, str]  # "bos_token" and so on, as a template sees them

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.backend.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False, *, clean_up_tokenization_spaces: bool | None = None) -> str:
        """Text of token ids. Spaces are as the tokenizer has them: nothing cleans them up."""
        if clean_up_tokenization_spaces:
            raise SettingsError("tokenizer: clean_up_tokenization_spaces is true, expected false or None; clean the text up yourself")
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None, tokenize: bool = False,
        add_generation_prompt: bool = False,
    ) -> str:  # fmt: skip
        """The text of a conversation. Errors as `checkpoint.chat_template.rendered`."""
        if self.chat_template is None or tokenize:
            found = "no chat template" if self.chat_template is None else "tokenize=True"
            raise SettingsError(f"tokenizer: found {found}, expected a chat template and tokenize=False; give a plain text, or encode the text that comes back")
        return conversation_text(self.chat_template, self.special_tokens_map, conversation, tools, add_generation_prompt)

    @property
    def eos_token_id(self) -> int | None:
        name = self.special_tokens_map.get("eos_token")
        return None if name is None else self.backend.token_to_id(name)


def load_chat_tokenizer(folder: Path) -> ChatTokenizer:
    """Read tokenizer.json, tokenizer_config.json and chat_template.jinja of a model folder.

    Raises:
        CheckpointError: tokenizer.json is missing or damaged.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing, expected the tokenizer of the library tokenizers; export again, or save the tokenizer there")
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:
        if type(error) is not Exception:
            raise  # the library says with a plain Exception that its file is damaged
        raise CheckpointError(f"{path}: the tokenizer cannot be loaded ({first_line(error)}); restore the file") from error
    backend.no_truncation()  # settings of training that a file may carry
    backend.no_padding()
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    special = {name: _text(config[name]) for name in NAMED if config.get(name)}
    _mark_special(backend, special.values())
    return ChatTokenizer(backend, _template(folder, config), special)


def _text(token: Any) -> str:
    """A token's text: older files store it with how it matches."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _mark_special(backend: Tokenizer, tokens: Any) -> None:
    """Tokens that the config names are special, whether tokenizer.json says so or not: a text leaves them out."""
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens(sorted(t for t in set(tokens) - known if backend.token_to_id(t) is not None))


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        found = next((t["template"] for t in found if t.get("name") == "default"), None)
    return found or None
