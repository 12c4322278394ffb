"""Engines in processes of their own: the families, several ranks, drafts, adapters, and what is refused at start."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: see docs/vllm.md")

from vllm_engine.made import COMMON, FAMILIES, HIDDEN_SIZE, QUANTISED, SEEING, VOCAB_SIZE, free_port, made_model
from vllm_engine.run_engine import MARK

PROMPTS = [[random.Random(i).randrange(3, VOCAB_SIZE) for _ in range(6 + i)] for i in range(5)]
HERE = Path(__file__).parent


def engine(options, tokens=16, **task):
    """What an engine says, and its log."""
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    text = json.dumps({"options": options, "prompts": PROMPTS, "tokens": tokens, **task})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, HERE / "run_engine.py"], input=text, capture_output=True, text=True, timeout=500, env=environment, check=False)
    log = done.stdout + done.stderr
    found = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    return json.loads(found[0]) if found else None, log


def alike(found, dense):
    """Whether FlashHead's tokens are the dense head's: all; on a GPU most, up to the first of a text that differs, for the dense head rounds to 16 bits."""
    if not torch.cuda.is_available():
        return bool(found == dense)
    steps = [next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), len(x)) for x, y in zip(found, dense)]
    return sum(steps) > 0.8 * sum(map(len, found))


def multiplies_integers():
    """Whether vLLM's kernels here take integer weights: its build for AVX2 alone lacks the product, those for AVX-512 have it."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return torch.cuda.is_available() or hasattr(torch.ops._C, "cpu_gemm_wna16")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folders of made checkpoints, by family."""
    folders = {}

    def folder(family):
        if family not in folders:
            folders[family] = made_model(tmp_path_factory.mktemp("made") / "model", family)
        return folders[family]

    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_the_dense_heads_tokens(made, family):
    result, log = engine({"model": made(family), "additional_config": {"flashhead": {"crossover": "never"}}}, dense=True)
    assert result, log[-3000:]
    assert "FlashHead is active on" in log
    assert alike(result["tokens"], result["dense"]) and len(set(map(tuple, result["tokens"]))) > 1
    assert result["counts"]["states_flash"] >= 16 * len(PROMPTS) and result["counts"]["states_dense"] == 0


@pytest.mark.parametrize("family", SEEING)
def test_a_model_that_sees_gives_the_dense_heads_tokens_of_texts(made, family):
    pytest.importorskip("torchvision", reason="vLLM's multimodal models need it")
    # Qwen3.5's linear attention reads vLLM's choice of kernel here: the default of an H100 needs flashinfer
    options = {"model": made(family), "additional_config": {"flashhead": {"crossover": "never"}, "gdn_prefill_backend": "triton"}, "skip_tokenizer_init": False}
    result, log = engine(options | {"limit_mm_per_prompt": {"image": 0, "video": 0}}, dense=True)
    assert result, log[-3000:]
    assert "FlashHead is active on" in log
    assert alike(result["tokens"], result["dense"]) and len(set(map(tuple, result["tokens"]))) > 1
    assert result["counts"]["states_flash"] >= 16 * len(PROMPTS) and result["counts"]["states_dense"] == 0


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two ranks need two GPUs, or none")
def test_two_ranks_give_the_tokens_of_one(tmp_path):
    """The vocabulary is no multiple of the padding: the second rank's last rows are none. Margins are narrow: which clusters open decides the token."""
    folder = made_model(tmp_path / "narrow", "Llama", narrow=True)
    alone, log = engine({"model": folder}, dense=True)
    assert alone, log[-3000:]
    assert alone["tokens"] != alone["dense"]
    both, log = engine(
        {"model": folder, "distributed_executor_backend": "mp", "tensor_parallel_size": 2, "additional_config": {"flashhead": {"metrics_port": free_port()}}}
    )
    assert both, log[-3000:]
    assert both["tokens"] == alone["tokens"]
    assert log.count("FlashHead is active on") == 1  # the first rank says so


@pytest.mark.parametrize("family", ["Llama", "Llama, tied"])
def test_a_reload_of_other_weights_ends_in_a_sentence(made, tmp_path, family):
    """Never tokens of half a model: the first step after it says so, and answers nothing."""
    other = changed(made(family), tmp_path, move_weights)
    found, log = engine({"model": made(family)}, reload=str(made(family)))
    assert found and found["reloaded"] == found["tokens"], log[-3000:]
    found, log = engine({"model": made(family)}, reload=str(other))
    assert found is None and "reloaded with other weights: the output head" in log, log[-3000:]


