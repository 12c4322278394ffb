"""The operators of a decoder layer without a GPU: launch plans of both languages, fakes, what is refused, instances compiled by NVRTC."""

import hashlib
import itertools
import shutil
import subprocess

import pytest
import torch

from flashhead_edge.errors import SettingsError
from flashhead_edge.kernels import build, layers
from flashhead_edge.kernels.layers import Facts, attention_plan, norm_threads, w4a16_fused_plan, w4a16_paired, w4a16_plan

FACTS = [Facts("sm_87", 8, 163 << 10), Facts("sm_87", 16, 163 << 10), Facts("sm_90", 132, 227 << 10), Facts("sm_120", 84, 99 << 10)]
PLANS = r"""
#include <cstdio>
#include "w4a16_fused.h"
#include "attention.h"
int main() {
  int n, k, group, rows, processors, capability, kind, norm, gated, s[7];
  while (std::scanf("%d", &kind) == 1) {
    if (kind == 0) {
      if (std::scanf("%d %d %d %d %d %d", &n, &k, &group, &rows, &processors, &capability) != 6) return 1;
      fh_w4a16_weight w{nullptr, nullptr, nullptr, n, k, group, FH_FP16};
      fh_device d{capability, processors, 232448, 0};
      fh_w4a16_plan p;
      fh_w4a16_make_plan(&w, rows, &d, &p);
      std::printf("%d %d %d %d %d %d %d %d\n", p.decode, p.wide, p.tile_outputs, p.tile_tokens, p.grid_x, p.grid_y, p.threads, p.shared_bytes);
    } else if (kind == 2) {
      if (std::scanf("%d %d %d %d %d %d", &n, &k, &rows, &norm, &gated, &processors) != 6) return 1;
      fh_w4a16_weight w{nullptr, nullptr, nullptr, n, k, 64, FH_FP16};
      fh_w4a16_fusion f{};
      f.norm = norm ? &w : nullptr;
      f.gated = gated;
      fh_device d{87, processors, 232448, 0};
      fh_w4a16_plan p;
      fh_w4a16_make_fused_plan(&w, &f, rows, &d, &p);
      std::printf("%d %d %d\n", p.grid_x, p.threads, p.shared_bytes);
    } else {
      for (int& x : s) if (std::scanf("%d", &x) != 1) return 1;
      if (std::scanf("%d %d", &processors, &capability) != 2) return 1;
      fh_attention_shape shape{s[0], s[1], s[2], s[3], s[4], s[5], s[6], 1.f, FH_FP16};
      fh_device d{capability, processors, 232448, 0};
      fh_attention_plan p;
      if (const char* wrong = fh_attention_make_plan(&shape, &d, &p)) { std::puts(wrong); return 1; }
      std::printf("%d %d %d %d %d %zu\n", p.splits, p.cluster, p.rows, p.row_blocks, p.threads, p.workspace_bytes);
    }
  }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_plans_are_those_of_the_launchers(tmp_path):
    folder, program = build.sources_folder(), tmp_path / "plans"
    (tmp_path / "plans.cu").write_text(PLANS)
    sources = [*(str(folder / f"{name}.cu") for name in ("w4a16", "w4a16_fused", "attention")), str(tmp_path / "plans.cu")]
    subprocess.run(["nvcc", "-std=c++17", "-arch=sm_90", f"-I{folder}", *sources, "-o", str(program)], check=True, timeout=600)
    linear = list(itertools.product((16, 1008, 2048, 16384), (64, 576, 2048, 8192), (32, 64), (1, 8, 9, 100, 512, 4096), (8, 16, 132), (87, 90, 120)))
    linear = [c for c in linear if c[1] % c[2] == 0]
    shapes = list(itertools.product((1, 4), (1, 5), ((32, 8), (4, 1), (16, 16)), (64, 96, 128, 256), (128, 4096), (0, 512)))
    attention = [((b, q, *heads, size, length, window), f) for (b, q, heads, size, length, window) in shapes for f in FACTS]
    lines = [f"0 {' '.join(map(str, c))}" for c in linear]
    lines += [f"1 {' '.join(map(str, shape))} {f.multiprocessors} {f.capability}" for shape, f in attention]
    fused = list(itertools.product((32, 992, 1024, 3072, 16384), (64, 576, 2048, 8192), (1, 8), ((0, 0), (1, 0), (1, 1)), (8, 16, 132)))
    lines += [f"2 {n} {k} {rows} {norm} {gated} {processors}" for n, k, rows, (norm, gated), processors in fused]
    result = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    found = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    want: list[tuple[int, ...]] = []
    for case in linear:
        plan = w4a16_plan(*case)
        want.append((int(plan.decode), int(plan.wide), plan.outputs, plan.tokens, *plan.grid.blocks[:2], plan.grid.threads, plan.grid.shared_bytes))
    for shape, f in attention:
        split = attention_plan(*shape, f)
        want.append((*split.words(), split.workspace_bytes))
    for n, k, rows, (norm, gated), processors in fused:
        grid = w4a16_fused_plan(n, k, rows, bool(norm), bool(gated), processors)
        want.append((grid.blocks[0], grid.threads, grid.shared_bytes))
    assert found == want


def test_plans_are_those_that_won_on_an_h100():
    """docs/kernels.md: gate and partner side by side, and who shares a sequence's attention."""
    h100 = FACTS[2]
    gates = {"Llama-3.2-1B": (16384, 2048), "Qwen3-1.7B": (12288, 2048), "Qwen3-0.6B": (6144, 1024), "Gemma-3-270M": (4096, 640), "SmolLM2-135M": (3072, 576)}
    assert [name for name, gate in gates.items() if not w4a16_paired(*gate, h100.multiprocessors)] == ["Llama-3.2-1B"]
    gemma = {window: attention_plan(1, 1, 4, 1, 256, length, window, h100) for length, window in ((4096, 0), (4096, 512))}
    assert [(p.splits, p.cluster) for p in gemma.values()] == [(8, 8), (4, 4)]
    assert attention_plan(1, 1, 9, 3, 64, 4096, 0, h100).cluster == attention_plan(1, 1, 32, 8, 64, 32768, 0, h100).cluster == 8
    long = attention_plan(1, 1, 4, 1, 256, 32768, 0, h100)
    assert (long.splits, long.cluster) == (132, 1)


