"""generate and chat on an exported folder, from `main` on."""

from __future__ import annotations

import pytest
from cli_tools import one_document

from flashhead_edge.generation import generate, load_engine


@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
def test_generate_is_the_checkpoints_text(flashhead, exported, converted, backend):
    want, summary = generate(load_engine(converted("all"), "cpu"), "a lamp", 12)
    code, out, err = flashhead("generate", exported(), "--prompt", "a lamp", "--max-new-tokens", 12, "--json", "--backend", backend, "--threads", 1)
    assert code == 0, err
    document = one_document(out)
    assert document["text"] == want
    assert document["bytes_per_step"] == summary.bytes_per_step


def test_chat_talks(flashhead, exported):
    code, out, err = flashhead("chat", exported(), "--max-new-tokens", 6, "--json", stdin="first\nsecond\n/exit\n")
    assert code == 0, err
    turns = one_document(out)["turns"]
    assert turns[1]["prompt_tokens"] > turns[0]["prompt_tokens"] > 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--backend", "torch"), "is not a checkpoint, which --backend torch runs: give the checkpoint, or leave --backend out."),
        (("--torch-device", "cpu"), "--torch-device or --trust-remote-code is for the torch backend, and "),
        (("--context", "64"), "runs on onnxruntime: leave it out."),
        (("--backend", "tensorrt"), "is not a folder of flashhead export tensorrt, which --backend tensorrt runs: run flashhead export tensorrt"),
    ],
)
def test_what_an_export_does_not_take_is_one_sentence(flashhead, exported, options, text):
    code, out, err = flashhead("generate", exported(), "--prompt", "x", *options)
    assert (code, out) == (2, "")
    assert text in err.splitlines()[-1]
