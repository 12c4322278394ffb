"""The decode kernel without a GPU: the structure of both languages is one, its cases are within the definition, what is refused."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
import torch

from flashhead_edge.cases import DECODE_CASES, made_candidates
from flashhead_edge.decoding import Sampling, choose
from flashhead_edge.errors import SettingsError
from flashhead_edge.kernels import build, ops


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_structure_is_that_of_the_header(tmp_path):
    names = [name for name, _ in ops.DecodeArguments._fields_]
    lines = [f'printf("{name} %zu\\n", offsetof(struct FlashHeadDecode, {name}));' for name in names]
    lines.append('printf("size %zu\\nthreads %d\\ncandidates %d\\n", sizeof(struct FlashHeadDecode), FH_DECODE_THREADS, FH_DECODE_CANDIDATES);')
    source = tmp_path / "offsets.c"
    source.write_text(f'#include <stddef.h>\n#include <stdio.h>\n#include "decode.h"\nint main(void) {{ {" ".join(lines)} return 0; }}\n')
    subprocess.run(["cc", f"-I{build.sources_folder()}", str(source), "-o", str(tmp_path / "offsets")], check=True, timeout=60)
    found = dict(line.split() for line in subprocess.run([tmp_path / "offsets"], capture_output=True, text=True, check=True).stdout.splitlines())
    assert {name: int(found.pop(name)) for name in names} == {name: getattr(ops.DecodeArguments, name).offset for name in names}
    assert {k: int(v) for k, v in found.items()} == {
        "size": ctypes.sizeof(ops.DecodeArguments),
        "threads": ops.DECODE_THREADS,
        "candidates": ops.DECODE_CANDIDATES,
    }


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_every_case_has_an_answer_and_no_near_tie(case):
    """What the kernel is compared with: a token for every row, and no cut that hangs on the last digit."""
    ids, logits, count = made_candidates(case, 8)
    assert ids.shape[1] <= ops.DECODE_CANDIDATES and all(len(set(row)) == len(row) for row in ids.tolist())
    behind = np.arange(case.candidates) >= count[:, None]
    ids, logits = np.where(behind, -1, ids), np.where(behind, -np.inf, logits.astype(np.float64))
    tokens = [
        choose(ids, logits, Sampling(case.temperature, case.top_k, p, m, seed=3), np.arange(8))
        for p, m in {(case.top_p * (1 - 1e-13), case.min_p), (case.top_p, case.min_p), (case.top_p, min(1.0, case.min_p * (1 + 1e-13)))}
    ]
    assert all((t == tokens[0]).all() and (t >= 0).all() for t in tokens)


def arguments():
    ids, logits, count = map(torch.from_numpy, made_candidates(DECODE_CASES[0], 4))
    floats = [torch.ones(4, dtype=torch.float64) for _ in range(3)]
    return {"ids": ids, "logits": logits, "count": count, "settings": (*floats, *(torch.zeros(4, dtype=torch.int64) for _ in range(3))), "best": 3}


def test_the_fake_says_the_shapes():
    a = arguments()
    meta = [t.to("meta") for t in (a["ids"], a["logits"], a["count"], *a["settings"])]
    token, logprob, best_ids, best_logprobs = ops.decode(*meta, 3, "sm_90")
    assert (token.shape, token.dtype, logprob.dtype) == ((4,), torch.int64, torch.float32)
    assert best_ids.shape == best_logprobs.shape == (4, 3)


def test_arguments_that_the_kernel_cannot_read_are_refused():
    good = arguments()
    ops.check_decode(**good)
    ops.check_decode(**{**good, "count": torch.zeros(4, 6, dtype=torch.int64)[:, -1]})
    wide = torch.zeros(4, 8_193, dtype=torch.int64)
    for change, message in (
        ({"ids": good["ids"].int()}, r"ids is torch.int32 \[4, 134\], expected int64 \[N, C\], C from 1 to 8192"),
        ({"ids": wide, "logits": wide.float()}, r"ids is torch.int64 \[4, 8193\]"),
        ({"logits": good["logits"].double()}, r"logits is torch.float64 \[4, 134\], expected float32 \[4, 134\]"),
        ({"count": good["count"][:3]}, r"count is torch.int64 \[3\], expected torch.int64 \[4\]"),
        ({"settings": (good["settings"][0].float(), *good["settings"][1:])}, r"temperature is torch.float32 \[4\], expected torch.float64 \[4\]"),
        ({"best": -1}, "best is -1, expected 0 or more"),
        ({"ids": torch.zeros(4, 268, dtype=torch.int64)[:, ::2]}, "ids is strides .*, expected contiguous"),
    ):
        with pytest.raises(SettingsError, match=message):
            ops.check_decode(**{**good, **change})
