"""The launchers of the CUDA kernels as a library without torch and without CUDA's runtime: `_cuda`, compiled with the package by a C++ compiler alone.

A launcher checks its arguments, cuts the launch for the device and puts it into a stream (plugins_trt/kernels/*.h say what each does). The kernels' code
is no part of the library: see cuda_kernels.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, ClassVar

from flashhead_edge.errors import EngineError
from flashhead_edge.jetson.driver import DeviceFacts
from flashhead_edge.kernels.packing import Arguments, DecodeArguments, Fields, Widen

HOW = "install flashhead-edge where g++ and binutils are, or a wheel that was built there"
FP16, BF16 = 0, 1  # fh_dtype
ADD, MULTIPLY = 0, 1  # fh_combination
MAIL_HEAD, MAIL_ROW = 4, 3  # advance.h
MOST_ROWS = 32  # advance.h, head_step.h
DENSE_STATES = 8  # dense_rows.h
P, I, F = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


class DeviceLimits(ctypes.Structure):
    """`fh_device` of device.h."""

    _fields_ = [(n, I) for n in ("capability", "multiprocessors", "shared_bytes", "overlap")]


class AttentionShape(ctypes.Structure):
    """`fh_attention_shape` of attention.h."""

    _fields_ = [*[(n, I) for n in ("batch", "queries", "q_heads", "kv_heads", "head_size", "max_length", "window")], ("scale", F), ("dtype", I)]


class AttentionPlan(ctypes.Structure):
    """`fh_attention_plan` of attention.h."""

    _fields_ = [*[(n, I) for n in ("splits", "cluster", "rows", "row_blocks", "threads")], ("workspace_bytes", ctypes.c_size_t), ("items", I)]


class Linear(ctypes.Structure):
    """`fh_w4a16_weight` of w4a16.h."""

    _fields_ = [*[(n, P) for n in ("codes", "scales", "zeros")], *[(n, I) for n in ("n", "k", "group", "dtype")]]


class Fusion(ctypes.Structure):
    """`fh_w4a16_fusion` of w4a16_fused.h."""

    _fields_: ClassVar[Fields] = [
        *[(n, P) for n in ("residual", "sum", "first_norm", "norm")],
        *[("weight_offset", F), ("epsilon", F), ("gated", I), ("activation", I)],
    ]


class AttentionFusion(ctypes.Structure):
    """`fh_attention_fusion` of attention.h."""

    _fields_: ClassVar[Fields] = [
        *[(n, P) for n in ("qkv", "rotations", "q_norm", "k_norm")],
        *[("norm_offset", F), ("epsilon", F)],
    ]


class LinearPlan(ctypes.Structure):
    """`fh_w4a16_plan` of w4a16.h."""

    _fields_ = [(n, I) for n in ("decode", "wide", "tile_outputs", "tile_tokens", "grid_x", "grid_y", "threads", "shared_bytes")]


class DrawSettings(ctypes.Structure):
    """`FlashHeadSettings` of settings.h."""

    _fields_ = [
        *[(n, P) for n in ("temperature", "top_p", "min_p", "top_k", "step")],
        *[(n, P) for n in ("wide_temperature", "wide_top_p", "wide_min_p", "wide_top_k", "wide_step")],
        *[(n, P) for n in ("logits", "count", "final_logits")],
        *[(n, ctypes.c_double) for n in ("scale", "softcap")],
        *[(n, I) for n in ("rows", "width", "count_stride")],
    ]


class Advance(ctypes.Structure):
    """`FlashHeadAdvance` of advance.h."""

    _fields_: ClassVar[Fields] = [
        *[(n, P) for n in ("token", "counts", "capped", "logprob", "ids", "lengths", "step", "number", "mail")],
        *[(n, I) for n in ("rows", "counted", "slots", "slot_words")],
    ]


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    Advance, Arguments, DecodeArguments, DrawSettings, Widen, AttentionFusion, AttentionPlan, AttentionShape, DeviceLimits, Fusion, Linear,
)  # fmt: skip # in the order of fh_sizes
LAUNCHERS: dict[str, tuple[Any, ...]] = {  # and what each takes before the device and the stream
    "fh_embedding": (P, P, F, P, I, I, I, I),
    "fh_rms_norm": (P, P, P, P, F, F, P, I, I, I),
    "fh_gated_product": (P, P, I, I, I, I),
    "fh_combine": (P, P, I, I, P, I, I, I),
    "fh_w4a16_linear": (P, P, P, I),
    "fh_attention_rope_write": (P, P, P, P, P, F, F, P, P, P, P),
    "fh_attention_decode": (P, P, P, P, P, P, P, P, P),
    "fh_w4a16_fused": (P, P, P, P, I),
    "fh_attention_rope_decode": (P, P, P, P, P, P, P, P, P),
    "fh_head_step": (P,),
    "fh_head_widen": (P,),
    "fh_draw_settings": (P,),
    "fh_decode": (P,),
    "fh_advance": (P,),
    "fh_dense_rows": (P, P, P, P, I, I, I, I),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The library.

    Raises:
        EngineError: it was not compiled when the package was installed, or is of another version.
    """
    path = next(iter(sorted(Path(__file__).parent.glob("_cuda.*so"))), None)
    if path is None:
        raise EngineError(f"cuda backend: its library of launchers is not in this installation, expected _cuda beside it; {HOW}")
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(f"{path}: the library cannot be loaded ({error}), expected one for this machine; {HOW}") from error
    other = f"{path}: the library is of another version of flashhead-edge, expected this one's; install the package again"
    if missing := [name for name in LAUNCHERS if not hasattr(found, name)]:
        raise EngineError(f"{other} (it has no {missing[0]})")
    for name, takes in LAUNCHERS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = [*takes, P, P], ctypes.c_char_p
    found.fh_attention_make_plan.argtypes, found.fh_attention_make_plan.restype = [P, P, P], ctypes.c_char_p
    found.fh_w4a16_make_fused_plan.argtypes, found.fh_w4a16_make_fused_plan.restype = [P, P, I, P, P], None
    found.fh_kernel.restype = found.fh_seen.restype = ctypes.c_char_p
    found.fh_expression.argtypes, found.fh_expression.restype = [ctypes.c_char_p], P
    found.fh_free.argtypes, found.fh_free.restype = [P], None
    found.fh_set_code.argtypes = [ctypes.c_char_p, P]
    found.fh_wait.argtypes = [P, ctypes.c_uint32, ctypes.c_double]
    sizes = (ctypes.c_int * len(STRUCTURES))()
    found.fh_sizes(sizes)
    if list(sizes) != [ctypes.sizeof(s) for s in STRUCTURES]:
        raise EngineError(other)
    return found


