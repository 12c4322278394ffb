"""Torch custom operators over the kernels: checked in one place, with fakes for tracing, capturable in CUDA graphs."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from flashhead_edge.errors import DeviceError, SettingsError
from flashhead_edge.kernels.build import Prepared, capability_of, function, launch, prepare
from flashhead_edge.kernels.packing import THREADS, Arguments, DecodeArguments, Layout, Widen, layout_of

HALVES = (torch.float16, torch.bfloat16)
DENSE_ROWS, DENSE_THREADS, DENSE_WORKSPACE = 32, 512, 8 * 33  # dense_head.h: states of a launch, threads, bytes
DENSE_STATIC = 8 << 10  # shared memory that the dense kernel declares itself, at most
DECODE_THREADS, DECODE_CANDIDATES = 256, 8_192  # decode.h
DECODE_SETTINGS = ("temperature", "top_p", "min_p", "top_k", "seed", "step")


def head_step_out(hidden: Tensor, stages: int, candidates: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty outputs of a step: token, counts, capped, ids, logits."""
    n = hidden.shape[0]
    return (
        hidden.new_empty(n, dtype=torch.int64),
        hidden.new_empty(n, 2 + stages, dtype=torch.int64),
        hidden.new_empty(n, dtype=torch.bool),
        hidden.new_empty(n, candidates, dtype=torch.int64),
        hidden.new_empty(n, candidates, dtype=torch.float32),
    )


