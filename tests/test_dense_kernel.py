"""The dense head's kernel without a GPU: the packed layout, the launch plan of both languages, what is refused."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
import torch

from flashhead_edge.cases import DENSE_CASES, DenseCase, made_dense
from flashhead_edge.codes import Coded
from flashhead_edge.errors import DeviceError, SettingsError
from flashhead_edge.kernels import build, ops
from flashhead_edge.kernels.dense import packed_rows
from flashhead_edge.kernels.ops import most_dense_rows

SMALL = [c for c in DENSE_CASES if c.vocab_size <= 5_003]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_code_and_scale_lies_where_the_header_says(case):
    rows = made_dense(case)
    codes, scales, bits, group = packed_rows(rows, "cpu")
    assert (bits, group) == (case.bits, case.group)
    v, d = case.vocab_size, case.hidden_size
    chunk, columns = 512 // bits, ops.dense_columns(d, bits, group)
    neutral = rows.data if bits == 8 else np.stack([rows.data & 15, rows.data >> 4], 2).reshape(v, d)
    n, k = np.arange(v)[:, None], np.arange(d)[None]
    lane = n % 8 * 4 + k % 32 // 8  # 4 g + t
    field = k % chunk // 32 * 8 + k % 8  # among the lane's 16 bytes
    at = (n // 16 * (columns // chunk) + k // chunk) * 1024 + n % 16 // 8 * 512 + lane * 16 + field * bits // 8
    found = codes.numpy().reshape(-1)[at] >> (field % 2 * 4 if bits == 4 else 0) & 2**bits - 1
    assert (found == neutral).all()
    block, each = (columns, 1) if group == 0 else (max(chunk, group), max(1, chunk // group))
    s = np.arange(rows.scale.shape[1])[None]
    width = group or columns
    at = ((n // 16 * (columns // block) + s * width // block) * 16 + n % 16) * each + s % each
    assert (scales.numpy().reshape(-1)[at] == rows.scale).all()
    ops.check_dense(torch.zeros(1, d, dtype=torch.float16), codes, scales, torch.zeros(264, dtype=torch.uint8), v, bits, group)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_plans_are_those_of_the_header(tmp_path):
    source, library = tmp_path / "plan.c", tmp_path / "plan.so"
    source.write_text(
        '#include "dense_head.h"\n'
        "int plan(int d, int bits, int group, int N, int* out) {\n"
        "  fh_dense_head_weight weight = {0, 0, 16, d, bits, group};\n  fh_device device = {87, 8, 166912, 0};\n"
        "  fh_dense_head_plan p = fh_dense_head_make_plan(&weight, N, &device);\n"
        "  out[0] = p.rows, out[1] = p.shared_bytes, out[2] = p.grid, out[3] = FH_DENSE_HEAD_WORKSPACE;\n  return FH_DENSE_HEAD_THREADS;\n}\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", f"-I{build.sources_folder()}", str(source), "-o", str(library)], check=True, timeout=60)
    plan, out = ctypes.CDLL(str(library)).plan, (ctypes.c_int * 4)()
    for case in DENSE_CASES:
        for n in (1, 8, 9, 16, 17, 32):
            assert plan(case.hidden_size, case.bits, case.group, n, out) == ops.DENSE_THREADS
            assert tuple(out) == (*ops.dense_plan(n, case.hidden_size, case.bits, case.group), 8, ops.DENSE_WORKSPACE), case


def test_the_fake_says_the_shapes():
    rows = made_dense(SMALL[0])
    codes, scales, bits, group = packed_rows(rows, "cpu")
    hidden = torch.empty(4, 256, dtype=torch.bfloat16, device="meta")
    workspace = torch.empty(264, dtype=torch.uint8, device="meta")
    token, logit = ops.dense_head(hidden, codes.to("meta"), scales.to("meta"), workspace, rows.n, bits, group, 132, "sm_90")
    assert (token.shape, token.dtype, logit.shape, logit.dtype) == ((4,), torch.int64, (4,), torch.float32)


def test_rows_without_a_kernel_are_refused():
    three = Coded("int", 64, np.zeros((4, 24), np.uint8), np.ones((4, 1), np.float16), np.full(64, 3, np.uint8))
    with pytest.raises(SettingsError, match=r"rows are int of widths \[3\] with 1 scales for 64 columns, expected int of 8 or 4 bits"):
        packed_rows(three, "cpu")
    with pytest.raises(SettingsError, match="with 1 scales for 256 columns"):
        packed_rows(made_dense(DenseCase(16, 256, 4, 0)), "cpu")
    with pytest.raises(SettingsError, match="with 4 scales for 256 columns"):
        packed_rows(made_dense(DenseCase(16, 256, 8, 64)), "cpu")


def test_arguments_that_the_kernel_cannot_read_are_refused():
    rows = made_dense(SMALL[0])
    codes, scales, bits, group = packed_rows(rows, "cpu")
    hidden, workspace = torch.zeros(1, 256, dtype=torch.bfloat16), torch.zeros(264, dtype=torch.uint8)
    good = {"hidden": hidden, "codes": codes, "scales": scales, "workspace": workspace, "vocab_size": rows.n, "bits": bits, "group": group}
    ops.check_dense(**good)
    for change, message in (
        ({"hidden": hidden.float()}, r"hidden is torch.float32 \[1, 256\], expected float16 or bfloat16 \[N, d\]"),
        ({"hidden": hidden.expand(33, 256).contiguous()}, "N at most 32"),
        ({"codes": codes[1:]}, r"codes is torch.uint8 \[312, 4, 1024\], expected uint8 \[313, 4, 1024\]"),
        ({"scales": scales[1:]}, "scales is torch.float16 of 4992 numbers, expected float16 of 5008"),
        ({"workspace": workspace[:8]}, "workspace is 8 bytes, expected 264 bytes"),
        ({"hidden": torch.zeros(1, 512, dtype=torch.bfloat16)[:, ::2]}, "expected contiguous and 16-byte aligned"),
    ):
        with pytest.raises(SettingsError, match=message):
            ops.check_dense(**{**good, **change})


def test_a_launch_takes_as_many_states_as_shared_memory_holds():
    assert [most_dense_rows(d, 8, 0, 227 << 10) for d in (576, 2_048, 3_072)] == [32, 32, 32]
    assert [most_dense_rows(d, 8, 0, 163 << 10) for d in (576, 2_048, 3_072)] == [32, 32, 16]
    assert [most_dense_rows(d, 4, 128, 99 << 10) for d in (576, 2_048, 3_072)] == [32, 16, 8]
    with pytest.raises(DeviceError, match="states of 9000 need more shared memory than the device's 101376 bytes a block"):
        most_dense_rows(9_000, 8, 0, 99 << 10)
