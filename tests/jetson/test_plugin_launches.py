"""The launchers of the plugin library against the torch operators of the same kernels: kernel, grid, block, shared memory, cluster, overlap.

Both sides run as they are: the operators up to their launch, the launchers down to the made driver's cuLaunchKernelEx.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from flashhead_edge.errors import EngineError  # noqa: E402
from flashhead_edge.jetson import nvrtc, plugin_build  # noqa: E402
from flashhead_edge.kernels import layers  # noqa: E402
from flashhead_edge.kernels.layers import Facts  # noqa: E402

# An Orin Nano, an AGX Orin, a card without and with clusters and wgmma.
FACTS = [
    Facts("sm_87", 8, 163 << 10),
    Facts("sm_87", 16, 163 << 10),
    Facts("sm_89", 58, 99 << 10),
    Facts("sm_90", 132, 227 << 10, True),
    Facts("sm_120", 84, 99 << 10, True),
]
TYPES = {torch.float16: 0, torch.bfloat16: 1}

# Calls of launchers, each a name and its arguments: int, float, or a list, which is a structure of them; "P" before a number makes it a pointer.
CALLS = """
import ctypes, json, sys
library, driver = ctypes.CDLL(sys.argv[1]), ctypes.CDLL("libcuda.so.1")
driver.made_notes.restype = ctypes.c_char_p
def value(x):
    if isinstance(x, str):
        return ctypes.c_void_p(int(x[1:]))
    return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int(x)
def structure(values):
    made = [value(x) for x in values]
    class Made(ctypes.Structure):
        _fields_ = [(f"f{i}", type(v)) for i, v in enumerate(made)]
    return Made(*[v.value for v in made])
said = []
for name, plan, arguments in json.load(sys.stdin):
    made = [structure(a) if isinstance(a, list) else value(a) for a in arguments]
    given = [ctypes.byref(m) if isinstance(m, ctypes.Structure) else m for m in made]
    if plan:  # the launcher's own plan: of the same shape and device, behind the shape
        room = ctypes.create_string_buffer(256)
        made_plan = library.fh_attention_make_plan
        made_plan.restype = ctypes.c_char_p
        assert made_plan(given[0], given[-2], room) is None
        given.insert(1, room)
    launcher = getattr(library, name)
    launcher.restype = ctypes.c_char_p
    wrong = launcher(*given)
    said.append(wrong.decode() if wrong else driver.made_notes().decode().split("; ")[-1])
print(json.dumps(said))
"""


def missing() -> str | None:
    """What is missing to build a library here."""
    try:
        plugin_build.cuda_headers()
        nvrtc.find_nvrtc()
    except EngineError as error:
        return str(error)
    return None


pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The launchers of a decoder's layers with every instance, as an H100 gets them, over nvrtc/runtime.cpp."""
    folder = tmp_path_factory.mktemp("launches")
    (folder / "exports.map").write_text("{ global: fh_*; local: *; };\n")
    s = plugin_build.sources()
    includes = [word for path in plugin_build.cuda_headers() for word in ("-isystem", str(path))]
    flags = [f"-I{s.kernels}", *includes, "-fvisibility=default"]
    launchers = [s.kernels / f"{stem}.cu" for stem in ("attention", "elementwise", "w4a16", "w4a16_fused")]
    plugin_build.make_library(folder / "lib.so", launchers, [s.nvrtc / "runtime.cpp"], folder / "exports.map", flags, nvrtc.find_nvrtc(), "sm_90a")
    return folder / "lib.so"