@pytest.mark.gpu  # vLLM's build for CPUs repacks linear layers, and saves them no more
def test_a_sharded_state_loads_with_its_head(made, tmp_path):
    """As vLLM's example for it does: the shards beside the checkpoint's other files."""
    folder, shards = made("Llama, tied"), tmp_path / "shards"
    shutil.copytree(folder, shards, ignore=shutil.ignore_patterns("model*.safetensors"))
    saved, log = engine({"model": folder}, save=str(shards))
    assert saved, log[-3000:]
    loaded, log = engine({"model": shards, "load_format": "sharded_state"})
    assert loaded, log[-3000:]
    assert "FlashHead is active on" in log and loaded["tokens"] == saved["tokens"]


def test_weights_are_streamed(made):
    pytest.importorskip("runai_model_streamer", reason="needs runai-model-streamer")
    folder = made("Llama, tied")
    want, log = engine({"model": folder})
    assert want, log[-3000:]
    streamed, log = engine({"model": folder, "load_format": "runai_streamer"})
    assert streamed, log[-3000:]
    assert "FlashHead is active on" in log and streamed["tokens"] == want["tokens"]


@pytest.mark.gpu
def test_it_sleeps_and_wakes(made):
    """Level 1 moves the weights to the host and back, level 2 drops them and reads them again; the head's own memory with them."""
    options = {"enable_sleep_mode": True, "gpu_memory_utilization": 0.3, "additional_config": {"flashhead": {"crossover": "never"}}}
    found, log = engine({"model": made("Llama"), **options}, sleep=[1, 2, 1], dense=True)
    assert found, log[-3000:]
    assert found["awake"] == [found["tokens"]] * 3 and alike(found["tokens"], found["dense"])
    assert found["counts"]["states_flash"] >= 4 * 16 * len(PROMPTS) and found["counts"]["states_dense"] == 0


@pytest.mark.parametrize("scheme", [pytest.param(name, marks=pytest.mark.gpu if name == "FP8" else ()) for name in QUANTISED])
def test_a_quantised_body_keeps_the_head(tmp_path, scheme):
    """Random codes: FlashHead's tokens are the dense head's up to what 16-bit logits round away."""
    if not multiplies_integers():
        pytest.skip("vLLM's build for processors with AVX2 alone has no product of 4-bit weights")
    found, log = engine({"model": made_model(tmp_path / "model", "Llama", scheme=scheme), "dtype": "float16"}, dense=True)
    assert found, log[-3000:]
    assert "FlashHead is active on" in log and found["counts"]["states_flash"] >= 16 * len(PROMPTS)
    pairs = [(a, b) for x, y in zip(found["tokens"], found["dense"]) for a, b in zip(x, y)]
    assert sum(a == b for a, b in pairs) > 0.5 * len(pairs)


def test_a_pooling_model_is_left_alone(made):
    result, log = engine({"model": made("Llama"), "runner": "pooling"}, embed=True)
    assert result and result["width"] == HIDDEN_SIZE, log[-3000:]
    assert "FlashHead is active" not in log


def test_drafts_of_n_grams_change_no_token(made):
    alone, log = engine({"model": made("Llama")}, tokens=40)
    assert alone, log[-3000:]
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    drafted, log = engine({"model": made("Llama"), "speculative_config": drafts}, tokens=40)
    assert drafted, log[-3000:]
    assert drafted["tokens"] == alone["tokens"] and drafted["drafted"] > 0
    assert "exact_for has no effect" in log and "the dense head for requests with" not in log


def plain(copy):
    """Give a copy of a checkpoint its original architecture."""
    config = json.loads((copy / "config.json").read_text())
    config["architectures"] = [name.removeprefix("FlashHead") for name in config["architectures"]]
    (copy / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("target", ["plain", "FlashHead"])
def test_a_flashhead_drafts_for_the_same_model(made, tmp_path, target):
    """Its metrics port is opened once, and the target's text is the target's."""
    folder = made("Llama")
    model = changed(folder, tmp_path, plain) if target == "plain" else folder
    alone, log = engine({"model": model}, tokens=40)
    assert alone, log[-3000:]
    settings = {"flashhead": {"metrics_port": free_port()}}
    drafts = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}
    drafted, log = engine({"model": model, "speculative_config": drafts, "additional_config": settings}, tokens=40)
    assert drafted, log[-3000:]
    assert drafted["tokens"] == alone["tokens"]
    assert drafted["accepted"] >= 0.99 * drafted["drafted"] > 0
    assert log.count("FlashHead is active on") == (1 if target == "plain" else 2)


