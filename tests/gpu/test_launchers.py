"""The C launchers of the head step and of the draw, compiled by nvcc: what they write is what the operators write."""

import ctypes
import shutil
import subprocess

import pytest
import torch

from flashhead_edge.bench.head import with_shares
from flashhead_edge.cases import CASES, made_index, made_rows, made_states
from flashhead_edge.kernels.build import architecture_of, capability_of, sources_folder
from flashhead_edge.kernels.head import cuda_head
from flashhead_edge.kernels.ops import DecodeArguments, decode, head_step_out, widen_arguments
from flashhead_edge.kernels.packing import Arguments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")]


class Device(ctypes.Structure):
    """`fh_device` of device.h."""

    _fields_ = [(name, ctypes.c_int) for name in ("capability", "multiprocessors", "shared_bytes", "overlap")]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("kernels") / "libhead.so"
    sources = [str(sources_folder() / name) for name in ("head_step.cu", "decode.cu")]
    architecture = architecture_of(torch.device("cuda", 0))
    subprocess.run(["nvcc", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", f"-arch={architecture}", *sources, "-o", str(target)], check=True, timeout=300)
    return ctypes.CDLL(str(target))


@pytest.fixture
def call(library):
    properties = torch.cuda.get_device_properties(0)
    device = Device(capability_of(architecture_of(torch.device("cuda", 0))), properties.multi_processor_count, properties.shared_memory_per_block_optin, 1)

    def run(name, arguments, **changes):
        facts = Device(*(changes.get(field, getattr(device, field)) for field, _ in Device._fields_))
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        error = function(ctypes.byref(arguments), ctypes.byref(facts), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        torch.cuda.synchronize()
        return error and error.decode()

    return run


def step_of(name, rows):
    """A head, states, and the launcher's arguments with outputs of their own."""
    case = next(c for c in CASES if c.name == name)
    weight = torch.from_numpy(made_rows(case)).to("cuda", torch.bfloat16)
    hidden = torch.from_numpy(made_states(case, max(16, rows))).to("cuda", torch.bfloat16)
    head = cuda_head(with_shares(made_index(case), weight, hidden[:16], case.shares), weight)
    hidden, plan = hidden[:rows].contiguous(), head.plans[rows - 1]
    out = head_step_out(hidden, plan.stages, plan.candidates)
    wide = torch.empty(rows, plan.vocab_size, device="cuda")
    workspace = torch.zeros_like(head.workspace)
    pointers = (hidden, weight, None, head.image, workspace, *out, wide, None)
    step = Arguments(*(None if t is None else t.data_ptr() for t in pointers), rows, 1, 1, plan.vocab_size, plan)
    widen = widen_arguments(out, head.image, workspace, plan, plan.vocab_size)
    widen.rows, widen.wide = rows, wide.data_ptr()
    return head, hidden, step, widen, out, wide, pointers


@pytest.mark.parametrize("rows", [1, 5, 32])
@pytest.mark.parametrize("name", ["fitted", "bits alone, caps hit", "published"])
def test_a_step_is_the_operators(name, rows, call):
    head, hidden, step, widen, out, wide, _kept = step_of(name, rows)
    for _ in range(2):
        assert call("fh_head_step", step) is None
        assert call("fh_head_widen", widen) is None
    token, counts, capped, _, _, logits = head.launch_logits(hidden)
    assert torch.equal(out[0], token) and torch.equal(out[1], counts) and torch.equal(out[2], capped)
    assert torch.equal(wide, logits)


def test_what_cannot_be_launched_is_a_sentence(call):
    *_, step, widen, _, _, _kept = step_of("two codes", 1)
    assert call("fh_head_step", step, multiprocessors=8) == (
        f"head_step: the plan is for {step.layout.multiprocessors} multiprocessors, the device has 8; plan for this device"
    )
    assert "bytes of shared memory a block, the device has 1024" in call("fh_head_step", step, shared_bytes=1024)
    step.rows = widen.rows = 33
    assert call("fh_head_step", step) == "head_step: 33 states, expected 1 to 32; split the batch"
    assert call("fh_head_widen", widen) == "head_widen: 33 states, expected 1 to 32; split the batch"


@pytest.mark.parametrize("width", [1, 134, 3000])
def test_a_draw_is_the_operators(width, call):
    rows, best = 7, 5
    generator = torch.Generator("cuda").manual_seed(width)
    ids = torch.stack([torch.randperm(50_000, device="cuda", generator=generator)[:width] for _ in range(rows)])
    logits = 3 * torch.randn(rows, width, device="cuda", generator=generator)
    count = torch.full((rows,), width, dtype=torch.int64, device="cuda")
    floats = [torch.full((rows,), x, dtype=torch.float64, device="cuda") for x in (0.8, 0.95, 0.02)]
    whole = [torch.arange(rows, device="cuda") + x for x in (40, 1, 3)]
    want = decode(ids, logits, count, *floats, *whole, best, architecture_of(ids.device))
    out = [torch.zeros_like(t) for t in want]
    arguments = DecodeArguments(*(t.data_ptr() for t in (ids, logits, count, *floats, *whole, *out)), rows, width, 1, best)
    assert call("fh_decode", arguments) is None
    assert all(torch.equal(a, b) for a, b in zip(out, want))
    arguments.width = 9_000
    assert "decode: 7 rows of 9000 candidates" in call("fh_decode", arguments)
