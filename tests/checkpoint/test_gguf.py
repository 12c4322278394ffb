"""A small GGUF file, made here: its head, its model in 16 bits, and a tokenizer that splits digits."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_checkpoints import clusters_of, content
from small_heads import few_probes

from flashhead_edge.checkpoint import load_model, load_tokenizer, open_source, read_head, read_index, update_index, write_checkpoint
from flashhead_edge.checkpoint.source import CODES, CODES_KEY
from flashhead_edge.errors import CheckpointError
from flashhead_edge.packed import dense, open_weights
from flashhead_edge.program.recoding import FLOATS, form_of

pytest.importorskip("gguf")
LAYERS, D, FF, HEADS, KV = 2, 64, 96, 4, 2
MERGES = ["Ġ Ġ", "1 2", "a b", "Ġ a", "ĠĠ 1"]
UNUSED = 5  # rows that pad the vocabulary


def byte_letters() -> list[str]:
    """The 256 letters that stand for bytes in a byte-level vocabulary."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(spare)) for b in range(256)]


def write_gguf(path: Path, tied: bool = True, big: float = 1.0, body: float = 1.0, pre: str = "smollm", kind_name: str = "Q8_0", ff: int = FF) -> Path:
    """A Llama in blocks of one kind, its embedding too, every value from a fixed seed; `big` multiplies the head, `body` one weight of the body."""
    import gguf
    from gguf.quants import quantize

    tokens = ["<|endoftext|>", "<|im_end|>", *byte_letters(), *(m.replace(" ", "") for m in MERGES), *(f"[PAD{i}]" for i in range(UNUSED))]
    types = [3, 3] + [1] * (256 + len(MERGES)) + [5] * UNUSED
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(D // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    generator = np.random.default_rng(7)

    def add(name: str, *shape: int, factor: float = 1.0) -> None:
        values = (generator.normal(size=shape) * factor).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, 1 + 0.1 * values)
        else:
            kind = gguf.GGMLQuantizationType[kind_name]
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), D, factor=0.3 * (big if tied else 1.0))
    if not tied:
        add("output.weight", len(tokens), D, factor=0.3 * big)
    add("output_norm.weight", D)
    for i in range(LAYERS):
        small = 0.2
        for name, rows, columns in (
            ("attn_q", D, D), ("attn_k", D // 2, D), ("attn_v", D // 2, D), ("attn_output", D, D), ("ffn_gate", ff, D), ("ffn_up", ff, D), ("ffn_down", D, ff),
        ):  # fmt: skip
            add(f"blk.{i}.{name}.weight", rows, columns, factor=small * (body if name == "ffn_down" else 1.0))
        add(f"blk.{i}.attn_norm.weight", D)
        add(f"blk.{i}.ffn_norm.weight", D)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf")


def convert(path: Path, out: Path) -> Path:
    source = open_source(path)
    head = read_head(source)
    index = few_probes(head.weight, 3, vocab_size=head.vocab_size, fingerprint=head.fingerprint)
    write_checkpoint(source, out, index, clusters_of(head.weight, head.vocab_size), overwrite=True)
    return out


def reference(path: Path) -> torch.nn.Module:
    """The model as transformers loads it."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_model(tied: bool, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", tied)
    source, want = open_source(path), reference(path)
    head = read_head(source)
    assert source.config["architectures"] == ["LlamaForCausalLM"] and source.name == "small.gguf"
    assert torch.equal(head.weight, want.lm_head.weight.half()) and head.tied == tied
    rows = 2 + 256 + len(MERGES)
    assert head.vocab_size == rows and len(head.weight) == rows + UNUSED  # rows of unused tokens are padding
    out = convert(path, tmp_path / "out")
    again = read_head(out)
    assert (again.fingerprint, again.vocab_size, again.tied) == (head.fingerprint, rows, tied)
    assert read_index(out, again).vocab_size == rows
    stored = dict(load_model(out).named_parameters())
    for name, parameter in want.named_parameters():
        assert torch.equal(stored[name], parameter.half().float()), name
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        for parameter in want.parameters():
            parameter.copy_(parameter.half())
        logits = want(ids).logits
        assert torch.equal(load_model(source)(ids).logits, logits) and torch.equal(load_model(out)(ids).logits, logits)
    assert load_model(out).config.dtype == torch.float32 and json.loads((out / "config.json").read_text())["dtype"] == "float16"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "small.gguf"]
    assert all(p.stat().st_mode & 0o077 == (out / "config.json").stat().st_mode & 0o077 for p in out.rglob("*") if p.is_file())


@pytest.mark.parametrize("tied", [True, False])
def test_head_that_overflows_float16(tied: bool, tmp_path: Path) -> None:
    """It is stored in bfloat16."""
    path = write_gguf(tmp_path / "small.gguf", tied, big=1e6)
    head = read_head(path)
    assert head.weight.dtype == torch.bfloat16 and torch.equal(head.weight, reference(path).lm_head.weight.bfloat16())
    out = convert(path, tmp_path / "out")
    assert read_head(out).fingerprint == head.fingerprint
    assert torch.equal(load_model(out).lm_head.weight, head.weight.float())


def test_body_that_overflows_float16(tmp_path: Path) -> None:
    """The body is stored in bfloat16, the head still in float16: it is the head that was read, to the bit."""
    path = write_gguf(tmp_path / "small.gguf", body=1e7)
    head = read_head(path)
    out = convert(path, tmp_path / "out")
    stored, want = load_model(out), reference(path)
    assert head.weight.dtype == torch.float16 and read_head(out).fingerprint == head.fingerprint
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(stored.get_parameter(name), want.get_parameter(name).bfloat16().float())
    assert torch.equal(stored.lm_head.weight, load_model(open_source(path)).lm_head.weight)


def test_digits_are_split(file: Path, tmp_path: Path) -> None:
    """`12` is a merge that a model trained on split digits never saw; of spaces before a digit none sticks to it."""
    text = "a 12 121212\n  12 ab1"
    source, out = load_tokenizer(open_source(file)), load_tokenizer(convert(file, tmp_path / "out"))
    want = list("aĠ12Ġ121212Ċ") + ["ĠĠ", "1", "2", "Ġ", "ab", "1"]
    assert source.tokenize(text) == out.tokenize(text) == want
    assert source(text)["input_ids"] == out(text)["input_ids"] and out.decode(out(text)["input_ids"]) == text
    assert out.eos_token_id == 1 and out("<|im_end|>")["input_ids"] == [1]
    other = write_gguf(tmp_path / "other.gguf", pre="gpt-2")
    assert "12" in load_tokenizer(open_source(other)).tokenize(text)  # only where the file asks for it


def test_folder_with_one_file(file: Path, tmp_path: Path) -> None:
    assert open_source(file.parent).gguf == file
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"the folder has 2 \.gguf files, expected a Hugging Face model folder or one \.gguf file"):
        open_source(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, -1])
def test_truncated_file(keep: int, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=r"cut\.gguf: (no GGUF file that can be read .*; fetch the file|the file cannot be mapped .*; fetch the model) again"
    ):
        read_head(open_source(path))


def test_damaged_values(file: Path, tmp_path: Path) -> None:
    import gguf

    start = next(t.data_offset for t in gguf.GGUFReader(file).tensors if t.name == "token_embd.weight")
    data = bytearray(file.read_bytes())
    data[start : start + 2] = b"\x00\x7e"  # the first block's scale becomes NaN
    (tmp_path / "nan.gguf").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"has NaN or infinite values \(first in row 0\)"):
        read_head(tmp_path / "nan.gguf")


def test_same_bytes_and_failed_writes(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same; a disk that fills while transformers writes leaves the old folder."""
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    out = convert(file, tmp_path / "out")
    first = content(out)
    assert content(convert(file, out)) == first

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    from flashhead_edge.errors import FlashHeadError

    with pytest.raises(FlashHeadError, match="out: writing failed, the disk is full"):
        convert(file, out)
    assert content(out) == first and [p.name for p in tmp_path.iterdir()] == ["out"]
    assert replace(read_index(out), tail_offset=0.0) is not None


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_1", "F16"])
def test_the_file_is_kept_for_its_codes(kind: str, tmp_path: Path) -> None:
    """Matrices come in the file's own codes, which the 16-bit tensors are the values of; the head and the norms are the checkpoint's."""
    path = write_gguf(tmp_path / "small.gguf", tied=False, kind_name=kind)
    out = convert(path, tmp_path / "out")
    again = convert(out, tmp_path / "again")  # a checkpoint is a source, too
    update_index(again, read_index(out))
    if kind in ("Q5_1", "F16"):  # without a reader for its codes, or without codes
        assert not (out / CODES).exists() and CODES_KEY not in json.loads((out / "config.json").read_text())
        return
    for folder in (out, again):
        assert (folder / CODES).read_bytes() == path.read_bytes()
        with open_weights(path) as own, open_weights(folder) as kept:
            assert sorted(kept.names()) == sorted(own.names())
            for name in (n.removesuffix(".weight") for n in own.names() if "_proj" in n):
                want, found = own.linear(name), kept.linear(name)
                assert type(found) is type(want) and np.array_equal(found.codes, want.codes) and np.array_equal(found.scales, want.scales)
                values = dense(found)
                assert np.abs(values - kept.floats(f"{name}.weight")).max() <= 2.0**-11 * np.abs(values).max()
                assert form_of(found, 64).reason != FLOATS
            assert np.array_equal(kept.rows("lm_head.weight", 3, 9), read_head(folder).weight[3:9].float().numpy())
        assert load_model(folder).lm_head.weight.shape == read_head(path).weight.shape
        assert open_source(folder).gguf is None
    with (out / CODES).open("ab") as file:
        file.write(b"x")
    for broken in (lambda: open_weights(out), lambda: convert(out, tmp_path / "third")):
        with pytest.raises(CheckpointError, match=rf"codes\.gguf: the file has [\d,]+ bytes, expected \d+ bytes as config\.json says under {CODES_KEY}; run"):
            broken()
    (out / CODES).unlink()
    with pytest.raises(CheckpointError, match=r"codes\.gguf: the file is missing, expected"):
        open_weights(out)
    other = write_gguf(tmp_path / "other.gguf", big=1.0, kind_name=kind, ff=128)
    (again / CODES).write_bytes(other.read_bytes())
    config = json.loads((again / "config.json").read_text()) | {CODES_KEY: {"bytes": other.stat().st_size}}
    (again / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight: \[64, 128\] in codes\.gguf, expected \[64, 96\]; run flashhead convert again"):
        open_weights(again)


def test_a_missing_package_is_not_taken_for_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(CheckpointError, match="reading GGUF needs the packages gguf and accelerate; pip install"):
        load_model(open_source(write_gguf(tmp_path / "model.gguf")))