def launched(library: Path, driver: Path, calls: list[tuple]) -> list[tuple]:
    """(kernel, blocks, threads, shared bytes, cluster, overlap) of each call."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(driver)}
    text = json.dumps(calls)
    done = subprocess.run([sys.executable, "-c", CALLS, library], input=text, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    symbols = sorted({line.split()[0] for line in said})
    names = dict(zip(symbols, plugin_build.run(["c++filt", *symbols]).splitlines()))
    return [read(line, names) for line in said]


def read(line: str, names: dict[str, str]) -> tuple:
    words = line.replace(",", "").split()
    assert words[4] == "by", line  # else the launcher's own sentence
    kernel = plugin_build.expression_of(names[words[0]])
    kernel = kernel.replace("(bool)1", "true").replace("(bool)0", "false")
    cluster = int(words[words.index("cluster") + 1]) if "cluster" in words else 1
    return kernel, tuple(map(int, words[1:4])), int(words[5]), int(words[6]), cluster, "overlap 1" in line


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple]:
    """What an operator would launch, on the host's memory."""
    seen: list[tuple] = []

    def take(source: str, expression: str, grid: layers.Grid, device: object, architecture: str, overlap: bool, *arguments: object) -> None:
        seen.append((expression, grid.blocks, grid.threads, grid.shared_bytes, grid.cluster, overlap))

    monkeypatch.setattr(layers, "_run", take)

    def call(operator: str, *arguments: object) -> tuple:
        getattr(layers, operator)._init_fn(*arguments)
        return seen.pop()

    return call


def device_of(facts: Facts) -> list[int]:
    return [facts.capability, facts.multiprocessors, facts.shared_bytes, int(facts.overlap)]


def compare(library: Path, driver: Path, cases: Iterator[tuple[tuple, tuple]]) -> set[str]:
    """The kernels that both sides launch, where they agree on each."""
    wanted, calls = zip(*cases)
    found = launched(library, driver, list(calls))
    for want, call, got in zip(wanted, calls, found):
        assert got == want, call
    return {kernel for kernel, *_ in found}


