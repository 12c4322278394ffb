"""A checkpoint through the CUDA backend: its program made once, its engine over an emulated GPU, and what is said where it cannot be."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from cuda_emulator import FACTS, emulated
from small_exports import write_exportable, write_with_index
from small_heads import everything_open

from flashhead_edge.checkpoint.jsonfiles import read_json
from flashhead_edge.errors import DeviceError, EngineError, SettingsError
from flashhead_edge.generation import stream
from flashhead_edge.jetson import cuda_backend, cuda_folder, cuda_library, cuda_program, cuda_session, driver, open_engine
from flashhead_edge.jetson.board import board_named
from flashhead_edge.jetson.cuda_memory import UNIT, device_bytes
from flashhead_edge.jetson.plan import plan
from flashhead_edge.packed.folder import FolderWeights
from flashhead_edge.program import kept as programs
from flashhead_edge.program.head import Device

try:
    cuda_library.library()
except EngineError as error:
    pytest.skip(str(error), allow_module_level=True)

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = write_exportable(folder / "model", **SIZES)
    return write_with_index(model, folder / "out", lambda w, fingerprint: everything_open(w, fingerprint=fingerprint))


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An emulated GPU and an empty cache: the programs that have been opened."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    opened: list = []
    with ExitStack() as held:

        def open_program(program, settings, fingerprint, stream=None, **options):
            opened.append(program)
            m, _ = held.enter_context(emulated(program))
            return cuda_backend.Cuda(m, cuda_backend.export_settings(program, settings, fingerprint))

        monkeypatch.setattr(cuda_folder, "device_facts", lambda: FACTS)
        monkeypatch.setattr(cuda_folder, "open_program", open_program)
        yield opened


def test_an_engine_over_a_checkpoint_decodes(checkpoint: Path, gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's text is the device's; the program is made once, and opened as it lies the second time."""
    engine = open_engine(checkpoint, "cuda")
    assert engine.context_length == cuda_folder.CONTEXT and engine.vocab_size == 256 and engine.stop_ids == {255}
    prompt = engine.tokenizer("Once upon a time")["input_ids"]
    by_loop = [token.id for token in stream(engine, prompt, 12)]
    on_device = [int(t[0]) for t in engine.backend.decode([prompt], 12)]
    assert len(by_loop) > 1 and by_loop == on_device[: len(by_loop)]
    (kept,) = programs.programs_folder().iterdir()
    assert gpu[0].folder == kept and engine.backend.about["backend"] == "cuda"
    monkeypatch.setattr(programs, "build_program", None)
    for folder in (checkpoint, kept):
        cuda_folder.open_folder(folder)
    assert [p.folder for p in gpu] == [kept] * 3
    assert [p.name for p in programs.programs_folder().iterdir()] == [kept.name]


