"""What fits: sizes from headers against sizes of the files, contexts at the edge, and one sentence before anything is loaded."""

from __future__ import annotations

import json
import shutil
import struct
from math import prod
from pathlib import Path

import numpy as np
import pytest
from cli_tools import write_model

from flashhead_edge.errors import CheckpointError, DeviceError, SettingsError
from flashhead_edge.jetson import onnxruntime_backend, open_engine, plan_sources
from flashhead_edge.jetson.board import MODULES
from flashhead_edge.jetson.onnx_header import OnnxHeader, read_onnx_header, varint
from flashhead_edge.jetson.onnxruntime_sessions import parts_of
from flashhead_edge.jetson.plan import MIB, Free, Layer, Need, check_fits, document, free_gpu, free_here, free_of, plan
from flashhead_edge.jetson.plan_sources import need_of, onnx_need, read_gguf_header, tensorrt_need

BOARDS = Path(__file__).parent / "boards"


def need(**changes) -> Need:
    given = {"name": "m", "kind": "onnxruntime", "weights": 100, "index": 10, "exact_rows": 20, "copies": 0, "runtime": 70, "scratch": 0}
    return Need(**{**given, "layers": (Layer(2), Layer(3)), "limit": 1000, **changes})


# ---- arithmetic


def test_the_largest_context_is_the_largest():
    n = need()
    for free in (199, 200, 204, 205, 1234, 5200, 10**9):
        most = n.largest_context(free)
        assert most == 0 or n.total(most) <= free
        assert most == 1000 or n.total(most + 1) > free
    assert n.largest_context(200) == 0 and n.largest_context(205) == 1 and n.largest_context(10**9) == 1000
    assert need(limit=None, layers=()).largest_context(200) == 1 << 24


def test_a_cache_that_doubles_is_counted_as_it_is_allocated():
    n = need(first=256, limit=8192)
    assert [n.capacity(c) for c in (1, 256, 257, 4096, 5000, 8192)] == [256, 256, 512, 4096, 8192, 8192]
    assert need(first=256, limit=5000).capacity(4500) == 5000
    assert need(doubled=True).cache(10) == 2 * need().cache(10) == 100
    assert need(layers=(Layer(2, window=4), Layer(3))).cache(10, batch=2) == 2 * (8 + 30)


def test_what_does_not_fit_is_one_sentence_with_the_largest_context():
    free = Free(300 * MIB, "this machine, MemAvailable")
    big = need(weights=100 * MIB, layers=(Layer(MIB),))
    check_fits(big, free, 199)
    with pytest.raises(DeviceError) as found:
        check_fits(big, free, 500)
    assert str(found.value) == (
        "m: 500 positions at batch 1 need about 600 MiB (predicted), 300 MiB are free (this machine, MemAvailable), expected room for all; "
        "at most 199 positions fit: use a shorter context"
    )
    with pytest.raises(DeviceError, match=r"at most 99 positions fit: export it again with that --context, or with a smaller --batch$"):
        check_fits(need(weights=100 * MIB, layers=(Layer(MIB),), fixed=(500, 2)), free, 500, 2)
    with pytest.raises(DeviceError, match=r"no context fits: free memory, or take a smaller model$"):
        check_fits(need(weights=300 * MIB), free, 1)
    check_fits(need(weights=1 << 60), Free(None, "not known"), 1)  # what is not known refuses nothing


def test_documents_tell_when_free_memory_is_not_known():
    found = document(need(), Free(None, "this machine"), 10)
    assert (found["fits"], found["largest_context"], found["predicted"]) == (None, None, True)
    assert sum(found["parts"].values()) == found["needed"] == 250
    with pytest.raises(SettingsError, match="the context is 1,001, expected at most the model's 1,000 positions"):
        document(need(), Free(1, ""), 1001)


# ---- memory


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("8 GiB", 8 << 30), ("512MiB", 512 << 20), ("1.5g", 15 * 10**8), ("1000", 1000), ("64kb", 64000)]
)
def test_amounts(text, size):
    assert free_of(text) == Free(size, "as given")


@pytest.mark.parametrize("text", ["potato", "8TB", "-1GB", "GB", "", "1i"])
def test_what_is_neither_amount_nor_board_is_refused(text):
    with pytest.raises(SettingsError, match=r"expected an amount such as 8GB or a board \(orin-nano-4gb, "):
        free_of(text)


def test_boards_have_less_than_they_are_sold_with():
    for module in MODULES:
        free = free_of(module.key)
        assert free.size is not None and 0.6 * (module.nominal_gb << 30) < free.size < module.total < module.nominal_gb << 30
        assert ("predicted" in free.where) == (module.memory_total is None)
    assert "7,620 MiB in all" in free_of("orin-nano").where