def test_products(library: Path, made_driver: Path, asked: Callable[..., tuple]) -> None:
    def cases() -> Iterator[tuple[tuple, tuple]]:
        shapes = ((16, 128), (2048, 2048), (576, 1536), (8192, 2048), (2048, 8192))
        for dtype, group, zeros, (n, k), rows, f in itertools.product(TYPES, layers.GROUPS, (False, True), shapes, (1, 8, 9, 64, 100, 512, 2000), FACTS):
            codes = torch.empty(n // 16, k // 64, 512, dtype=torch.uint8)
            scales, points = torch.empty(n // 16, k // group, 16, dtype=dtype), torch.empty(n // 16, k // group, 16, dtype=torch.uint8) if zeros else None
            x = torch.empty(rows, k, dtype=dtype)
            want = asked("w4a16_linear", x, codes, scales, points, group, f.architecture, f.multiprocessors, f.overlap)
            weight = ["P16", "P16", "P16" if zeros else "P0", n, k, group, TYPES[dtype]]
            yield want, ("fh_w4a16_linear", False, [weight, "P16", "P16", rows, device_of(f), "P0"])

    kernels = compare(library, made_driver, cases())
    assert len(kernels) == 2 * 3 * 2 * (2 + 2 + 3)  # types, groups, zeros; decode by its pairs, prefill and wide prefill by their forms: all instances


@pytest.mark.parametrize(("norm", "gated"), [(False, False), (True, False), (True, True)])
def test_fused_products(library: Path, made_driver: Path, asked: Callable[..., tuple], norm: bool, gated: bool) -> None:
    def cases() -> Iterator[tuple[tuple, tuple]]:
        shapes = ((32, 128), (2048, 2048), (576, 1536), (8192, 2048), (2048, 8192))
        for dtype, group, zeros, (n, k), rows, f in itertools.product(TYPES, layers.GROUPS, (False, True), shapes, (1, 5, 8), FACTS):
            codes = torch.empty(n // 16, k // 64, 512, dtype=torch.uint8)
            scales, points = torch.empty(n // 16, k // group, 16, dtype=dtype), torch.empty(n // 16, k // group, 16, dtype=torch.uint8) if zeros else None
            x, weight = torch.empty(rows, k, dtype=dtype), torch.empty(k, dtype=dtype) if norm else None
            activation = "silu" if gated else ""
            around = (None, None, None, weight, 0.0, 1e-6, activation)
            want = asked("w4a16_fused", x, codes, scales, points, group, *around, f.architecture, f.multiprocessors, f.overlap)
            if want[3] > f.shared_bytes:  # the plugin launches the steps one by one
                continue
            matrix = ["P16", "P16", "P16" if zeros else "P0", n, k, group, TYPES[dtype]]
            fusion = ["P0", "P0", "P0", "P16" if norm else "P0", 0.0, 1e-6, int(gated), 0]
            yield want, ("fh_w4a16_fused", False, [matrix, fusion, "P16", "P16", rows, device_of(f), "P0"])

    assert len(compare(library, made_driver, cases())) == 2 * 3 * 2 * 2 * (1 + gated)  # types, groups, zeros, pairs; gate and partner in turn and side by side


def test_attention(library: Path, made_driver: Path, asked: Callable[..., tuple]) -> None:
    def cases() -> Iterator[tuple[tuple, tuple]]:
        some = itertools.product(TYPES, (1, 4), (1, 5, 40), ((32, 8), (4, 1), (9, 3)), layers.HEAD_SIZES, (128, 1000), (0, 60), FACTS)
        for dtype, batch, queries, (heads, kv), size, length, window, f in some:
            q, lengths = torch.empty(batch, queries, heads, size, dtype=dtype), torch.empty(batch, dtype=torch.int32)
            k = torch.empty(batch, kv, length, size, dtype=dtype)
            plan = layers.attention_plan(batch, queries, heads, kv, size, length, window, f)
            room = torch.empty(max(16, plan.workspace_bytes), dtype=torch.uint8)
            shape = [batch, queries, heads, kv, size, length, window, 0.125, TYPES[dtype]]
            want = asked("attention_decode", q, k, k, lengths, room, plan.words(), window, 0.125, f.architecture, f.overlap)
            yield want, ("fh_attention_decode", True, [shape, *["P16"] * 7, device_of(f), "P0"])
            qkv, turn = torch.empty(batch, queries, heads + 2 * kv, size, dtype=dtype), torch.empty(length, size // 2, 2)
            want = asked("attention_rope_write", qkv, turn, None, None, 0.0, 1e-6, lengths, k, k, f.architecture, f.overlap)
            yield want, ("fh_attention_rope_write", False, [shape, "P16", "P16", "P0", "P0", 0.0, 1e-6, *["P16"] * 4, device_of(f), "P0"])
            if queries <= layers.FUSED_QUERIES:
                want = asked(
                    "attention_rope_decode", qkv, turn, None, None, 0.0, 1e-6, lengths, k, k, room, plan.words(), window, 0.125, f.architecture, f.overlap
                )
                fusion = ["P16", "P16", "P0", "P0", 0.0, 1e-6]
                yield want, ("fh_attention_rope_decode", True, [shape, fusion, *["P16"] * 6, device_of(f), "P0"])

    kernels = compare(library, made_driver, cases())
    assert len(kernels) == 2 * 2 * 4 * 2 + 2  # alone and with rope: types, head sizes, with and without clusters; rope alone of both types


def test_small_steps(library: Path, made_driver: Path, asked: Callable[..., tuple]) -> None:
    def cases() -> Iterator[tuple[tuple, tuple]]:
        for dtype, d, rows, f in itertools.product(TYPES, (8, 64, 576, 2048, 8192, 9000, 16384), (1, 7, 300), FACTS):
            x = torch.empty(rows, d, dtype=dtype)
            want = asked("rms_norm", x, None, torch.empty(d, dtype=dtype), 1.0, 1e-6, f.architecture, f.overlap)
            yield want, ("fh_rms_norm", False, ["P16", "P0", "P0", "P16", 1.0, 1e-6, "P16", rows, d, TYPES[dtype], device_of(f), "P0"])
            for number, activation in enumerate(layers.ACTIVATIONS):
                want = asked("gated_product", torch.empty(rows, 2 * d, dtype=dtype), activation, f.architecture, f.overlap)
                yield want, ("fh_gated_product", False, ["P16", "P16", rows, d, number, TYPES[dtype], device_of(f), "P0"])

    assert len(compare(library, made_driver, cases())) == 2 + 2 * 2
