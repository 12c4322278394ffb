"""`flashhead quantize` on tiny models: the packing, exact folding, errors no worse than rounding to nearest, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_bodies import BODIES, save_body
from small_checkpoints import content, save_checkpoint, save_tokenizer
from torch import Tensor

from flashhead_edge.capture import recording
from flashhead_edge.checkpoint import load_model, open_source, quantised, read_head
from flashhead_edge.checkpoint.shards import ShardWriter
from flashhead_edge.errors import CheckpointError, FlashHeadError, SettingsError, UnsupportedModelError
from flashhead_edge.quantize import quantize
from flashhead_edge.quantize import run as running
from flashhead_edge.quantize.choose import Settings, choose_site, fold
from flashhead_edge.quantize.grid import Coded, clipped, nearest, output_error, packed, packed_bytes
from flashhead_edge.quantize.layouts import LAYOUTS, divide_norm, layout, shared, spread
from flashhead_edge.quantize.walk import Stream, Walk, Weights, moments

IDS = torch.arange(3, 51)[None]
FAMILIES = [f for f in BODIES if f != "phi3_long"]


def unpacked(coded: Coded, symmetric: bool) -> Tensor:
    tensors = {f"a.{name}": tensor for name, tensor in packed(coded).items()}
    scheme = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    out = dict(quantised.dequantised(scheme, set(tensors), tensors.__getitem__, torch.float32, "m"))
    assert set(out) == {"a.weight"} and ("a.weight_zero_point" in tensors) == (not symmetric)
    return out["a.weight"]


def spread_states(n: int, k: int, seed: int = 0) -> Tensor:
    """States with a few large channels and a mean, as a model's are."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g) * torch.exp(torch.randn(k, generator=g)) + torch.randn(k, generator=g)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [24, 21])  # the zero points of 21 rows do not fill words