def test_smollm2_drafts_for_itself(checkpoint, tmp_path):
    """Of the tokens that it drafts one at a time the dense head accepts as many as its agreement promises, less one point."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = ["The capital of France is", "def fib(n):", "Once upon a time,", "Die Hauptstadt von Deutschland ist", "Water boils at", "In 1969,", "import os"]
    target = changed(checkpoint, tmp_path, plain)
    drafts = {"method": "draft_model", "model": str(checkpoint), "num_speculative_tokens": 1}
    found, log = engine({"model": target, "speculative_config": drafts}, tokens=64, prompts=[tokenizer(text).input_ids for text in texts])
    assert found, log[-3000:]
    assert found["drafted"] > 200
    assert found["accepted"] >= (0.995 - 0.01) * found["drafted"]


def eagle(folder):
    """An EAGLE draft of one random layer for a made Llama: embedding and head are the target's."""
    from safetensors.torch import save_file

    d, wide = HIDDEN_SIZE, COMMON["intermediate_size"]
    folder.mkdir()
    config = COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    key_rows = COMMON["num_key_value_heads"] * COMMON["head_dim"]
    shapes = {
        **{"self_attn.q_proj": (d, d), "self_attn.k_proj": (key_rows, d), "self_attn.v_proj": (key_rows, d), "self_attn.o_proj": (d, d)},
        **{"mlp.gate_proj": (wide, d), "mlp.up_proj": (wide, d), "mlp.down_proj": (d, wide)},
    }
    tensors = {f"layers.0.{name}.weight": torch.randn(shape) * 0.05 for name, shape in shapes.items()}
    tensors |= {"fc.weight": torch.randn(d, 2 * d) * 0.05, "layers.0.post_attention_layernorm.weight": torch.ones(d)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_eagles_drafts_change_no_token(made, tmp_path):
    """Its head is the target's, FlashHead and all."""
    alone, log = engine({"model": made("Llama")}, tokens=40)
    assert alone, log[-3000:]
    drafts = {"method": "eagle", "model": str(eagle(tmp_path / "eagle")), "num_speculative_tokens": 2}
    drafted, log = engine({"model": made("Llama"), "speculative_config": drafts}, tokens=40)
    assert drafted, log[-3000:]
    assert drafted["tokens"] == alone["tokens"] and drafted["drafted"] > 40
    assert log.count("FlashHead is active on") == 1


def predict_two(copy):
    """Give a copy of a made ERNIE its block of multi-token prediction, a random one."""
    from safetensors.torch import load_file, save_file

    tensors, d, wide = load_file(copy / "model.safetensors"), HIDDEN_SIZE, COMMON["intermediate_size"]
    first, block = "model.layers.0.", "model.mtp_block.0."
    tensors |= {name.replace(first, block): part.clone() for name, part in tensors.items() if name.startswith(first) and "mlp" not in name}
    shapes = {"mtp_block.0.mlp.gate_proj": (wide, d), "mtp_block.0.mlp.up_proj": (wide, d), "mtp_block.0.mlp.down_proj": (d, wide)}
    tensors |= {f"model.{name}.weight": torch.randn(shape) * 0.05 for name, shape in (shapes | {"mtp_linear_proj.0": (d, 2 * d)}).items()}
    tensors |= {f"model.{name}.0.weight": torch.ones(d) for name in ("mtp_emb_norm", "mtp_hidden_norm")}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})


def test_multi_token_prediction_changes_no_token(made, tmp_path):
    model = changed(made("ERNIE 4.5 MoE"), tmp_path, predict_two)
    alone, log = engine({"model": model}, tokens=40)
    assert alone, log[-3000:]
    drafted, log = engine({"model": model, "speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}, tokens=40)
    assert drafted, log[-3000:]
    assert drafted["tokens"] == alone["tokens"] and drafted["drafted"] > 40
    assert log.count("FlashHead is active on") == 1


def adapter(folder, module, rows):
    """A LoRA adapter of one module."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [module.rsplit(".", 1)[-1]], "base_model_name_or_path": "", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    a, b = torch.randn(4, HIDDEN_SIZE) * 0.1, torch.randn(rows, 4) * 0.1
    save_file({f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_of_the_body_works_and_one_of_the_head_is_refused(made, tmp_path):
    options = {"model": made("Llama"), "enable_lora": True, "max_lora_rank": 8}
    plain, log = engine(options)
    assert plain, log[-3000:]
    body, log = engine(options, lora=str(adapter(tmp_path / "body", "model.layers.0.self_attn.q_proj", HIDDEN_SIZE)))
    assert body and body["tokens"] != plain["tokens"], log[-3000:]
    head, log = engine(options, lora=str(adapter(tmp_path / "head", "lm_head", VOCAB_SIZE)))
    assert head is None and "lm_head" in log and "expected target modules" in log


def changed(folder, tmp_path, change):
    """A copy of a checkpoint with something about it changed."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    change(copy)
    return copy


def move_weights(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"] += 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_index(folder):
    for path in (folder / "flash_head_assets").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])


def lose_index(folder):
    shutil.rmtree(folder / "flash_head_assets")


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (move_weights, {}, "the head index was made for"),
        (cut_index, {}, "the file has"),
        (lose_index, {}, "index.safetensors: the file is missing"),
        (None, {"speed": 1}, "the setting speed is not known"),
    ],
    ids=["a fine-tune with the old index", "a damaged index", "no index", "an unknown setting"],
)
def test_a_start_that_cannot_be_says_why(made, tmp_path, change, settings, words):
    folder = made("Llama") if change is None else changed(made("Llama"), tmp_path, change)
    result, log = engine({"model": folder, "additional_config": {"flashhead": settings}})
    assert result is None and words in log, log[-3000:]