def test_program_that_came_with_the_installation_is_opened_as_it_lies(checkpoint: Path, gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`flashhead bundle` made it, for the device that is here; where another context is asked one is made here."""
    from flashhead_edge.program import ahead

    monkeypatch.setattr(ahead, "ahead_folder", lambda: tmp_path / "share")
    settings = cuda_folder.program_settings(cuda_folder.read_json(checkpoint / "config.json"))
    here = Device(FACTS.multiprocessors, FACTS.shared_bytes, FACTS.capability)
    (program,) = ahead.write_ahead(tmp_path / "share", checkpoint, [here], **settings)
    cuda_folder.open_folder(checkpoint)
    assert gpu[0].folder == program.folder and not programs.programs_folder().exists()
    cuda_folder.open_folder(checkpoint, context=64)
    assert gpu[1].context == 64 and len(list(programs.programs_folder().iterdir())) == 1


@pytest.mark.parametrize("backend", ["cuda", "auto"])  # auto takes it where there is no torch, as on a board
def test_first_start_says_what_it_makes(backend: str, checkpoint: Path, gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take minutes: the command line's progress hears of each part."""
    from flashhead_edge.cli import sampling

    monkeypatch.setattr(sampling, "find_spec", lambda name: None)
    monkeypatch.setattr(driver, "device_facts", lambda: FACTS)
    said: list[str] = []
    options = dict.fromkeys(("threads", "torch_device", "trust_remote_code", "standard_operators", "plugin", "context"))
    sampling.open_engine(checkpoint, {"backend": backend, **options}, lambda text, _: said.append(text))
    assert said[0] == "reading the head" and any(text.startswith("weights: ") for text in said)


def test_settings_make_a_program_of_their_own(checkpoint: Path, gpu) -> None:
    cuda_folder.open_folder(checkpoint, precision="bfloat16", context=64, batch=3)
    assert (gpu[0].precision, gpu[0].context, gpu[0].batch) == ("bfloat16", 64, 3)
    for context in (1, 8193):
        with pytest.raises(SettingsError, match=f"cuda backend: the context is {context:,}, expected 2 to the model's 8,192 positions"):
            cuda_folder.open_folder(checkpoint, context=context)


@pytest.mark.parametrize(
    ("config", "precision"),
    [({"dtype": "bfloat16"}, "bfloat16"), ({"torch_dtype": "float16"}, "float16"), ({"dtype": "float32"}, "float16"), ({}, "float16")],
)
def test_activations_are_of_the_checkpoints_type(config: dict, precision: str) -> None:
    assert cuda_folder.precision_of(config) == precision


def test_verbs_say_what_is_missing(checkpoint: Path, exported, flashhead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libno-such-driver.so.1")
    driver.library.cache_clear()
    try:
        code, out, err = flashhead("generate", checkpoint, "--backend", "cuda", "--prompt", "x")
        assert (code, out) == (1, "") and "GPU: libno-such-driver.so.1 cannot be loaded" in err and "with an NVIDIA GPU, or on another backend" in err
        code, out, err = flashhead("plan", checkpoint, "--backend", "cuda")
        assert code == 0 and "no GPU is here: launches are counted as an AGX Orin 64 GB has them" in " ".join(out.split())
        code, out, err = flashhead("plan", checkpoint, "--backend", "cuda", "--memory", "orin-nano-8gb")
        assert code == 0 and "no GPU is here" not in " ".join(out.split())
    finally:
        driver.library.cache_clear()
    code, out, err = flashhead("generate", exported(), "--backend", "cuda", "--prompt", "x")
    assert code == 2 and "is not a checkpoint, which --backend cuda runs: give the checkpoint" in err
    code, out, err = flashhead("generate", checkpoint, "--backend", "cuda", "--plugin", "x.so", "--prompt", "x")
    assert code == 2 and "--plugin is for the tensorrt backend, and " in err


def test_the_verbs_take_a_context(checkpoint: Path, gpu, flashhead) -> None:
    """Of the cuda backend; another's cache is not made by its length."""
    code, out, err = flashhead("generate", checkpoint, "--backend", "cuda", "--context", 48, "--max-new-tokens", 4, "--prompt", "Once")
    assert code == 0 and out, err
    code, out, err = flashhead("chat", checkpoint, "--backend", "cuda", "--context", 80, "--max-new-tokens", 4, stdin="Once\n/exit\n")
    assert code == 0 and out, err
    assert [p.context for p in gpu] == [48, 80]
    code, out, err = flashhead("generate", checkpoint, "--backend", "cuda", "--context", 9000, "--prompt", "Once")
    assert (code, out) == (2, "") and "cuda backend: the context is 9,000, expected 2 to the model's 8,192 positions" in err
    for verb, more in (("generate", ("--prompt", "x")), ("chat", ()), ("serve", ())):
        code, out, err = flashhead(verb, checkpoint, "--backend", "torch", "--context", 64, *more)
        assert (code, out) == (2, "") and "--context is for the cuda backend, and " in err
    with pytest.raises(SettingsError, match="the context is 64 and the backend onnxruntime, expected cuda"):
        open_engine(checkpoint, "onnxruntime", context=64)


def test_a_program_keeps_its_context_and_precision(checkpoint: Path, gpu) -> None:
    cuda_folder.open_folder(checkpoint, context=64)
    made = gpu[0].folder
    cuda_folder.open_folder(made, context=64, precision="float16")
    with pytest.raises(SettingsError, match="the context is 65, expected 64, which the program was made for"):
        cuda_folder.open_folder(made, context=65)
    with pytest.raises(SettingsError, match="the precision is bfloat16, expected float16, which the program was made for"):
        cuda_folder.open_folder(made, precision="bfloat16")


@pytest.mark.parametrize(("context", "batch"), [(64, 1), (4096, 1), (1000, 5)])
def test_a_plan_is_what_the_backend_allocates(context: int, batch: int, checkpoint: Path, gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte of the range, before a program is written; no matrix is read but for the rows that say how it is stored."""
    read: list[tuple[str, int | None]] = []
    real = FolderWeights.linear
    monkeypatch.setattr(FolderWeights, "linear", lambda self, name, rows=None: read.append((name, rows)) or real(self, name, rows))
    need = cuda_folder.need_of_checkpoint(checkpoint, context, batch)
    assert read and all(rows == 16 for _, rows in read) and not gpu
    cuda_folder.open_folder(checkpoint, context=context, batch=batch)
    program = gpu[0]
    head = cuda_program.head_of(program)
    layout = cuda_program.memory_plan(program, head, cuda_library.limits_of(FACTS), min(cuda_session.CHUNK, context), 0)
    assert need.total(context, batch) == device_bytes(layout.size) and need.cache(context, batch) == layout.cache_bytes
    assert need.weights + need.index + need.exact_rows == sum(size for name, (_, size) in program.places.items() if not name.startswith("rotations"))
    assert need.scratch >= 0 and need.limit == 8192
    opened = cuda_folder.open_folder(checkpoint, context=context, batch=batch).need  # what a run's report counts bytes by
    assert (opened.weights, opened.tables, opened.layers) == (need.weights, need.tables, need.layers)
    assert need.tables == (0 if read_json(checkpoint / "config.json")["tie_word_embeddings"] else 2 * 256 * SIZES["hidden_size"])


def test_up_to_eight_texts_share_a_program_and_are_planned_as_they_are_allocated(checkpoint: Path, gpu) -> None:
    """What `plan --batch` says is what `serve --at-once` allocates; more texts are a program of their own."""
    for batch in (1, 8, 9):
        need = cuda_folder.need_of_checkpoint(checkpoint, None, batch)
        assert open_engine(checkpoint, "cuda", texts=batch).backend.most_texts == batch == gpu[-1].batch
        layout = cuda_program.memory_plan(gpu[-1], cuda_program.head_of(gpu[-1]), cuda_library.limits_of(FACTS), cuda_session.CHUNK, 0)
        assert need.total(4096, batch) == device_bytes(layout.size) and need.cache(4096, batch) == layout.cache_bytes
    assert gpu[0].folder == gpu[1].folder != gpu[2].folder


def test_more_texts_than_a_step_takes_are_refused_before_anything_is_read(checkpoint: Path, gpu, flashhead) -> None:
    for asked in (lambda: cuda_folder.open_folder(checkpoint, batch=33), lambda: cuda_folder.need_of_checkpoint(checkpoint, None, 33)):
        with pytest.raises(SettingsError, match="cuda backend: 33 texts at once, expected 1 to 32; ask for fewer"):
            asked()
    code, out, err = flashhead("plan", checkpoint, "--backend", "cuda", "--batch", "64")
    assert (code, out) == (2, "") and "64 texts at once, expected 1 to 32" in err and not gpu


def test_texts_that_do_not_fit_are_refused_before_a_program_is_made(checkpoint: Path, gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    need = cuda_folder.need_of_checkpoint(checkpoint, None, 8)
    monkeypatch.setattr(cuda_folder, "device_facts", lambda: dataclasses.replace(FACTS, free_bytes=need.total(4096, 8) - 1))
    with pytest.raises(DeviceError, match=r"4,096 positions at batch 8 need about \d+ MiB .*positions fit: use a shorter context, or fewer texts at once$"):
        cuda_folder.open_folder(checkpoint, batch=8)
    assert not gpu and not programs.programs_folder().exists()
    cuda_folder.open_folder(checkpoint, batch=1)
    assert len(gpu) == 1


def test_other_contexts_and_batches_are_near(checkpoint: Path, gpu) -> None:
    """From one need to another context: launches and a unit of the device's memory apart."""
    need = cuda_folder.need_of_checkpoint(checkpoint, 1024)
    for context in (512, 4096):
        assert abs(need.total(context) - cuda_folder.need_of_checkpoint(checkpoint, context).total(context)) <= 2 * UNIT


def test_a_named_board_has_its_own_launches_and_room_for_the_program(checkpoint: Path, gpu, monkeypatch) -> None:
    """On a board the context comes out of the model's memory; launches are those of its own multiprocessors, not of this machine's GPU."""
    asked, made = [], cuda_folder.checkpoint_need
    monkeypatch.setattr(cuda_folder, "checkpoint_need", lambda folder, facts, **settings: asked.append(facts) or made(folder, facts, **settings))
    here = plan(checkpoint, backend="cuda", memory="8GB")
    needs = {name: plan(checkpoint, backend="cuda", memory=name) for name in ("orin-nano-8gb", "agx-thor")}
    for need in needs.values():
        assert need["parts"]["runtime"] - here["parts"]["runtime"] == cuda_folder.BOARD_RUNTIME
        assert cuda_folder.BOARD_NOTE in need["notes"]
    boards = [board_named(name) for name in needs]
    assert [(f.multiprocessors, f.shared_bytes) for f in asked[1:]] == [(b.multiprocessors, b.shared_bytes) for b in boards]
    assert asked[0].multiprocessors not in {b.multiprocessors for b in boards}


def test_the_plan_verb_knows_the_backend(checkpoint: Path, exported, flashhead, gpu) -> None:
    code, out, _ = flashhead("plan", checkpoint, "--backend", "cuda", "--memory", "8GB", "--json")
    document = json.loads(out)
    assert code == 0 and document["runtime"] == "cuda" and document["fits"] and document["context"] == 4096 and document["context_limit"] == 8192
    assert document["needed"] == sum(document["parts"].values())
    code, _, err = flashhead("plan", exported(), "--backend", "cuda")
    assert code == 2 and "which the cuda backend runs; run flashhead convert" in err


def test_what_does_not_fit_the_gpu_is_refused_before_a_kernel_is_compiled(checkpoint: Path, gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_folder.open_folder(checkpoint, context=4096)
    small = dataclasses.replace(FACTS, free_bytes=3 << 20)
    monkeypatch.setattr(cuda_session, "device_facts", lambda: small)
    monkeypatch.setattr(cuda_session, "ready", None)
    with pytest.raises(DeviceError, match=r"4,096 positions at batch 1 need about \d+ MiB \(predicted\), 3 MiB are free \(this GPU\), expected room for all; "):
        cuda_session.open_model(gpu[0])
