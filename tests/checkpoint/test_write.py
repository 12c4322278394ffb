"""Writing: what lands in the folder, what may be overwritten, and the model card."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import NAMED, clusters_of, content, save_checkpoint, save_model
from small_heads import everything_open, few_probes

from flashhead_edge.checkpoint import (
    PublishedClusters,
    atomic,
    check_output,
    load_model,
    load_tokenizer,
    open_source,
    read_head,
    read_index,
    read_published,
    update_index,
    write_checkpoint,
)
from flashhead_edge.errors import CheckpointError, FlashHeadError


def test_body_is_copied_byte_for_byte(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", max_shard_size="8KB")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    for name in ("pytorch_model.bin", "modeling_theirs.py", ".hidden", "consolidated.safetensors", "model.gguf"):
        (folder / name).write_bytes(b"not for us")
    before, out = content(folder), save_checkpoint(folder, tmp_path / "out")
    assert content(folder) == before
    written = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    shards = {p.name for p in folder.glob("model-*.safetensors")}
    assert written == shards | {
        "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "additional_chat_templates/tools.jinja", "README.md", "flash_head_assets/index.safetensors", "flash_head_assets/clustering_cache.safetensors",
        "flash_head_assets/clustering_config.json",
    }  # fmt: skip
    for name in written - {"config.json", "README.md"}:
        if not name.startswith("flash_head_assets"):
            assert (out / name).read_bytes() == (folder / name).read_bytes()
            assert (out / name).stat().st_ino != (folder / name).stat().st_ino and (out / name).stat().st_nlink == 1
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


def test_source_of_links(tmp_path: Path) -> None:
    """A hub snapshot is a folder of links; what is written are files."""
    folder, links = save_model(tmp_path / "blobs"), tmp_path / "snapshot"
    links.mkdir()
    for path in folder.iterdir():
        (links / path.name).symlink_to(path)
    out = save_checkpoint(links, tmp_path / "out")
    assert not any(p.is_symlink() for p in out.rglob("*")) and read_head(out).fingerprint == read_head(folder).fingerprint


def test_same_input_same_bytes(model_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert content(save_checkpoint(model_folder, tmp_path / "out")) == content(checkpoint)


def test_checkpoint_loads_as_the_model(model_folder: Path, checkpoint: Path) -> None:
    """Also through plain transformers, whose Auto class goes by the model type."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        want = load_model(model_folder)(ids).logits
        assert torch.equal(load_model(checkpoint)(ids).logits, want)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)(ids).logits, want)
    assert load_tokenizer(checkpoint)("t5 t9 <end>")["input_ids"] == [5, 9, NAMED - 1]
    assert load_tokenizer(open_source(checkpoint))("t5")["input_ids"] == [5]


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded .*; add the tokenizer's files to the folder"):
        load_tokenizer(save_model(tmp_path, tokenizer=False))


