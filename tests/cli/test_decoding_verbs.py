"""generate and chat on a real checkpoint of a tiny model, in processes of their own and on a real terminal."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_tools import one_document

PROMPT = "a lamp"


@pytest.fixture(scope="session")
def dense_text(model_folder: Path) -> str:
    """transformers' own greedy answer to PROMPT, 12 tokens, from the model before conversion."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    assert isinstance(text, str)
    return text


def test_answer_alone_on_stdout_is_the_dense_text(flashhead, checkpoint: Path, dense_text: str) -> None:
    result = flashhead("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 12)
    assert result.returncode == 0, result.stderr
    assert result.stdout == dense_text + "\n"
    assert "tokens_per_second" in result.stderr


def test_generate_json_is_one_document(inside, checkpoint: Path, dense_text: str) -> None:
    result = inside("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 12, "--json", "--exact")
    assert result.returncode == 0, result.stderr
    document = one_document(result.stdout)
    assert document["text"] == dense_text
    assert document["tokens"] == 12
    assert document["exact"] is True
    assert document["missed"] == 0
    assert document["dense_bytes_per_step"] == 2 * 256 * 32


def test_a_prompt_comes_from_a_file_or_standard_input_as_it_is(flashhead, inside, checkpoint: Path, dense_text: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbf" + PROMPT.encode() + b"\r\n")
    assert inside("generate", checkpoint, "--prompt-file", file, "--max-new-tokens", 12).stdout == dense_text + "\n"
    result = flashhead("generate", checkpoint, "--prompt-file", "-", "--max-new-tokens", 12, stdin=PROMPT)
    assert (result.returncode, result.stdout) == (0, dense_text + "\n"), result.stderr
    file.write_bytes(b"\xef\xbb\xbfcaf\xe9")
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"\n")
    for options, said in (
        (("--prompt-file", file), f"{file}: byte 6 is not UTF-8, expected UTF-8 text; convert the file."),
        (("--prompt-file", empty), f"{empty}: it is empty, expected a prompt; give another one."),
        (("--prompt-file", tmp_path), f"{tmp_path}: it cannot be read (Is a directory), expected a file of text; give another one."),
        (("--prompt-file", tmp_path / "none"), "it cannot be read (No such file or directory)"),
        (("--prompt-file", file, "--prompt", "x"), "--prompt and --prompt-file: a prompt comes from one of them, give one."),
        ((), "--prompt and --prompt-file: a prompt comes from one of them, give one."),
    ):
        result = inside("generate", checkpoint, *options)
        assert (result.returncode, result.stdout) == (2, "")
        assert said in result.stderr


def test_raw_prompt_chat_prompt_and_seeds_differ(inside, checkpoint: Path) -> None:
    def text(*more: object) -> str:
        result = inside("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 12, "--json", *more)
        assert result.returncode == 0, result.stderr
        return str(one_document(result.stdout)["text"])

    chat, raw = text("--chat"), text("--raw")
    assert chat != raw
    drawn = [text("--temperature", 1.5, "--seed", s) for s in (1, 2, 1)]
    assert drawn[0] != drawn[1]
    assert drawn[0] == drawn[2]


def test_stop_texts_end_the_answer(inside, checkpoint: Path, dense_text: str) -> None:
    end = dense_text[5:7]
    for more in ((), ("--exact",)):
        result = inside("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 12, "--json", "--stop", "never", "--stop", end, *more)
        document = one_document(result.stdout)
        assert document["text"] == dense_text[: dense_text.index(end)]
        assert document["stopped"] == "stop string"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--backend", "onnxruntime"), "is not a folder of flashhead export onnx, which --backend onnxruntime runs: run flashhead export onnx"),
        (("--backend", "tensorrt"), "is not a folder of flashhead export tensorrt, which --backend tensorrt runs: run flashhead export tensorrt"),
        (("--threads", "0"), "Invalid value for '--threads': 0 is not in the range x>=1."),
        (("--stop", ""), "generate: the stop strings are ('',), expected a list of texts that are not empty; leave the empty ones out"),
    ],
)
def test_what_a_checkpoint_does_not_take_is_one_sentence(inside, checkpoint: Path, options: tuple[str, ...], text: str) -> None:
    result = inside("generate", checkpoint, "--prompt", PROMPT, *options)
    assert (result.returncode, result.stdout) == (2, "")
    assert text in result.stderr.splitlines()[-1]


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU runs it")
def test_a_checkpoint_without_torch_says_what_to_do(inside, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashhead_edge.cli import sampling

    monkeypatch.setattr(sampling, "find_spec", lambda name: None)
    result = inside("generate", checkpoint, "--prompt", PROMPT)
    assert (result.returncode, result.stdout) == (1, "")
    said = result.stderr.splitlines()[-1]
    assert said.startswith(
        f"flashhead: {checkpoint} is a checkpoint, which needs torch and transformers (pip install 'flashhead-edge[torch]') or an NVIDIA GPU ("
    )
    assert said.endswith("; or give a folder that flashhead export onnx wrote, which needs neither")


def test_settings_out_of_range_are_one_sentence(inside, checkpoint: Path) -> None:
    result = inside("generate", checkpoint, "--prompt", PROMPT, "--top-p", 1.5)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == "flashhead: sampling: top_p is 1.5, expected above 0, at most 1 (off); call again with another value"


def test_chat_keeps_resets_and_leaves(inside, checkpoint: Path) -> None:
    result = inside("chat", checkpoint, "--max-new-tokens", 6, "--json", stdin="first\nsecond\n/reset\n/what\n\nthird\n/exit\nnever\n")
    assert result.returncode == 0, result.stderr
    document = one_document(result.stdout)
    said = [[m["content"] for m in messages if m["role"] == "user"] for messages in document["conversations"]]
    assert said == [["first", "second"], ["third"]]
    assert [turn["conversation"] for turn in document["turns"]] == [0, 0, 1]
    prompts = [turn["prompt_tokens"] for turn in document["turns"]]
    assert len(prompts) == 3
    assert prompts[1] > prompts[0]  # the second turn holds the first
    assert prompts[2] == prompts[0]  # "first" and "third" are as long: the conversation was forgotten
    assert result.stderr.count("/reset forgets the conversation") == 2  # at the start, and for /what


def test_chat_ends_with_its_input_and_streams_to_stdout(inside, checkpoint: Path) -> None:
    result = inside("chat", checkpoint, "--max-new-tokens", 6, stdin="first\n")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 1
    assert result.stdout.endswith("\n")
    assert "/reset" not in result.stdout


def test_message_that_is_too_long_is_said_and_the_chat_goes_on(inside, checkpoint: Path) -> None:
    result = inside("chat", checkpoint, "--max-new-tokens", 4, "--json", stdin=f"first\n{'x' * 9000}\nthird\n")
    assert result.returncode == 0, result.stderr
    document = one_document(result.stdout)
    assert [[m["content"] for m in messages if m["role"] == "user"] for messages in document["conversations"]] == [["first", "third"]]
    assert "flashhead: generate: the prompt has" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(root: Path, checkpoint: Path) -> None:
    import pty

    pid, master = pty.fork()
    if pid == 0:
        os.environ.update(PYTHONPATH=str(root), OMP_NUM_THREADS="1", TERM="xterm", COLUMNS="120")
        os.execv(sys.executable, [sys.executable, "-m", "flashhead_edge", "chat", str(checkpoint), "--max-new-tokens", "8000"])
    seen = b""

    def until(*words: bytes, more: int = 0, seconds: float = 60) -> None:
        """Read until all words, and `more` bytes than at the call, have been seen."""
        nonlocal seen
        end, length = time.monotonic() + seconds, len(seen) + more
        while not all(w in seen for w in words) or len(seen) < length:
            ready, _, _ = select.select([master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"waited for {words} in {seen[-2000:]!r}"
            seen += os.read(master, 4096)

    try:
        until(b"Ctrl-D leaves", b"> ")
        os.write(master, b"hello\n")
        until(b"hello\r\n")
        until(more=20)  # the answer has begun
        os.write(master, b"\x03")
        until(b"(stopped)", b"a second)")
        seen = seen[seen.rindex(b"a second)") :]
        until(b"> ")
        # at the prompt it only says how to leave; the prompt is on the screen a moment before it is read, so press again
        for _ in range(30):
            os.write(master, b"\x03")
            if select.select([master], [], [], 2.0)[0] and (seen := seen + os.read(master, 4096)).count(b"/exit or Ctrl-D leaves"):
                break
        assert b"/exit or Ctrl-D leaves" in seen
        deadline = time.monotonic() + 60
        while (done := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            os.write(master, b"\x04")  # again, for the same reason
            time.sleep(1)
        assert done[0] == pid
        assert os.waitstatus_to_exitcode(done[1]) == 0
        pid = 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(master)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_ends_generate_with_130(root: Path, checkpoint: Path) -> None:
    command = [sys.executable, "-m", "flashhead_edge", "generate", str(checkpoint), "--prompt", "x", "--max-new-tokens", "8000"]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "generating" in line:
                process.send_signal(signal.SIGINT)
                break
        lines += process.stderr.readlines()
        assert process.wait(30) == 130
    assert lines[-1] == "flashhead: interrupted\n"
    assert not any("Traceback" in line for line in lines)


SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"], "additionalProperties": false}'


@pytest.mark.parametrize("more", [(), ("--exact",), ("--temperature", 1.5, "--seed", 3)])
def test_an_answer_follows_a_schema_or_a_pattern(inside, checkpoint: Path, tmp_path: Path, more: tuple[object, ...]) -> None:
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text(SCHEMA)

    def document(*options: object) -> dict:
        result = inside("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 60, "--json", *more, *options)
        assert result.returncode == 0, result.stderr
        return one_document(result.stdout)

    text, file = document("--json-schema", SCHEMA), document("--json-schema", tmp_path / "schema.json")
    assert 0 <= json.loads(text["text"])["n"] <= 9
    assert text["text"] == file["text"]
    assert text["stopped"] == "grammar complete"
    assert text["allowed_steps"] == text["tokens"]
    assert re.fullmatch("(yes|no)[.]", document("--regex", "(yes|no)[.]")["text"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--json-schema", "nowhere.json"), "nowhere.json cannot be read (No such file or directory), expected a file or a JSON object; give one."),
        (("--json-schema", "{"), "grammar: the JSON schema is no JSON (Expecting property name"),
        (("--json-schema", '{"type": "strin"}'), "grammar: the JSON schema cannot be used (Invalid type: strin)"),
        (("--regex", "("), "grammar: the pattern cannot be used (unclosed group)"),
        (("--regex", "a", "--json-schema", "{}"), "--json-schema and --regex: an answer follows one of them, leave out the other."),
        (("--speculate", "2", "--temperature", "1"), "generate: speculate was asked together with sampling, a grammar or logprobs, expected plain greedy"),
        (("--speculate", "2", "--exact"), "--exact guesses and verifies in its own way: leave out --speculate."),
        (("--logprobs", "2"), "--logprobs stands in the JSON document: add --json, or leave it out."),
        (("--logprobs", "200", "--json"), "logprobs is 200, expected 0 to 100 alternatives"),
    ],
)
def test_grammars_and_logprobs_that_cannot_be_are_one_sentence(inside, checkpoint: Path, options: tuple[str, ...], text: str) -> None:
    pytest.importorskip("llguidance")
    result = inside("generate", checkpoint, "--prompt", PROMPT, *options)
    assert (result.returncode, result.stdout) == (2, "")
    assert text in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("more", [(), ("--exact",)])
def test_logprobs_stand_in_the_document(inside, checkpoint: Path, dense_text: str, more: tuple[str, ...]) -> None:
    """Greedy: the chosen token is the likeliest. The texts of the tokens join to the answer, which is of single bytes."""
    result = inside("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 12, "--json", "--logprobs", 2, *more)
    assert result.returncode == 0, result.stderr
    document = one_document(result.stdout)
    assert document["text"] == dense_text
    assert len(document["logprobs"]) == document["tokens"] == 12
    for entry in document["logprobs"]:
        first, second = entry["top_logprobs"]
        assert {name: entry[name] for name in ("token", "id", "logprob")} == first
        assert 0 >= first["logprob"] >= second["logprob"]
    if dense_text.isascii():
        assert "".join(entry["token"] for entry in document["logprobs"]) == dense_text


def test_drafts_give_the_same_answer(inside, checkpoint: Path, dense_text: str) -> None:
    result = inside("generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 12, "--json", "--speculate", 4)
    document = one_document(result.stdout)
    assert document["text"] == dense_text
    assert document["passes"] + document["accepted"] == document["tokens"] == 12


def test_a_chat_reads_only_what_is_new_and_drops_the_oldest_turns(inside, checkpoint: Path) -> None:
    """The context has 8,192 positions, a byte a token: the third message leaves no room for the first two turns."""
    lines = ["a" * 3000, "b" * 3000, "c" * 3000, "d"]
    result = inside("chat", checkpoint, "--max-new-tokens", 4, "--json", "--overflow", "drop-oldest", stdin="\n".join(lines) + "\n")
    assert result.returncode == 0, result.stderr
    document = one_document(result.stdout)
    assert [turn["dropped_turns"] for turn in document["turns"]] == [0, 0, 1, 1]
    assert "(the oldest turns are left out: 1 of 3)" in result.stderr
    assert len(document["conversations"][0]) == 8
    read, whole = [turn["prompt_read"] for turn in document["turns"]], [turn["prompt_tokens"] for turn in document["turns"]]
    assert read[0] == whole[0]
    assert 3000 < read[1] < 3030 < whole[1]  # the message, its marks, and the answer where its text is not the tokens that were said
    assert read[3] < 40 < whole[3]
