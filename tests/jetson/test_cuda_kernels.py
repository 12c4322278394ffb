"""The kernels' code: which are asked for, how it is kept, and what is said where it cannot be made."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from flashhead_edge.errors import EngineError
from flashhead_edge.jetson import cuda_kernels, cuda_library, plugin_build
from flashhead_edge.jetson.driver import DeviceFacts
from flashhead_edge.jetson.nvrtc import find_nvrtc

FACTS = DeviceFacts("Made", 87, 16, 163 << 10, 1 << 30, 1 << 30, None, "13.0")
EMBEDDING = "_ZN2fh9embeddingINS_4Fp16EEEvPKiPKtfPtii"

try:
    cuda_library.library()
    NVRTC = find_nvrtc()
except EngineError as error:
    pytest.skip(str(error), allow_module_level=True)


def embedding(facts=FACTS) -> None:
    cuda_library.launch("fh_embedding", 256, 256, 1.0, 256, 1, 10, 64, cuda_library.FP16, device=cuda_library.limits_of(facts), stream=0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that holds no code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_kernels, "_held", {})
    return tmp_path / "flashhead-edge" / "kernels"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "_held", {})


def test_kernels_are_named_as_the_sources_name_them() -> None:
    """Every kernel of the library has a source, and C++ reads its name as NVRTC wants it."""
    of = cuda_kernels.kernel_sources()
    assert of[EMBEDDING] == "embedding.cu" and cuda_kernels.expression(EMBEDDING) == "fh::embedding<fh::Fp16>"
    assert cuda_kernels.expression("flashhead_step") == "flashhead_step"
    assert len(of) > 100 and all((plugin_build.sources().kernels / source).is_file() for source in of.values())
    assert set(of.values()) >= {f"{name}.cu" for name in plugin_build.LAUNCHERS}


def test_a_dry_pass_launches_nothing_and_names_everything() -> None:
    """No driver is here: a launch would say so."""
    assert cuda_kernels.launched_by(embedding) == [EMBEDDING]
    with pytest.raises(EngineError, match="cuda backend: embedding could not be launched"):
        embedding()
    with pytest.raises(EngineError, match=r"cuda backend: embedding: 0 rows of \[10, 64\], expected at least one of each"):
        cuda_kernels.launched_by(lambda: cuda_library.launch("fh_embedding", 1, 1, 1.0, 1, 0, 10, 64, 0, device=cuda_library.limits_of(FACTS), stream=0))
    assert cuda_kernels.launched_by(lambda: None) == []


def test_code_is_compiled_once_and_kept_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = cuda_kernels.ready(embedding, FACTS, lambda text, _: said.append(text))
    assert (first.kernels, first.compiled) == (1, 1) and said == ["compiling for sm_87: embedding"]
    (kept,) = cache.iterdir()
    assert kept.name.startswith("embedding-sm_87-") and kept.suffix == ".cubin" and cuda_kernels.read_cached(kept)[:4] == b"\x7fELF"
    assert cuda_kernels.ready(embedding, FACTS).compiled == 0  # held
    forget(monkeypatch)
    assert cuda_kernels.ready(embedding, FACTS).compiled == 0  # kept
    for damage in (b"", kept.read_bytes()[:-1], kept.read_bytes() + b"x"):
        kept.write_bytes(damage)
        assert cuda_kernels.read_cached(kept) is None
        forget(monkeypatch)
        assert cuda_kernels.ready(embedding, FACTS).compiled == 1
    assert [p.name for p in cache.iterdir()] == [kept.name]


def test_code_that_came_with_the_installation_needs_no_compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a cache that can be written; of another architecture, or damaged, it is passed over."""
    came = tmp_path / "share"
    monkeypatch.setattr(cuda_kernels, "ahead_folder", lambda: came)
    codes, compiled = cuda_kernels.cached_codes([EMBEDDING], 87, NVRTC)
    assert compiled == 1 and cuda_kernels.cached_codes([EMBEDDING], 87, NVRTC) == (codes, 0)
    path = came / "kernels" / cuda_kernels.ahead_name(EMBEDDING, "embedding.cu", "sm_87")
    cuda_kernels.write_cached(path, codes[EMBEDDING])
    shutil.rmtree(cache)
    with monkeypatch.context() as patch:
        patch.setattr(cuda_kernels, "find_nvrtc", None)
        patch.setenv("XDG_CACHE_HOME", "/proc")
        ready = cuda_kernels.ready(embedding, FACTS)
    assert (ready.kernels, ready.compiled, ready.nvrtc) == (1, 0, "") and not cache.exists()
    assert bytes(cuda_kernels._held[EMBEDDING]) == codes[EMBEDDING]
    forget(monkeypatch)
    assert cuda_kernels.ready(lambda: embedding(), dataclasses.replace(FACTS, capability=89)).compiled == 1
    path.write_bytes(path.read_bytes()[:-1])
    forget(monkeypatch)
    assert cuda_kernels.ready(embedding, FACTS).compiled == 1