def test_free_memory_of_a_machine(tmp_path):
    assert free_here(BOARDS / "orin-nx").size == (15656 - 1224) << 20
    assert free_gpu(123, BOARDS / "orin-nx").size == (15656 - 1224) << 20  # shared: the driver's figure leaves out what can be reclaimed
    assert free_gpu(123, BOARDS / "orin-nano").size == 123  # no meminfo there: the driver's figure
    assert free_gpu(123, tmp_path) == Free(123, "this GPU")
    assert free_here(tmp_path).size is None and "/proc/meminfo: no such file" in free_here(tmp_path).where
    group = Path(shutil.copytree(BOARDS / "orin-nx", tmp_path / "nx"))
    for name, value in (("max", f"{1 << 30}"), ("current", f"{1 << 29}")):
        (group / "sys/fs/cgroup").mkdir(parents=True, exist_ok=True)
        (group / f"sys/fs/cgroup/memory.{name}").write_text(value)
    assert free_here(group) == Free(1 << 29, "this machine, as far as its control group allows")
    (group / "sys/fs/cgroup/memory.stat").write_text("anon 5\ninactive_file 1000\nactive_file 24\n")
    assert free_here(group).size == (1 << 29) + 1024  # the files that it has cached are given back
    (group / "sys/fs/cgroup/memory.max").write_text("max")
    assert free_here(group).size == (15656 - 1224) << 20


# ---- models


def test_an_export_is_counted_from_its_headers(exported):
    folder = exported()
    found = need_of(folder)
    total = found.weights + found.index + found.exact_rows
    data = sum(p.stat().st_size for p in folder.glob("*.data"))
    union: dict[tuple[str, int], int] = {}
    for part in (*parts_of(folder), "rescore"):
        union |= read_onnx_header(folder / f"{part}.onnx").external
    assert 0 < total == sum(union.values()) <= data  # what two parts share counts once
    rows = read_onnx_header(folder / "rescore.onnx")
    assert found.exact_rows == sum(rows.external.values()) > 0
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "body.onnx"), providers=["CPUExecutionProvider"])
    past = [i for i in session.get_inputs() if i.name.startswith("past_key_values")]
    assert sum(layer.per_position for layer in found.layers) == sum(i.shape[1] * i.shape[3] * 4 for i in past)
    assert read_onnx_header(folder / "body.onnx").metadata == session.get_modelmeta().custom_metadata_map
    assert {n: tuple(v.shape) for n, v in read_onnx_header(folder / "body.onnx").inputs.items()} == {i.name: tuple(i.shape) for i in session.get_inputs()}
    assert onnx_need(folder, ("body", "head")).copies > 0


def test_what_a_tied_model_shares_counts_once(tmp_path, monkeypatch):
    """The embedding is the head's exact rows, and a code of the head lies in two parts: made headers, since the tiny model is not tied."""
    rows, code, body = {("d", 0): 100}, {("d", 100): 10}, {("d", 110): 1000}
    about = {"flashhead.settings": json.dumps({"context_length": 64, "cache": "in_place"})}
    headers = {"body": OnnxHeader(about, {}, rows | body), "head": OnnxHeader({}, {}, rows | code), "rescore": OnnxHeader({}, {}, rows)}
    monkeypatch.setattr(plan_sources, "read_onnx_header", lambda path: headers[path.stem])
    for part in ("body", "head", "head_logits", "rescore"):
        (tmp_path / f"{part}.onnx").touch()
    found = onnx_need(tmp_path, ("body", "head"))
    assert (found.weights, found.index, found.exact_rows, found.copies) == (1000, 10, 100, 1400)


def test_every_backend_checks_before_it_loads(exported, monkeypatch):
    monkeypatch.setattr(onnxruntime_backend, "free_here", lambda: Free(1000, "a test"))
    monkeypatch.setattr(onnxruntime_backend, "open_model", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(DeviceError, match=r"256 positions at batch 1 need about \d+ MiB \(predicted\), 0 MiB are free \(a test\), .*; no context fits"):
        open_engine(exported())


@pytest.mark.parametrize("damage", [b"", b"hello", b"\x3a\xff\xff\xff\xff\x0f", b"\x39\x00", b"\x3b\x00", b"\xff" * 12])
def test_a_file_that_is_no_onnx_model_is_said(tmp_path, damage):
    path = tmp_path / "body.onnx"
    path.write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"body.onnx: no ONNX model that can be read \(.*\); restore the file"):
        read_onnx_header(path)
    with pytest.raises(CheckpointError, match=r"gone.onnx: the file cannot be read \(No such file or directory\)"):
        read_onnx_header(tmp_path / "gone.onnx")


def test_numbers_of_protobuf():
    assert varint(b"\x96\x01", 0) == (150, 2) and varint(b"\xff" * 9 + b"\x01", 0) == (2**64 - 1, 10)


