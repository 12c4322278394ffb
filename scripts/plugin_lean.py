"""Load the V3 plugin library in TensorRT's lean runtime from Python, and ask each plugin what a builder asks. No GPU and no full TensorRT needed.

    python3.12 -m venv lean && lean/bin/pip install tensorrt-lean-cu13-libs==11.4.0.106 tensorrt-lean-cu13-bindings==11.4.0.106 numpy
    lean/bin/python scripts/plugin_lean.py build/plugin/libflashhead_plugins_trt11.so

What it cannot reach: of a C++ plugin the bindings call neither clone, types, shapes nor enqueue, and the lean runtime has no builder.
plugins_trt/tests/drive_v3.cpp plays all of that. One line a check; the exit code is 0 where all hold.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # flashhead_edge need not be installed beside the lean runtime

import tensorrt_lean_bindings as trt

from flashhead_edge.kernels.packing import Layout

SOURCE = {"file": "weights.safetensors", "folder": "/nowhere", "fingerprint": "0123456789abcdef"}


def head_fields() -> dict[str, object]:
    plan = Layout(vocab_size=64, hidden_size=64, candidates=16, stages=1, row_bytes=256, multiprocessors=132, image_bytes=256)
    return {
        "rows": "0 8192", "image": "8192 256", "vocab": 64, "hidden": 64, "candidates": 16, "stages": 1, "logits": 1, "sampling": 1, "max_rows": 1,
        "plans": np.frombuffer(bytes(plan), np.int32), "plan_words": ctypes.sizeof(plan) // 4,
    }  # fmt: skip


PLUGINS: dict[str, tuple[dict[str, object], int]] = {  # fields, outputs
    "TokenEmbedding": ({"rows": "0 8192", "vocab": 64, "d": 64, "scale": 8.0} | SOURCE, 1),
    "RmsNorm": ({"weight": "0 128", "d": 64, "epsilon": 1e-6} | SOURCE, 2),
    "W4A16Linear": ({"codes": "0 2048", "scales": "2048 256", "zeros": "", "n": 64, "k": 64, "group": 32} | SOURCE, 1),
    "GatedProduct": ({"activation": 0}, 1),
    "DecodeAttention": ({"q_heads": 4, "kv_heads": 2, "head_size": 64, "max_length": 32, "scale": 0.125, "rotations": "0 8192"} | SOURCE, 3),
    "FlashHead": (head_fields() | SOURCE, 7),
}


def field(name: str, value: object) -> trt.PluginField:
    if isinstance(value, str):
        return trt.PluginField(name, value.encode() + b"\0", trt.PluginFieldType.CHAR)
    if isinstance(value, float):
        return trt.PluginField(name, np.array([value], np.float32), trt.PluginFieldType.FLOAT32)
    return trt.PluginField(name, np.atleast_1d(np.asarray(value, np.int32)), trt.PluginFieldType.INT32)


def main(path: str) -> int:
    failed = []

    def check(ok: bool, what: str) -> None:
        print(("ok      " if ok else "FAILED  ") + what)
        if not ok:
            failed.append(what)

    registry = trt.get_plugin_registry()
    check(registry.load_library(path) is not None, f"lean {trt.__version__} loads {path}")
    library = ctypes.CDLL(path)
    library.flashhead_plugin_version.restype = library.flashhead_last_error.restype = ctypes.c_char_p
    library.flashhead_device_bytes.restype = ctypes.c_longlong
    print("        " + library.flashhead_plugin_version().decode())
    for name, (fields, outputs) in PLUGINS.items():
        creator = registry.get_creator(name, "1", "flashhead")
        check(creator is not None, f"{name}: in the registry")
        if creator is None:
            continue
        known = {f.name for f in creator.field_names}
        check(set(fields) <= known, f"{name}: announces {len(known)} fields")
        given = [field(n, v) for n, v in fields.items()]
        plugin = creator.create_plugin("node", trt.PluginFieldCollection(given), trt.TensorRTPhase.BUILD)
        check(plugin is not None, f"{name}: made from fields")
        if plugin is None:
            print("        " + library.flashhead_last_error().decode())
            continue
        kinds = trt.PluginCapabilityType
        core, build, runtime = (plugin.get_capability_interface(k) for k in (kinds.CORE, kinds.BUILD, kinds.RUNTIME))
        check(None not in (core, build, runtime), f"{name}: core, build and runtime")
        told = (core.plugin_name, core.plugin_version, core.plugin_namespace)
        check(told == (name, "1", "flashhead"), f"{name}: {told}")
        check(build.num_outputs == outputs, f"{name}: {build.num_outputs} outputs")
        interfaces = [(i.interface_info.kind, i.interface_info.major) for i in (core, build, runtime)]
        check(interfaces == [("PLUGIN_V3ONE_CORE", 1), ("PLUGIN_V3ONE_BUILD", 2), ("PLUGIN_V3ONE_RUNTIME", 1)], f"{name}: {interfaces}")
        stored = creator.create_plugin("node", trt.PluginFieldCollection([*given, field("format", 1)]), trt.TensorRTPhase.RUNTIME)
        check(stored is not None, f"{name}: made from what an engine stores")
        missing = [f for f in given if f.name != next(iter(fields))]
        for wrong, part in ((missing, "is missing"), ([*given, field("format", 2)], "in format 2"), ([*given, field("colour", 1)], "no field colour")):
            refused = creator.create_plugin("node", trt.PluginFieldCollection(wrong), trt.TensorRTPhase.RUNTIME)
            said = library.flashhead_last_error().decode()
            check(refused is None and part in said, f"{name}: {said}")
    check(library.flashhead_device_bytes() == 0, "no weights on a device")
    print(f"{len(failed)} checks failed" if failed else "all right")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