def pack_head(copy):
    config = json.loads((copy / "config.json").read_text())
    packed = {"lm_head": True, "modules_in_block_to_quantize": [["lm_head"]]}  # else vLLM looks at the file's tensors, and finds the head plain
    config["quantization_config"] = QUANTISED["GPTQ"] | packed
    (copy / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (pack_head, {"dtype": "float16"}, "the head's weights are packed ("),
        (None, {"dtype": "bfloat16", "hf_overrides": {"head_dtype": "float32"}}, "head_dtype is torch.float32 beside a model in torch.bfloat16"),
    ],
    ids=["a packed head", "head_dtype"],
)
def test_a_head_that_is_no_plain_matrix_is_refused(made, tmp_path, change, options, words):
    folder = made("Llama") if change is None else changed(made("Llama"), tmp_path, change)
    found, log = engine({"model": folder, **options})
    assert found is None and words in log, log[-3000:]


def test_a_port_that_is_taken_is_refused(made):
    """Two servers on one machine do not meet: each has a port of its own, or says so."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found, log = engine({"model": made("Llama"), "additional_config": {"flashhead": {"metrics_port": port}}})
    assert found is None and f"metrics_port {port}" in log, log[-3000:]


def test_nothing_is_written_beside_the_checkpoint(made, tmp_path):
    folder = changed(made("Llama"), tmp_path, lambda copy: None)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}
    found, log = engine({"model": folder})
    assert found, log[-3000:]
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))} == before


def test_a_head_in_another_type_than_it_is_stored_in_is_refused(made):
    found, log = engine({"model": made("Llama"), "dtype": "bfloat16"})
    assert found is None and "the output head, in bfloat16, has fingerprint" in log and "in the type that its head is stored in" in log, log[-3000:]


def release(copy):
    """Turn a copy of a checkpoint into one as the published method releases them: two files, no index of ours."""
    import torch.nn.functional as F
    from safetensors.torch import load_file, save_file

    assets = copy / "flash_head_assets"
    shutil.rmtree(assets)
    assets.mkdir()
    config = json.loads((copy / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("flash_head", "n_clusters")}
    weight = load_file(copy / "model.safetensors")["lm_head.weight"]
    assignments = torch.arange(len(weight)) % (clusters := len(weight) // 17)
    means = F.normalize(torch.stack([weight[assignments == i].float().mean(0) for i in range(clusters)]), dim=1).T.contiguous()
    save_file({"centroids": means, "cluster_assignments": assignments}, assets / "clustering_cache.safetensors")
    about = {"format": "safetensors", "vocab_size": len(weight), "hidden_size": weight.shape[1], "n_clusters": clusters}
    (assets / "clustering_config.json").write_text(json.dumps(about))
    (copy / "config.json").write_text(json.dumps(config | {"n_clusters": clusters, "n_probes": clusters}))


def test_a_released_checkpoint_of_two_files_is_served(made, tmp_path):
    """All of its clusters are probed: its tokens are the dense head's."""
    found, log = engine({"model": changed(made("Llama"), tmp_path, release)}, dense=True)
    assert found, log[-3000:]
    assert "FlashHead is active on" in log and "cannot be checked" in log and alike(found["tokens"], found["dense"])
    assert found["counts"]["states_flash"] >= 16 * len(PROMPTS) and found["counts"]["exact_rows"] > 0


def test_switched_off_and_plain_checkpoints(made, tmp_path):
    """Off is dense, and said; a plain checkpoint is not touched, with not one line of the plugin's."""
    folder = made("Llama")
    flash, _ = engine({"model": folder})
    off, log = engine({"model": folder, "additional_config": {"flashhead": {"enabled": False}}})
    assert off["tokens"] == flash["tokens"] and "FlashHead: switched off" in log and "FlashHead is active" not in log

    untouched, log = engine({"model": changed(folder, tmp_path, plain)})
    assert untouched["tokens"] == flash["tokens"] and "FlashHead" not in log.replace(str(tmp_path), "")