def test_an_export_for_tensorrt_is_counted_whole(tmp_path):
    settings = {
        "vocab_size": 100,
        "hidden_size": 8,
        "scale": 1.0,
        "softcap": None,
        "head_size": 4,
        "embedding_rows": 100,
        "body_parameters": 1,
        "fixed_bytes": 1,
    }
    settings |= {"item_bytes": [1], "layers": 3, "kv_heads": 2, "stages": 1}
    manifest = {
        "format": 1, "layers": "plugin", "precision": "float16", "context": 512, "chunk": 64, "max_batch": 4, "tensorrt": None, "engines": {},
        "fingerprint": "x", "weights_fingerprint": "y", "weights_bytes": 10_000, "settings": settings,
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    found = tensorrt_need(tmp_path)
    assert found.cache(512, 4) == 3 * 2 * 2 * 4 * 2 * 512 * 4
    assert found.weights + found.exact_rows == 10_000 and found.exact_rows == 1600
    told = plan(tmp_path, memory="1GB")
    assert (told["context"], told["batch"], told["runtime"], told["fits"]) == (512, 4, "tensorrt", True)
    assert "its engines are not built yet" in told["notes"] and told["largest_context"] == 512
    assert plan(tmp_path, memory="600MiB")["fits"] is False


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("plan") / "tiny")


def test_a_checkpoint_is_counted_as_torch_has_it(model):
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = need_of(model)
    assert found.weights + found.exact_rows == sum(p.numel() * 4 for p in loaded.parameters())
    config = loaded.config
    assert sum(layer.per_position for layer in found.layers) == config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    assert found.limit == 8192 and need_of(model, gpu=True).weights * 2 == found.weights
    assert plan(model, memory="orin-nano")["fits"] is True


@pytest.mark.parametrize(
    ("kinds", "want"),
    [(["full_attention", "sliding_attention"], [(64, None), (64, 7)]), (["linear_attention", "full_attention"], [(64, None)]), (None, [(64, None)] * 2)],
)
def test_layers_that_keep_less_are_counted_so(kinds, want):
    text = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_hidden_layers": 2, "layer_types": kinds, "sliding_window": 7}
    found = plan_sources._config_layers("m", text, 4)
    assert [(layer.per_position, layer.window) for layer in found] == want


def gguf(pairs, tensors=(("token_embd.weight", (8, 100)),), version=3) -> bytes:
    def text(s: str) -> bytes:
        return struct.pack("<Q", len(s)) + s.encode()

    out = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(pairs))
    for key, value in pairs:
        out += text(key)
        if isinstance(value, str):
            out += struct.pack("<I", 8) + text(value)
        elif isinstance(value, list):
            out += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value)) if value and isinstance(value[0], str) else b""
            out += b"" if value and isinstance(value[0], str) else struct.pack("<IIQ", 9, 6, len(value)) + np.array(value, "<f4").tobytes()
        else:
            out += struct.pack("<II", 4, value)
    for name, shape in tensors:
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 1, 0)
    return out


LLAMA = [
    ("general.architecture", "llama"), ("llama.block_count", 3), ("llama.embedding_length", 8), ("llama.attention.head_count", 4),
    ("llama.attention.head_count_kv", 2), ("llama.context_length", 64), ("tokenizer.ggml.tokens", ["a", "bc"] * 50), ("tokenizer.ggml.scores", [1.0, 2.0]),
]  # fmt: skip


def test_a_gguf_file_is_counted_by_its_weights(tmp_path):
    path = tmp_path / "m.gguf"
    shapes = (("token_embd.weight", (8, 100)), ("blk.0.attn_q.weight", (8, 8)))
    path.write_bytes(gguf(LLAMA, shapes))
    values, elements = read_gguf_header(path)
    assert (values["tokens"], values["llama.block_count"], elements) == (100, 3, sum(prod(s) for _, s in shapes))
    for model in (path, tmp_path):
        found = need_of(model)
        assert (found.weights, found.exact_rows, found.limit) == (64 * 4, 800 * 4, 64)
        assert [layer.per_position for layer in found.layers] == [2 * 2 * 2 * 4] * 3


@pytest.mark.parametrize("size", [0, 3, 20, 30, 60, 120, 400, -13])
def test_a_gguf_file_that_is_cut_off_is_said(tmp_path, size):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(LLAMA)[:size])
    with pytest.raises(CheckpointError, match=r"m.gguf: no GGUF file that can be read \(.*\); fetch the file again"):
        need_of(path)


@pytest.mark.parametrize(("content", "text"), [(gguf(LLAMA[:1]), "the header names no layers"), (b"GGML" + bytes(60), "it begins with b'GGML'")])
def test_another_file_is_said(tmp_path, content, text):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        need_of(tmp_path / "m.gguf")


def test_what_is_no_model_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="expected a checkpoint, a GGUF file or an export; check the path"):
        need_of(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config.json: the file is missing"):
        need_of(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="a JSON list, expected an object"):
        need_of(tmp_path)
    with pytest.raises(SettingsError, match="plan: context is 0, expected 1 or more"):
        plan(tmp_path, context=0)