@torch.library.custom_op("flashhead::head_step", mutates_args={"workspace"}, device_types="cuda")
def head_step(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, image: Tensor, workspace: Tensor, layout: list[int], architecture: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of a packed head.

    Args:
        hidden: [N, d] float16 or bfloat16, after the final norm.
        weight: [V or more, d] float16 or bfloat16, the model's own rows; bias [V or more] of the same type, or None.
        image: [bytes] uint8 from `packing.pack`.
        workspace: [N * row_bytes or more] uint8, row_bytes of the plan, zero before the first step; one stream at a time.
        layout: `packing.words_of` a plan.
        architecture: the kernel is compiled for, such as ``sm_90``.
    Returns:
        token [N] int64; counts [N, 2 + stages] int64; capped [N] bool; ids [N, C] int64 and logits [N, C] float32, of
        which the first counts[:, -1] are written, in no order.
    """
    plan = layout_of(layout)
    check_step(hidden, weight, bias, image, workspace, plan)
    out = head_step_out(hidden, plan.stages, plan.candidates)
    if len(hidden):
        _launch_step((hidden, weight, bias, image, workspace), plan, architecture, out, None)
    return out


def _launch_step(inputs: tuple[Tensor | None, ...], plan: Layout, architecture: str, out: tuple[Tensor, ...], wide: Tensor | None) -> None:
    hidden, weight = inputs[:2]
    assert hidden is not None and weight is not None
    arguments = Arguments(
        *(t.data_ptr() if t is not None else None for t in (*inputs, *out, wide, None)),
        len(hidden), hidden.dtype == torch.bfloat16, weight.dtype == torch.bfloat16, plan.vocab_size, plan,
    )  # fmt: skip
    device = hidden.device.index
    with torch.cuda.device(device):
        prepare_step(arguments, architecture, device)(torch.cuda.current_stream(device).cuda_stream)


def prepare_step(arguments: Arguments, architecture: str, device: int) -> Prepared:
    """The launch of `flashhead_step` that its plan says, as `fh_head_step`. `arguments` are read at each launch."""
    plan = arguments.layout
    groups = max(1, min(arguments.rows, plan.multiprocessors // plan.blocks))
    handle = function("head_step.cu", "flashhead_step", device, architecture)
    return prepare(handle, (groups * plan.blocks, 1, 1), THREADS, plan.shared_bytes, arguments, cooperative=True)


def prepare_widen(arguments: Widen, multiprocessors: int, architecture: str, device: int) -> Prepared:
    """The launch of `flashhead_widen` right behind the step's, as `fh_head_widen`: likewise."""
    blocks = min(max(1, multiprocessors // arguments.rows), -(-arguments.wide_stride // THREADS))
    handle = function("head_step.cu", "flashhead_widen", device, architecture)
    overlap = capability_of(architecture) >= 90  # code for these waits by itself for the launch before it
    return prepare(handle, (blocks, arguments.rows, 1), THREADS, 0, arguments, overlap=overlap)


@head_step.register_fake
def _(hidden, weight, bias, image, workspace, layout, architecture):  # type: ignore[no-untyped-def]
    plan = layout_of(layout)
    return head_step_out(hidden, plan.stages, plan.candidates)


@torch.library.custom_op("flashhead::head_logits", mutates_args={"workspace"}, device_types="cuda")
def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, image: Tensor, workspace: Tensor, layout: list[int], architecture: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of a packed head with full-width logits: arguments and the first five results as `head_step`; two launches.

    Returns:
        ..., logits [N, V] float32, all finite, as `reference.full_logits` defines them.
    """
    plan = layout_of(layout)
    check_step(hidden, weight, bias, image, workspace, plan)
    out = head_step_out(hidden, plan.stages, plan.candidates)
    wide = hidden.new_empty(len(hidden), plan.vocab_size, dtype=torch.float32)
    if not len(hidden):
        return (*out, wide)
    _launch_step((hidden, weight, bias, image, workspace), plan, architecture, out, wide)
    arguments = widen_arguments(out, image, workspace, plan, plan.vocab_size)
    arguments.rows, arguments.wide = len(hidden), wide.data_ptr()
    device = hidden.device.index
    with torch.cuda.device(device):
        prepare_widen(arguments, plan.multiprocessors, architecture, device)(torch.cuda.current_stream(device).cuda_stream)
    return (*out, wide)


def widen_arguments(out: tuple[Tensor, ...], image: Tensor, workspace: Tensor, plan: Layout, width: int) -> Widen:
    """What `flashhead_widen` takes behind a step with outputs `out`, all but `rows` and `wide`."""
    _, counts, _, ids, logits = out
    pointers = (*(t.data_ptr() for t in (ids, logits, counts, image, workspace)), None)
    sizes = (0, plan.vocab_size, width, plan.candidates, counts.shape[1])
    return Widen(*pointers, *sizes, *(getattr(plan, name) for name, _ in Widen._fields_[len(pointers) + len(sizes) :]))


@head_logits.register_fake
def _(hidden, weight, bias, image, workspace, layout, architecture):  # type: ignore[no-untyped-def]
    plan = layout_of(layout)
    return (*head_step_out(hidden, plan.stages, plan.candidates), hidden.new_empty(len(hidden), plan.vocab_size, dtype=torch.float32))


@torch.library.custom_op("flashhead::dense_head", mutates_args={"workspace"}, device_types="cuda")
def dense_head(
    hidden: Tensor, codes: Tensor, scales: Tensor, workspace: Tensor, vocab_size: int, bits: int, group: int, blocks: int, architecture: str
) -> tuple[Tensor, Tensor]:
    """Greedy tokens of a dense head in whole numbers.

    Args:
        hidden: [N, d] float16 or bfloat16, 1 to 32 states, after the final norm.
        codes: [tiles, chunks, 1024] uint8, scales: float16, from `dense.packed_rows`; vocab_size, bits, group of the same head.
        workspace: [264] uint8, zero before the first launch; one stream at a time.
        blocks: of the launch, best the device's multiprocessors; architecture: the kernel is compiled for, such as ``sm_90``.
    Returns:
        token [N] int64, the smaller id on ties; its logit [N] float32.
    """
    check_dense(hidden, codes, scales, workspace, vocab_size, bits, group)
    token, logit = dense_head_out(hidden)
    if not len(hidden):
        return token, logit
    device, (rows, shared_bytes) = hidden.device.index, dense_plan(len(hidden), hidden.shape[1], bits, group)
    form = f"int{bits}_{group or 'row'}_{rows}"
    pointers = tuple(t.data_ptr() for t in (codes, scales, hidden, workspace, token, logit))
    numbers = (len(hidden), hidden.shape[1], vocab_size, int(hidden.dtype == torch.bfloat16))
    with torch.cuda.device(device):
        handle = function("dense_head.cu", f"flashhead_dense_{form}", device, architecture)
        stream = torch.cuda.current_stream(device).cuda_stream
        arguments = (pointers + numbers, (ctypes.c_void_p,) * 6 + (ctypes.c_int,) * 4)
        launch(handle, (blocks, 1, 1), DENSE_THREADS, shared_bytes, stream, arguments)
    return token, logit


def dense_head_out(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Empty outputs: token, logit."""
    return hidden.new_empty(len(hidden), dtype=torch.int64), hidden.new_empty(len(hidden), dtype=torch.float32)


@dense_head.register_fake
def _(hidden, codes, scales, workspace, vocab_size, bits, group, blocks, architecture):  # type: ignore[no-untyped-def]
    return dense_head_out(hidden)


def dense_columns(hidden_size: int, bits: int, group: int) -> int:
    """Columns of a packed row: d filled up to whole chunks and groups, as in dense_head.h."""
    unit = max(512 // bits, group)
    return -(-hidden_size // unit) * unit


def dense_plan(n: int, hidden_size: int, bits: int, group: int) -> tuple[int, int]:
    """Rows of the kernel and bytes of shared memory for n states, as `fh_dense_head_make_plan`."""
    rows = 8 if n <= 8 else 16 if n <= 16 else 32
    return rows, rows * 2 * (dense_columns(hidden_size, bits, group) + 32)


def most_dense_rows(hidden_size: int, bits: int, group: int, shared_bytes: int) -> int:
    """States that one launch takes on a device whose blocks may have so much shared memory.

    Raises:
        DeviceError: not even 8 of them fit.
    """
    static = DENSE_STATIC  # what the kernel declares itself
    for rows in (32, 16, 8):
        if dense_plan(rows, hidden_size, bits, group)[1] + static <= shared_bytes:
            return rows
    raise DeviceError(f"dense_head: states of {hidden_size} need more shared memory than the device's {shared_bytes} bytes a block; use the torch backend")


def check_dense(hidden: Tensor, codes: Tensor, scales: Tensor, workspace: Tensor, vocab_size: int, bits: int, group: int) -> None:
    """Raise SettingsError or DeviceError on the first argument that the kernel cannot read."""

    def want(ok: bool, what: str, found: object, expected: str) -> None:
        if not ok:
            raise SettingsError(f"dense_head: {what} is {found}, expected {expected}; see flashhead_edge.kernels.ops.dense_head")

    fits = hidden.ndim == 2 and hidden.dtype in HALVES and len(hidden) <= DENSE_ROWS and hidden.shape[1] % 8 == 0
    want(fits, "hidden", f"{hidden.dtype} {list(hidden.shape)}", f"float16 or bfloat16 [N, d], N at most {DENSE_ROWS}, d a multiple of 8")
    columns, tiles = dense_columns(hidden.shape[1], bits, group), -(-vocab_size // 16)
    shape = (tiles, columns * bits // 512, 1024)
    want(codes.shape == shape and codes.dtype == torch.uint8, "codes", f"{codes.dtype} {list(codes.shape)}", f"uint8 {list(shape)}")
    many = tiles * 16 * (columns // group if group else 1)
    want(scales.numel() == many and scales.dtype == torch.float16, "scales", f"{scales.dtype} of {scales.numel()} numbers", f"float16 of {many}")
    want(workspace.numel() >= DENSE_WORKSPACE, "workspace", f"{workspace.numel()} bytes", f"{DENSE_WORKSPACE} bytes")
    for name, tensor in (("hidden", hidden), ("codes", codes), ("scales", scales), ("workspace", workspace)):
        aligned = tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
        want(aligned, name, f"strides {tensor.stride()} at {tensor.data_ptr():#x}", "contiguous and 16-byte aligned")
        if tensor.device != hidden.device:
            raise DeviceError(f"dense_head: {name} is on {tensor.device}, expected {hidden.device}; move it there")


@torch.library.custom_op("flashhead::decode", mutates_args=(), device_types="cuda")
def decode(
    ids: Tensor,
    logits: Tensor,
    count: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    top_k: Tensor,
    seed: Tensor,
    step: Tensor,
    best: int,
    architecture: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The next token of each row from its candidates, as `decoding.choose` defines it. Settings are read when the kernel runs: a graph follows them.

    Args:
        ids: [N, C] int64, distinct in a row; logits [N, C] float32, after scale, masks, bias and penalties; C at most 8,192.
        count: [N] int64, any stride: how many of a row are candidates, the first ones, in any order (`head_step`'s counts[:, -1]).
        temperature, top_p, min_p: [N] float64; top_k, seed (its 64 bits), step: [N] int64; values as in `decoding.Sampling`, not checked here.
        best: how many of the best candidates to return with their log-probabilities; 0 is none, and no log-probability is computed.
        architecture: the kernel is compiled for, such as ``sm_90``.
    Returns:
        token [N] int64, -1 where every logit is -inf; logprob [N] float32, the token's; best_ids [N, best] int64, best_logprobs [N, best] float32:
        log softmax of the logits over the candidates, before temperature and cuts, -1 and -inf beyond their number.
    """
    settings = (temperature, top_p, min_p, top_k, seed, step)
    check_decode(ids, logits, count, settings, best)
    out = decode_out(ids, best)
    if not len(ids):
        return out
    device, width = ids.device.index, ids.shape[1]
    pointers = [t.data_ptr() for t in (ids, logits, count, *settings, *out)]
    arguments = DecodeArguments(*pointers, len(ids), width, count.stride(0), best)
    with torch.cuda.device(device):
        handle = function("decode.cu", "flashhead_decode", device, architecture)
        stream = torch.cuda.current_stream(device).cuda_stream
        shared_bytes = 8 * max(64, 1 << (width - 1).bit_length())
        launch(handle, (len(ids), 1, 1), DECODE_THREADS, shared_bytes, stream, arguments)
    return out


def decode_out(ids: Tensor, best: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty outputs: token, logprob, best_ids, best_logprobs."""
    n = len(ids)
    return ids.new_empty(n), ids.new_empty(n, dtype=torch.float32), ids.new_empty(n, best), ids.new_empty(n, best, dtype=torch.float32)


@decode.register_fake
def _(ids, logits, count, temperature, top_p, min_p, top_k, seed, step, best, architecture):  # type: ignore[no-untyped-def]
    return decode_out(ids, best)


def check_decode(ids: Tensor, logits: Tensor, count: Tensor, settings: tuple[Tensor, ...], best: int) -> None:
    """Raise SettingsError or DeviceError on the first argument that the kernel cannot read."""

    def want(ok: bool, what: str, found: object, expected: str) -> None:
        if not ok:
            raise SettingsError(f"decode: {what} is {found}, expected {expected}; see flashhead_edge.kernels.ops.decode")

    n = len(ids)
    fits = ids.ndim == 2 and 1 <= ids.shape[1] <= DECODE_CANDIDATES
    want(fits and ids.dtype == torch.int64, "ids", f"{ids.dtype} {list(ids.shape)}", f"int64 [N, C], C from 1 to {DECODE_CANDIDATES}")
    want(logits.shape == ids.shape and logits.dtype == torch.float32, "logits", f"{logits.dtype} {list(logits.shape)}", f"float32 {list(ids.shape)}")
    want(best >= 0, "best", best, "0 or more")
    for name, tensor in zip(("count", *DECODE_SETTINGS), (count, *settings)):
        dtype = torch.float64 if name in ("temperature", "top_p", "min_p") else torch.int64
        want(tensor.shape == (n,) and tensor.dtype == dtype, name, f"{tensor.dtype} {list(tensor.shape)}", f"{dtype} [{n}]")
    for name, tensor in zip(("ids", "logits", *DECODE_SETTINGS), (ids, logits, *settings)):
        want(tensor.is_contiguous(), name, f"strides {tensor.stride()}", "contiguous")
    for name, tensor in zip(("logits", "count", *DECODE_SETTINGS), (logits, count, *settings)):
        if tensor.device != ids.device:
            raise DeviceError(f"decode: {name} is on {tensor.device}, expected {ids.device}; move it there")


def check_step(hidden: Tensor, weight: Tensor, bias: Tensor | None, image: Tensor, workspace: Tensor, plan: Layout) -> None:
    """Raise SettingsError or DeviceError on the first argument that the kernel cannot read."""

    def want(ok: bool, what: str, found: object, expected: str) -> None:
        if not ok:
            raise SettingsError(f"head_step: {what} is {found}, expected {expected}; see flashhead_edge.kernels.ops.head_step")

    def kind(tensor: Tensor) -> str:
        return f"{tensor.dtype} {list(tensor.shape)}"

    d, v, rows = plan.hidden_size, plan.vocab_size, hidden.shape[0]
    want(hidden.ndim == 2 and hidden.shape[1] == d and hidden.dtype in HALVES, "hidden", kind(hidden), f"float16 or bfloat16 [N, {d}]")
    fits = weight.ndim == 2 and weight.shape[1] == d and weight.shape[0] >= v
    want(fits and weight.dtype in HALVES, "weight", kind(weight), f"float16 or bfloat16 [{v} or more, {d}]")
    if bias is not None:
        want(bias.dtype == weight.dtype and bias.ndim == 1 and len(bias) >= v, "bias", kind(bias), f"{weight.dtype} [{v} or more]")
    fits = image.dtype == torch.uint8 and image.numel() >= plan.image_bytes
    want(fits, "image", kind(image), f"uint8 [{plan.image_bytes}]")
    tensors = {"hidden": hidden, "weight": weight, "image": image, "workspace": workspace} | ({} if bias is None else {"bias": bias})
    for name, tensor in tensors.items():
        aligned = tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
        want(aligned, name, f"strides {tensor.stride()} at {tensor.data_ptr():#x}", "contiguous and 16-byte aligned")
        if tensor.device != hidden.device:
            raise DeviceError(f"head_step: {name} is on {tensor.device}, expected {hidden.device}; move it there")
    want(workspace.numel() >= rows * plan.row_bytes, "workspace", f"{workspace.numel()} bytes", f"{rows * plan.row_bytes} bytes for {rows} rows")