def test_vision_language_model(tmp_path: Path) -> None:
    """The text model's head, under a nested name."""
    folder = save_model(tmp_path / "vl", "qwen3_vl", torch.float32, tokenizer=False)
    out = save_checkpoint(folder, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["FlashHeadQwen3VLForConditionalGeneration"]
    assert torch.equal(load_model(out).get_output_embeddings().weight, read_head(folder).weight)


def test_converting_a_checkpoint_again(checkpoint: Path, tmp_path: Path) -> None:
    """The result is that of converting the original; nothing doubles."""
    out = save_checkpoint(checkpoint, tmp_path / "out")
    text = (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["architectures"] == ["FlashHeadLlamaForCausalLM"]
    assert text.count("## Contract") == 1 and read_index(out).vocab_size == NAMED


# ---- what may be written to ----


def test_out_exists(model_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(checkpoint, tmp_path / "out"))
    before = content(out)
    with pytest.raises(CheckpointError, match=r"out: the output folder exists already, expected a new one; choose another name or pass --overwrite"):
        save_checkpoint(model_folder, out)
    assert content(out) == before
    save_checkpoint(model_folder, out, margin=2.0, overwrite=True)
    assert read_index(out).probe.margin == 2.0 and sorted(os.listdir(tmp_path)) == ["out"]


def test_only_checkpoints_are_overwritten(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="the folder is no FlashHead checkpoint, expected one, since only those are overwritten"):
        save_checkpoint(model_folder, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(CheckpointError, match="a file has this name, expected a folder"):
        save_checkpoint(model_folder, tmp_path / "thesis.txt", overwrite=True)


def test_out_and_source_overlap(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "a" / "model"))
    for out in (folder, folder / "out", tmp_path / "a"):
        with pytest.raises(CheckpointError, match="the output folder is the source .*, holds it or lies in it"):
            check_output(open_source(folder), out, overwrite=True)


def test_clusters_of_another_size(model_folder: Path, tmp_path: Path) -> None:
    source = open_source(model_folder)
    head = read_head(source)
    index = everything_open(head.weight, vocab_size=NAMED, fingerprint=head.fingerprint)
    with pytest.raises(CheckpointError, match=r"the published clusters are for a head \[131, 32\], expected \[127, 32\]"):
        write_checkpoint(source, tmp_path / "out", index, clusters_of(head.weight, 131))


def test_parents_are_made(model_folder: Path, tmp_path: Path) -> None:
    assert read_index(save_checkpoint(model_folder, tmp_path / "a" / "b" / "out")).vocab_size == NAMED


def test_another_writer(model_folder: Path, tmp_path: Path) -> None:
    with open(tmp_path / ".out.flashhead-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=r"another flashhead is writing there \(\.out\.flashhead-lock is locked\)"):
            save_checkpoint(model_folder, tmp_path / "out")
    save_checkpoint(model_folder, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_disk_space_is_checked_first(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(FlashHeadError, match=r"out: \d+ MB are needed, 0 MB are free; free some space or choose another folder"):
        save_checkpoint(model_folder, tmp_path / "deep" / "out")
    assert os.listdir(tmp_path) == []


# ---- a new index in place ----


def test_update_index(model_folder: Path, tmp_path: Path) -> None:
    (folder := Path(shutil.copytree(model_folder, tmp_path / "model"))).joinpath("README.md").write_text("---\nlicense: mit\n---\n# Theirs\n")
    out = save_checkpoint(folder, tmp_path / "out")
    body, clusters = (out / "model.safetensors").stat(), read_published(out)
    index = replace(read_index(out), summary={"head": "fitted", "top1_agreement": 0.997})
    index = replace(index, probe=replace(index.probe, margin=1.25))
    update_index(out, index)
    again = read_index(out, read_head(out))
    assert again.probe.margin == 1.25 and again.summary["top1_agreement"] == 0.997
    after = (out / "model.safetensors").stat()
    assert (after.st_ino, after.st_nlink, after.st_size) == (body.st_ino, 1, body.st_size)
    assert (read_published(out).centroids == clusters.centroids).all()
    text = (out / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\n---\n") and "99.70 %" in text and text.count("# Theirs") == 1 and "# model with a FlashHead" in text
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


def test_update_index_for_another_head(checkpoint: Path, tmp_path: Path) -> None:
    before = content(checkpoint)
    index = replace(read_index(checkpoint), fingerprint="sha256:" + "0" * 64)
    with pytest.raises(CheckpointError, match=r"the new index was made for the head sha256:0{12}\.\.\., the checkpoint's head is sha256:"):
        update_index(checkpoint, index)
    with pytest.raises(CheckpointError, match=r"config\.json: the file is missing"):
        update_index(tmp_path, index)
    assert content(checkpoint) == before


def test_update_index_without_links(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links gets copies."""
    out = save_checkpoint(model_folder, tmp_path / "out")

    def link(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    update_index(out, replace(read_index(out), tail_offset=-9.0))
    assert read_index(out, read_head(out)).tail_offset == -9.0


@pytest.mark.parametrize("name", ["copy_file_range", "renameat2"])
def test_systems_that_lack_a_call(name: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a copy inside the kernel, or without an exchange of two folders, the same comes out."""
    if name == "renameat2":
        monkeypatch.setattr(atomic, "exchange", lambda new, old: False)
    else:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    out = save_checkpoint(model_folder, tmp_path / "out")
    want = content(out)
    save_checkpoint(model_folder, out, margin=2.0, overwrite=True)
    save_checkpoint(model_folder, out, overwrite=True)
    assert content(out) == want and os.listdir(tmp_path) == ["out"]


def test_source_that_shrinks_while_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(1000))
    monkeypatch.setattr(atomic, "_copy_range", lambda old, new, size: os.truncate(tmp_path / "a", 10) or 0)
    with pytest.raises(CheckpointError, match="10 bytes were copied of 1,000, so the file changed meanwhile"):
        atomic.copy_file(tmp_path / "a", tmp_path / "b")


# ---- the card ----


def test_card_states_the_contract(model_folder: Path, tmp_path: Path) -> None:
    source = open_source(model_folder)
    head = read_head(source)
    summary = {
        "head": "fitted", "target_agreement": 0.995, "top1_agreement": 0.99712, "top1_agreement_interval": [0.9966, 0.9976], "positions": 60000,
        "bytes_per_step": 1.13e6, "dense_bytes_per_step": 56.6e6, "texts": [{"name": "own text", "sha256": "ab12", "positions": 60000}, "more.txt"],
    }  # fmt: skip
    index = replace(everything_open(head.weight, vocab_size=NAMED, fingerprint=head.fingerprint), summary=summary)
    write_checkpoint(source, tmp_path / "out", index, clusters_of(head.weight, NAMED))
    text = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "99.50 %",
        "99.71 % (95 % interval 99.66 % to 99.76 %) over 60,000 positions",
        "1.13 MB, 2.00 %",
        "own text, 60,000 positions",
        "SHA-256 of its tokens `ab12...`",
        "more.txt",
    ):
        assert part in text
    assert head.fingerprint in text and "flashhead generate" in text


def test_card_keeps_the_original(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# Theirs\nLimits: many.\n")
    text = (save_checkpoint(folder, tmp_path / "out", card="# Ours\nBy hand.") / "README.md").read_text()
    assert text.startswith("---\nlicense: apache-2.0\n---\n\n# Ours\nBy hand.\n") and text.endswith("# Theirs\nLimits: many.\n")


def test_code_comes_along_only_when_trusted(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "modeling_theirs.py").write_text("raise SystemExit('ran')")
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling_theirs.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    for trust in (False, True):
        source = open_source(folder, trust_remote_code=trust)
        head = read_head(source)
        index = few_probes(head.weight, 2, vocab_size=NAMED, fingerprint=head.fingerprint)
        out = tmp_path / f"out-{trust}"
        write_checkpoint(source, out, index, clusters_of(head.weight, NAMED))
        assert (out / "modeling_theirs.py").exists() == trust == ("auto_map" in json.loads((out / "config.json").read_text()))
    assert load_model(tmp_path / "out-False") is not None


def test_quantised_body_is_copied(tmp_path: Path) -> None:
    """Packed tensors keep their bytes, and quantization_config stays in config.json."""
    folder = save_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    stem = "model.layers.0.mlp.up_proj"
    del tensors[f"{stem}.weight"]
    tensors |= {
        f"{stem}.qweight": torch.zeros(4, 48, dtype=torch.int32),
        f"{stem}.qzeros": torch.zeros(1, 6, dtype=torch.int32),
        f"{stem}.scales": torch.ones(1, 48),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    scheme = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": scheme}
    (folder / "config.json").write_text(json.dumps(config))
    out = save_checkpoint(folder, tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert json.loads((out / "config.json").read_text())["quantization_config"] == scheme


def test_published_clusters_are_checked(model_folder: Path) -> None:
    good = clusters_of(read_head(model_folder).weight, NAMED)
    with pytest.raises(CheckpointError, match="centroids is not finite"):
        PublishedClusters(good.centroids * np.float32(np.nan), good.assignments, good.n_probes)