def launch(function: str, *arguments: Any, device: DeviceLimits, stream: int) -> None:
    """Put a launch into a stream.

    Args:
        arguments: as `LAUNCHERS` has them: addresses as numbers, structures by `ctypes.byref`.
    Raises:
        EngineError: the launcher refuses, in its own words.
    """
    said = getattr(library(), function)(*(address(a) for a in arguments), ctypes.addressof(device), stream)
    if said is not None:
        raise EngineError(f"cuda backend: {said.decode(errors='replace')}")


def address(value: Any) -> Any:
    """Of a structure, which the caller holds; other values are themselves."""
    return ctypes.addressof(value) if isinstance(value, ctypes.Structure) else value


def attention_plan(shape: AttentionShape, device: DeviceLimits) -> AttentionPlan:
    """How an attention's launch is cut.

    Raises:
        EngineError: the kernel does not take the shape.
    """
    plan = AttentionPlan()
    said = library().fh_attention_make_plan(ctypes.addressof(shape), ctypes.addressof(device), ctypes.addressof(plan))
    if said is not None:
        raise EngineError(f"cuda backend: {said.decode(errors='replace')}")
    return plan


def fused_shared_bytes(weight: Linear, fusion: Fusion, rows: int, device: DeviceLimits) -> int:
    """Shared memory that a block of a fused product takes."""
    plan = LinearPlan()
    library().fh_w4a16_make_fused_plan(ctypes.addressof(weight), ctypes.addressof(fusion), rows, ctypes.addressof(device), ctypes.addressof(plan))
    return plan.shared_bytes


def limits_of(facts: DeviceFacts, *, overlap: bool | None = None) -> DeviceLimits:
    """What launchers must know of a GPU. Launches overlap from capability 9.0 on, unless `overlap` says otherwise."""
    return DeviceLimits(facts.capability, facts.multiprocessors, facts.shared_bytes, int(facts.capability >= 90 if overlap is None else overlap))