def test_our_reader_reads_what_is_packed(symmetric: bool, dtype: torch.dtype, n: int) -> None:
    weight = torch.randn(n, 64, generator=torch.Generator().manual_seed(1)) + 0.5
    weight[3, :32] = 0  # a group of nothing
    coded = nearest(weight, 32, symmetric, dtype)
    assert torch.equal(unpacked(coded, symmetric), coded.values())
    assert bool((coded.values()[3, :32] == 0).all()) and bool(coded.values().isfinite().all())
    step = coded.scales.float().repeat_interleave(32, 1)
    # half a step, half another for a zero point that is rounded, and eight steps of what a scale loses in bfloat16
    assert bool(((coded.values() - weight).abs() <= ((0.5 if symmetric else 1.0) + 8 / 256) * step).all())
    assert sum(t.numel() * t.element_size() for t in packed(coded).values()) == packed_bytes(n, 64, 32, symmetric, 2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_reads_and_rounds_as_we_do(symmetric: bool) -> None:
    """Bit for bit: its unpacking of our words is our codes, its packing of them is our words, its grid is ours at ratio 1."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(2)) + 0.3
    coded = nearest(weight, 32, symmetric, torch.float32)
    parts = packed(coded)
    signed = (coded.codes.to(torch.int16) - 8).to(torch.int8)
    assert torch.equal(unpack_from_int32(parts["weight_packed"], 4, torch.Size(parts["weight_shape"].tolist())), signed)
    assert torch.equal(pack_to_int32(signed, 4), parts["weight_packed"])
    groups = weight.view(48, 3, 32)
    arguments = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=32)
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    assert torch.allclose(scales.float(), coded.scales, rtol=1e-6)
    if not symmetric:
        assert coded.zeros is not None
        assert torch.equal(zeros.to(torch.int16) + 8, coded.zeros.to(torch.int16))
        packed_zeros = pack_to_int32((coded.zeros.to(torch.int16) - 8).to(torch.int8), 4, packed_dim=0)
        assert torch.equal(packed_zeros, parts["weight_zero_point"])


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_never_raises_an_output_s_error(symmetric: bool) -> None:
    weight, states = torch.randn(40, 128, generator=torch.Generator().manual_seed(3)), spread_states(600, 128)
    moment = states.T @ states / len(states)

    def error(coded: Coded) -> Tensor:
        return output_error(coded.values() - weight, moment)

    before, after = (error(f(weight, *a, 32, symmetric, torch.float16)) for f, a in ((nearest, ()), (clipped, (moment,))))
    assert bool((after <= before * (1 + 1e-4)).all()) and float(after.sum()) < 0.85 * float(before.sum())
    # what is computed from moments is the error of the outputs themselves
    outputs = states @ (clipped(weight, moment, 32, symmetric, torch.float16).values() - weight).T
    assert torch.allclose(after, outputs.square().mean(0), rtol=1e-3)


@pytest.mark.parametrize("raised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_divided_by_what_its_stored_weight_can_say(raised: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)
    weight, scale = torch.randn(64, generator=g).to(dtype).float(), torch.rand(64, generator=g) * 3 + 0.2
    weight[5] = -1.0 if raised else 0.0  # a channel that the norm closes
    after, exact = divide_norm(weight, scale, raised, dtype)
    one = 1.0 if raised else 0.0
    assert torch.equal(after.to(dtype).float(), after)
    assert torch.allclose((after + one) * exact, weight + one, rtol=1e-6, atol=0)
    assert float(exact[5]) == 1.0 and torch.equal(after[5], weight[5])
    clear = (weight + one).abs() > 0.3  # 1 + a weight near -1 has few of bfloat16's bits
    assert torch.allclose(exact[clear], scale[clear], rtol=0.05)
    again, same = divide_norm(weight, exact, raised, dtype)
    assert torch.allclose(again, after, rtol=1e-6, atol=1e-6) and torch.allclose(same, exact, rtol=1e-5)


def streamed(folder: Path, ids: Tensor = IDS) -> tuple[Walk, Stream]:
    source = open_source(folder)
    walk, stream = Walk(source, Weights(source), "cpu"), Stream("text", [ids])
    walk.embed([stream])
    return walk, stream


def want_states(folder: Path) -> Tensor:
    from flashhead_edge.capture import capture_ids

    return capture_ids(load_model(folder), IDS[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_run_one_by_one_are_the_model(family: str, tmp_path: Path) -> None:
    folder = save_body(tmp_path / "model", family)
    walk, stream = streamed(folder)
    for i in range(2):
        with walk.layer(i) as (layer, _):
            walk.advance(i, layer, stream)
        assert all(p.is_meta for p in walk.layers[i].parameters())  # one layer in memory
    assert torch.allclose(walk.head_states(stream)[0][0], want_states(folder), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_leaves_a_layer_what_it_is(family: str, tmp_path: Path) -> None:
    """Any scale of a site's inputs, its columns multiplied with it: in float32 nothing but rounding is left."""
    folder = save_body(tmp_path / "model", family, torch.float32)
    walk, stream = streamed(folder)
    sites, settings = layout(open_source(folder).config, family), Settings(32, True, walk.config)
    generator = torch.Generator().manual_seed(7)
    with walk.layer(0) as (layer, dtypes):
        want, means = walk.step(0, layer, stream.states[0]), moments(walk, 0, layer, [s.linears for s in sites], stream)
        for site, mean in zip(sites, means, strict=True):
            if site.before is None:
                continue
            channels = len(shared(site, mean.diagonal(), settings.config))
            scale = torch.rand(channels, generator=generator) * 3 + 0.3
            if not site.rows:
                scale = divide_norm(layer.get_parameter(f"{site.before}.weight").data, scale, site.raised, torch.float32)[1]
            inputs = spread(site, scale, len(mean), settings.config)
            fold(layer, site, scale, inputs, dtypes, settings, {})
            assert not torch.allclose(walk.step(0, layer, stream.states[0]), want, atol=1e-2)
            for name in site.linears:
                layer.get_parameter(f"{name}.weight").data *= inputs
            got = walk.step(0, layer, stream.states[0])
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max())), site


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_chosen_is_no_worse_than_rounding(family: str, symmetric: bool, tmp_path: Path) -> None:
    """On the states that it is chosen on, each site: and clipping alone always finds something."""
    folder = save_body(tmp_path / "model", family)
    ids = torch.randint(0, 127, (8, 64), generator=torch.Generator().manual_seed(5))
    walk, stream = streamed(folder, ids)
    sites, settings = layout(open_source(folder).config, family), Settings(32, symmetric, walk.config)
    with walk.layer(0) as (layer, dtypes):
        means = moments(walk, 0, layer, [s.linears for s in sites], stream)
        outer: dict[str, Tensor] = {}
        for site, mean in zip(sites, means, strict=True):
            chosen = choose_site(layer, site, mean, dtypes, settings, outer)
            assert chosen.error < 0.95 * chosen.nearest, site
            for name, coded in chosen.coded.items():
                assert torch.equal(layer.get_parameter(f"{name}.weight").data, coded.values())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer samples than any real model should be given."""
    monkeypatch.setattr(running, "_check", lambda *_: None)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "given.txt"
    path.write_text(" ".join(f"t{(7 * i * i + 3 * i) % 126}" for i in range(1400)))
    return path


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("family", "symmetric"), [("llama_tied", True), ("phi3", False), ("gemma3", True), ("qwen3", False)])
def test_a_quantised_checkpoint(family: str, symmetric: bool, text: Path, tmp_path: Path) -> None:
    """Head and embedding are the model's, every projection is packed, the report is true, and what is made of it reads it."""
    folder = save_body(tmp_path / "model", family)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The original\n")
    out = tmp_path / "out"
    report = quantize(folder, out, group=32, symmetric=symmetric, texts=[str(text)], positions=1000, measured=600)
    again = quantize(folder, tmp_path / "again", group=32, symmetric=symmetric, texts=[str(text)], positions=1000, measured=600)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert {k: v for k, v in report.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert torch.equal(read_head(out).weight, read_head(folder).weight) and read_head(out).fingerprint == read_head(folder).fingerprint
    linear = [n for n in before if n.endswith("_proj.weight")]
    assert not any(n in after for n in linear)
    assert all(after[n.replace("weight", "weight_packed")].shape == (before[n].shape[0], before[n].shape[1] // 8) for n in linear)
    assert all(after[n.replace("weight", "weight_scale")].dtype == torch.bfloat16 for n in linear)
    assert report["bytes"]["after"] == sum(t.numel() * t.element_size() for t in after.values())
    assert report["bytes"]["before"] == sum(t.numel() * t.element_size() for t in before.values())
    assert report["output_error"]["ours"] < report["output_error"]["nearest"]
    config = json.loads((out / "config.json").read_text())
    assert config["flashhead_quantize"]["texts"] == json.loads(json.dumps(report["texts"]))
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] == symmetric
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# model in 4 bits") or card.startswith("---\nlicense: mit\n---\n\n# model in 4 bits")
    assert "# The original" in card and "| given.txt | 600 |" in card
    # the report's figures are those of the checkpoint as it is read
    source = open_source(out)
    scheme = quantised.quantisation(source.config, out)
    assert scheme is not None
    floats = dict(quantised.dequantised(scheme, set(after), after.__getitem__, torch.float32, "m"))
    plain = save_body(tmp_path / "plain", family, torch.float32)
    save_file({n: t.float() for n, t in floats.items()}, plain / "model.safetensors", {"format": "pt"})
    batches = running._windows(__import__("transformers").AutoTokenizer.from_pretrained(folder), "t", text.read_text(), 600)
    lost, same, total = [], 0, 0
    ours, original = load_model(plain), load_model(folder)
    with torch.no_grad():
        for ids in batches:
            logits, wanted = (m(input_ids=ids).logits[..., : read_head(out).vocab_size].float() for m in (ours, original))
            lost.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
            same, total = same + int((logits.argmax(-1) == wanted.argmax(-1)).sum()), total + ids.numel()
    told = report["texts"][1]
    assert abs(float(torch.cat(lost).double().mean().exp()) / told["ours"]["perplexity"] - 1) < 1e-4
    assert abs(same / total - told["ours"]["top1_agreement"]) < 0.004  # two tokens of 600: another order of sums
    # and flashhead convert copies it byte for byte
    converted = save_checkpoint(out, tmp_path / "converted")
    assert (converted / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert load_model(converted)(input_ids=IDS).logits.isfinite().all()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("symmetric", [True, False])
def test_transformers_reads_it_through_compressed_tensors(symmetric: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("compressed_tensors")
    folder, out = save_body(tmp_path / "model", "llama"), tmp_path / "out"
    quantize(folder, out, group=32, symmetric=symmetric, positions=1000)
    tensors = load_file(out / "model.safetensors")
    scheme = json.loads((out / "config.json").read_text())["quantization_config"]
    floats = dict(quantised.dequantised(scheme, set(tensors), tensors.__getitem__, torch.float32, "m"))
    plain = save_body(tmp_path / "plain", "llama", torch.float32)
    save_file({n: t.float() for n, t in floats.items()}, plain / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        want, got = load_model(plain)(input_ids=IDS).logits, load_model(out)(input_ids=IDS).logits
    model = load_model(out)
    with torch.no_grad(), recording(model, compute=False) as seen:  # the head's forward is replaced before the first text
        model(input_ids=IDS)
    assert seen[0].shape[:2] == IDS.shape
    # with zero points compressed-tensors 0.20 fails on what it wrote itself: we read those
    assert ("turned into floats in memory" in caplog.text) == (not symmetric)
    # transformers may make the weights in bfloat16: 8 bits of each
    assert float((got - want).abs().max()) < 0.05 * float(want.abs().max())


@pytest.mark.usefixtures("quick")
def test_only_what_is_ours_is_overwritten(tmp_path: Path) -> None:
    folder, out = save_body(tmp_path / "model", "llama"), tmp_path / "out"
    quantize(folder, out, group=32, positions=1000)
    with pytest.raises(CheckpointError, match="the output folder exists already"):
        quantize(folder, out, group=32, positions=1000)
    quantize(folder, out, group=32, symmetric=False, positions=1000, overwrite=True)
    assert any(n.endswith("weight_zero_point") for n in load_file(out / "model.safetensors"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="no FlashHead checkpoint"):
        quantize(folder, tmp_path / "mine", group=32, positions=1000, overwrite=True)


@pytest.mark.usefixtures("quick")
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any write: after seconds here, after an hour elsewhere."""
    folder, written, real = save_body(tmp_path / "model", "llama"), [0], os.write

    def full(fd: int, data: bytes) -> int:
        written[0] -= 1
        if written[0] == 0:
            raise OSError(28, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", full)
    for at in (1, 2, 3):
        written[0] = at
        with pytest.raises(FlashHeadError, match="writing failed, the disk is full"):
            quantize(folder, tmp_path / "out", group=32, positions=1000)
        assert content(tmp_path / "out") == "absent" and sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_what_is_refused_before_any_work(tmp_path: Path) -> None:
    folder, out = save_body(tmp_path / "model", "llama"), tmp_path / "out"

    def refused(model: Path, error: type[Exception], **options: Any) -> str:
        with pytest.raises(error) as found:
            quantize(model, out, **options)
        assert not out.exists() and "\n" not in str(found.value)
        return str(found.value)

    assert refused(folder, SettingsError, group=48) == "groups of 48: expected one of 32, 64, 128; choose another"
    assert "has 64 inputs, expected a multiple of the group 128; pass --group 32" in refused(folder, SettingsError, group=128)
    assert "positions, expected at least 1,000" in refused(folder, SettingsError, positions=10)
    assert "calibration text nothing.txt: no such file" in refused(folder, SettingsError, group=32, texts=["nothing.txt"])
    both = tmp_path / "both.txt"
    both.write_text("t1 t2 t3")
    assert "given to calibrate on and to measure on" in refused(folder, SettingsError, group=32, texts=[str(both)], calibration=[str(both)])
    (tmp_path / "empty.txt").write_text("\n")
    assert "empty.txt: it is empty" in refused(folder, SettingsError, group=32, texts=[str(tmp_path / "empty.txt")])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}}))
    assert "the weights are quantised already (awq), expected a model in bfloat16, float16 or float32" in refused(folder, UnsupportedModelError)
    (folder / "config.json").write_text(json.dumps(config | {"flash_head_cache_dir": "flash_head_assets"}))
    assert "a FlashHead checkpoint, whose head is calibrated on its body in floats" in refused(folder, CheckpointError)


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "opt"])
def test_families_whose_linear_layers_are_not_known(family: str, tmp_path: Path) -> None:
    from small_models import small_model

    small_model(family).save_pretrained(tmp_path / family)
    save_tokenizer(tmp_path / family)
    with pytest.raises(UnsupportedModelError, match="the linear layers of .* are not known here, expected one of the families Cohere, Gemma, Gemma2"):
        quantize(tmp_path / family, tmp_path / "out", group=32)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick")
def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    folder = save_body(tmp_path / "model", "llama", torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN or infinit"):
        quantize(folder, tmp_path / "out", group=32, positions=1000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    with pytest.raises(CheckpointError, match=r"model: model.layers.1.mlp.down_proj.weight has NaN or infinite values, expected finite numbers"):
        Weights(open_source(folder))("model.layers.1.mlp.down_proj.weight")


def test_weights_of_several_files(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, limit=100)
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 200} and sorted(set(index["weight_map"].values())) == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.usefixtures("quick")
def test_a_qwen3_vl_s_text_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers run and are coded like Qwen3's; what stands outside them is left, and named in the config."""
    import small_models

    folder, out = tmp_path / "model", tmp_path / "out"
    monkeypatch.setitem(small_models.SIZES, "intermediate_size", 64)
    small_models.small_model("qwen3_vl").save_pretrained(folder)
    save_tokenizer(folder)
    walk, stream = streamed(folder)
    for i in range(2):
        with walk.layer(i) as (layer, _):
            walk.advance(i, layer, stream)
    assert torch.allclose(walk.head_states(stream)[0][0], want_states(folder), atol=1e-5)
    quantize(folder, out, group=32, positions=1000)
    tensors, left = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in left and any("visual" in name for name in left) and not any("language_model.layers" in name for name in left)
    assert {n.split(".")[1] for n in tensors if n.endswith("weight_packed")} == {"language_model"}
    assert load_model(out)(input_ids=IDS).logits.isfinite().all()


def test_every_family_s_layout_names_what_transformers_has() -> None:
    import transformers as t

    known = {BODIES[f](t).config.architectures[0] if BODIES[f](t).config.architectures else type(BODIES[f](t)).__name__ for f in FAMILIES}
    assert known | {"CohereForCausalLM", "Qwen3VLForConditionalGeneration"} == set(LAYOUTS)
