"""The tokenizer without transformers: the same ids, texts and prompts as transformers' own, on tokenizers of several kinds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_tools import write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoints import save_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flashhead_edge.errors import CheckpointError, SettingsError
from flashhead_edge.jetson.tokenizer import ChatTokenizer, load_chat_tokenizer

TRICKY = (
    "Why is the sky blue?", " leading  spaces\t\n\n tabs ", "<|im_end|>in<|im_start|>text<end>", "日本語 русский 😀👩‍👩‍👧 é é", "a\r\nb\x00c",
    "x" * 300, "1234567890 3.14", "", " ", "t1 t2 <end> t3", "w1 w2</s>w3", "don't , stop .",
)  # fmt: skip
TALKS = (
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "<b>\"hi\" & 'ho'</b>\n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c "}],
)
TEMPLATES = {
    "plain": "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "blocks and specials": (
        "{{ bos_token }}\n{% for m in messages %}\n    {%- if m.role == 'system' %}\n[{{ m.content | trim }}]\n    {% else %}\n{{ m.content }}{{ eos_token }}\n"
        "    {% endif %}\n{% endfor %}\n{% if tools %}tools{% endif %}"
    ),
    "json, loops, generation": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{{ m | tojson }}{% generation %}{{ m.content }}{% endgeneration %}"
        "{{ dict(a=ns.n) | tojson(indent=2) }}{% if ns.n > 1 %}{% break %}{% endif %}{% endfor %}"
    ),
}


def metaspace(folder: Path) -> None:
    """Words with a leading space, a start token that the post-processor adds, an end token that only the config calls special."""
    words = ["<unk>", "<s>", "</s>"] + [f"▁w{i}" for i in range(20)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    folder.mkdir()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def pieces(folder: Path) -> None:
    """WordPiece: its decoder joins and spaces words itself."""
    vocab = {w: i for i, w in enumerate(["[UNK]", "[CLS]", "[SEP]", "don", "'", "t", ",", "stop", ".", "##s", "a", "##b"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]").save_pretrained(folder)


KINDS = {"bytes": write_model, "words": lambda f: (f.mkdir(), save_tokenizer(f)), "metaspace": metaspace, "word pieces": pieces}


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatTokenizer, PreTrainedTokenizerFast]:
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    KINDS[request.param](folder)
    return load_chat_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def same_text(ours: ChatTokenizer, theirs: PreTrainedTokenizerFast, text: str) -> None:
    for special in (True, False):
        ids = ours(text, add_special_tokens=special)["input_ids"]
        assert ids == list(theirs(text, add_special_tokens=special)["input_ids"])
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TRICKY, ids=lambda t: repr(t[:12]))
def test_ids_and_texts_are_those_of_transformers(both, text):
    same_text(*both, text)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_any_text(both, text):
    same_text(*both, text)


def test_the_end_token_is_that_of_transformers(both):
    ours, theirs = both
    assert ours.eos_token_id == theirs.eos_token_id
    if theirs.eos_token_id is not None:
        assert ours.decode([theirs.eos_token_id], skip_special_tokens=True) == ""


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("talk", TALKS, ids=len)
@pytest.mark.parametrize("prompt", [True, False])
def test_prompts_are_those_of_transformers(tmp_path, name, talk, prompt):
    metaspace(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATES[name])
    ours, theirs = load_chat_tokenizer(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    assert ours.apply_chat_template(talk, add_generation_prompt=prompt) == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)


def test_templates_of_older_files(tmp_path):
    """In tokenizer_config.json: a text, or several by name."""
    metaspace(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for found, want in (("{{ 1 }}", "{{ 1 }}"), ([{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}], "y"), ([], None), ("", None)):
        path.write_text(json.dumps(config | {"chat_template": found}))
        assert load_chat_tokenizer(tmp_path / "model").chat_template == want


def test_missing_and_damaged_files_are_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer.json: the file is missing, expected the tokenizer of the library tokenizers"):
        load_chat_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=r"tokenizer.json: the tokenizer cannot be loaded"):
        load_chat_tokenizer(tmp_path)
    metaspace(tmp_path / "plain")
    with pytest.raises(SettingsError, match="found no chat template"):
        load_chat_tokenizer(tmp_path / "plain").apply_chat_template(TALKS[0])


@pytest.mark.slow
def test_the_real_tokenizer_of_smollm2(root):
    """On the checkpoint that `make demo` leaves: 17 special tokens, a system message of its own."""
    folder = root / "demo" / "SmolLM2-135M-FlashHead"
    if not folder.is_dir():
        pytest.skip("needs the checkpoint of make demo")
    ours, theirs = load_chat_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in TRICKY:
        same_text(ours, theirs, text)
    for talk in TALKS:
        assert ours.apply_chat_template(talk, add_generation_prompt=True) == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