def test_threads_of_a_norm():
    assert [norm_threads(d) for d in (8, 576, 2048, 8192, 9000, 16384)] == [32, 96, 256, 1024, 576, 1024]


def test_fakes_say_the_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        half = {"dtype": torch.float16, "device": "cuda"}
        x, codes, scales = torch.empty(3, 128, **half), torch.empty(4, 2, 512, dtype=torch.uint8, device="cuda"), torch.empty(4, 1, 16, **half)
        y = layers.w4a16_linear(x, codes, scales, None, 128, "sm_90", 132, False)
        assert (y.shape, y.dtype) == ((3, 64), torch.float16)
        assert layers.gated_product(x, "silu", "sm_90", False).shape == (3, 64)
        assert layers.rms_norm(x, None, torch.empty(128, **half), 0.0, 1e-6, "sm_90", False).shape == (3, 128)
        half_norm = (torch.empty(128, **half), 0.0, 1e-6)
        assert layers.w4a16_fused(x, codes, scales, None, 128, None, None, None, *half_norm, "silu", "sm_90", 132, False).shape == (3, 32)
        assert layers.w4a16_fused(x, codes, scales, None, 128, None, None, None, *half_norm, "", "sm_90", 132, False).shape == (3, 64)
        cache, lengths = torch.empty(2, 4, 100, 64, **half), torch.empty(2, dtype=torch.int32, device="cuda")
        turn = torch.empty(100, 32, 2, device="cuda")
        q = layers.attention_rope_write(torch.empty(2, 1, 16, 64, **half), turn, None, None, 0.0, 1e-6, lengths, cache, cache, "sm_90", False)
        assert q.shape == (2, 1, 8, 64)
        rope = (torch.empty(2, 1, 16, 64, **half), turn, None, None, 0.0, 1e-6, lengths, cache, cache)
        out = layers.attention_rope_decode(*rope, torch.empty(16, dtype=torch.uint8, device="cuda"), [8, 8, 2, 1, 256], 0, 0.125, "sm_90", True)
        assert out.shape == (2, 1, 8, 64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"codes": torch.zeros(24, 64, dtype=torch.uint8)}, "w4a16: the matrix is codes torch.uint8 [24, 64]"),
        ({"scales": torch.ones(32, 4, dtype=torch.float32)}, "w4a16: dtype is torch.float32, expected float16 or bfloat16"),
        ({"scales": torch.ones(32, 3, dtype=torch.float16)}, "w4a16: the matrix is"),
        ({"zeros": torch.zeros(32, 2, dtype=torch.uint8)}, "w4a16: zeros is torch.uint8 [32, 2], expected uint8 [32, 4]"),
    ],
)
def test_a_matrix_without_a_kernel_is_refused(change, said):
    arguments = {"codes": torch.zeros(32, 64, dtype=torch.uint8), "scales": torch.ones(32, 4, dtype=torch.float16)} | change
    with pytest.raises(SettingsError) as error:
        layers.w4a16(**arguments)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_shape_without_a_plan_is_refused():
    for shape, said in (((1, 1, 8, 3, 64, 100, 0), "heads a multiple"), ((1, 1, 8, 8, 80, 100, 0), "head size is 80"), ((1, 9, 8, 8, 64, 8, 0), "length")):
        with pytest.raises(SettingsError, match=said):
            attention_plan(*shape, FACTS[0])


@pytest.mark.parametrize(
    ("source", "expression"),
    [
        ("elementwise.cu", "fh::rms_norm<fh::Fp16>"),
        ("w4a16.cu", "fh::w4a16_decode<fh::Bf16, 128, false, 2>"),
        ("w4a16_fused.cu", "fh::w4a16_fused<fh::Bf16, 128, false, true, true, true, 2>"),
        ("attention.cu", "fh::attention_decode<fh::Bf16, 64, true>"),
    ],
)
def test_an_instance_is_compiled_once_and_named(source, expression, tmp_path, monkeypatch):
    pytest.importorskip("cuda.core")
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, name = build.instantiated(source, expression, "sm_90")
    assert name.encode() in code
    assert expression.split("<")[0].removeprefix("fh::") in name
    (kept,) = build.cache_folder().glob("*.bin")
    kept.write_bytes(hashlib.sha256(b"name\ncode\n\n").digest() + b"name\ncode\n\n")
    assert build.instantiated(source, expression, "sm_90") == (b"code\n\n", "name")