def test_another_source_header_architecture_or_compiler_is_another_file(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = dataclasses.replace(plugin_build.sources(), kernels=shutil.copytree(plugin_build.sources().kernels, tmp_path / "kernels"))
    monkeypatch.setattr(cuda_kernels, "sources", lambda: copy)
    names = {cuda_kernels.cached_file(EMBEDDING, "embedding.cu", "sm_87", NVRTC).name}
    names.add(cuda_kernels.cached_file(EMBEDDING, "embedding.cu", "sm_90a", NVRTC).name)
    names.add(cuda_kernels.cached_file(EMBEDDING.replace("Fp16", "Bf16"), "embedding.cu", "sm_87", NVRTC).name)
    monkeypatch.setattr(NVRTC, "version", (11, 0))
    names.add(cuda_kernels.cached_file(EMBEDDING, "embedding.cu", "sm_87", NVRTC).name)
    for changed in ("embedding.cu", "element.cuh"):
        with (copy.kernels / changed).open("a") as file:
            file.write("// changed\n")
        names.add(cuda_kernels.cached_file(EMBEDDING, "embedding.cu", "sm_87", NVRTC).name)
    before = len(names)
    (copy.kernels / "head_basics.cuh").write_text("")  # which it does not include
    names.add(cuda_kernels.cached_file(EMBEDDING, "embedding.cu", "sm_87", NVRTC).name)
    assert before == len(names) == 6
    ahead = {cuda_kernels.ahead_name(EMBEDDING, "embedding.cu", a) for a in ("sm_87", "sm_90a")} | {cuda_kernels.ahead_name("x", "embedding.cu", "sm_87")}
    (copy.kernels / "element.cuh").write_text("")
    ahead.add(cuda_kernels.ahead_name(EMBEDDING, "embedding.cu", "sm_87"))
    assert len(ahead) == 4


def test_what_cannot_be_made_is_a_sentence(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"it does not compile for capability 200, expected one of"):
        cuda_kernels.ready(lambda: embedding(), dataclasses.replace(FACTS, capability=200))
    with pytest.raises(EngineError, match="NVRTC: none was found .*of CUDA 1 or older, as the driver is"):
        cuda_kernels.ready(embedding, dataclasses.replace(FACTS, cuda_version="1.0"))
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    with pytest.raises(EngineError, match=r"compiled kernels cannot be kept .*set XDG_CACHE_HOME"):
        cuda_kernels.ready(embedding, FACTS)
    assert cache.read_text().startswith("a file") and cuda_kernels._held == {}


def test_an_installation_without_the_library_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "__file__", str(tmp_path / "cuda_library.py"))
    with pytest.raises(EngineError, match=r"cuda backend: its library of launchers is not in this installation, .*install flashhead-edge where g\+\+"):
        cuda_library.library.__wrapped__()
    (tmp_path / "_cuda.abi3.so").write_text("no library")
    with pytest.raises(EngineError, match="the library cannot be loaded"):
        cuda_library.library.__wrapped__()
    shutil.copy(cuda_library.library()._name, tmp_path / "_cuda.abi3.so")
    monkeypatch.setitem(cuda_library.LAUNCHERS, "fh_of_tomorrow", ())
    with pytest.raises(EngineError, match=r"the library is of another version of flashhead-edge, .*\(it has no fh_of_tomorrow\)"):
        cuda_library.library.__wrapped__()


def test_a_virtual_architecture_gives_ptx_for_the_driver_to_compile() -> None:
    code = cuda_kernels.compiled(EMBEDDING, "embedding.cu", "compute_87", NVRTC)
    assert b".target sm_87" in code and EMBEDDING.encode() in code and code.endswith(b"\0")  # the driver reads PTX up to its end as C has it
