"""The arrows of docs/architecture.md, read from the imports of every module: who may import whom, and what from outside.

An import inside a function counts for the arrows between rooms; only imports at module level count for packages from
outside, since those are what `import` costs and needs.
"""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "flashhead_edge"
ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"": ROOT / PACKAGE, "export": ROOT / "export", "jetson": ROOT / "jetson"}

# Rooms from the lowest to the highest. A room may import what its line names, itself, and nothing else.
# "package" is flashhead_edge/__init__.py: its names are loaded when they are used.
LEAVES = {"errors", "progress", "intervals"}
DATA = LEAVES | {"index", "codes", "head", "costs"}
HEADS = DATA | {"coding", "reference", "decoding", "clustering", "cases"}
CALIBRATION = {"capture", "fitting", "devices", "search", "caps", "calibration", "conversion"}
MIDDLE = HEADS | CALIBRATION | {"checkpoint", "evaluation", "quantize", "kernels", "program", "packed", "integrations", "generation", "exact"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "progress": set(),
    "intervals": {"errors"},
    "codes": {"errors"},
    "index": {"errors", "codes"},
    "head": {"errors", "index", "codes"},
    "costs": {"errors", "index", "codes"},
    "coding": DATA,
    "decoding": DATA,
    "clustering": LEAVES,
    "reference": DATA | {"coding"},
    "cases": DATA,
    "checkpoint": DATA | {"coding"},
    "capture": LEAVES | {"decoding", "checkpoint"},
    "devices": DATA,
    "search": LEAVES,
    "fitting": HEADS | {"capture"},
    "evaluation": HEADS | {"checkpoint", "capture", "rivals", "integrations"},
    "rivals": HEADS | {"checkpoint", "evaluation"},
    "caps": HEADS | {"search"},
    "calibration": HEADS | {"capture", "fitting", "devices", "search", "caps"},
    "conversion": HEADS | {"checkpoint", "capture", "fitting", "devices", "calibration"},
    "quantize": DATA | {"checkpoint", "capture"},
    "kernels": DATA | {"reference"},
    "program": DATA | {"kernels", "packed", "checkpoint"},
    "packed": LEAVES | {"checkpoint"},
    "integrations": HEADS | {"checkpoint", "kernels"},
    "exact": LEAVES,
    "generation": HEADS | {"checkpoint", "capture", "integrations", "exact", "kernels"},
    "serve": LEAVES | {"decoding", "checkpoint", "generation", "jetson", "package"},
    "inspection": DATA | {"checkpoint", "evaluation"},
    "records": LEAVES,
    "report": DATA | {"evaluation", "rivals", "records"},
    "bench": MIDDLE | {"package", "report", "records", "rivals", "caps", "export", "jetson"},
    "bundle": {"package"} | LEAVES | {"checkpoint", "inspection", "jetson", "program"},
    "doctor": {"package", "jetson"} | LEAVES,
    "export": {"package"} | HEADS | {"checkpoint", "evaluation", "kernels", "program", "jetson"},
    "jetson": {"package"} | DATA | {"kernels", "packed", "program", "decoding", "evaluation", "checkpoint", "generation", "exact"},
    "package": {"errors", "integrations"},
    "cli": MIDDLE | {"package", "records", "report", "bench", "inspection", "doctor", "export", "jetson", "bundle", "serve"},
    "__main__": {"cli"},
}

# Packages from outside that a room may import at module level. The standard library is always allowed.
NUMPY = {"numpy"}
TORCH = NUMPY | {"torch"}
MAY_NEED: dict[str, set[str]] = {
    "errors": set(),
    "progress": set(),
    "intervals": set(),
    "codes": NUMPY,
    "index": NUMPY,
    "head": NUMPY,
    "costs": NUMPY,
    "coding": TORCH,
    "decoding": NUMPY,
    "clustering": TORCH,
    "reference": TORCH,
    "cases": NUMPY,
    "checkpoint": TORCH | {"safetensors", "transformers"},
    "capture": TORCH,
    "devices": set(),
    "search": TORCH,
    "fitting": TORCH,
    "evaluation": NUMPY,
    "rivals": TORCH,
    "caps": TORCH,
    "calibration": TORCH,
    "conversion": TORCH,
    "quantize": TORCH | {"safetensors"},
    "kernels": TORCH,
    "program": NUMPY,
    "packed": NUMPY,
    "integrations": TORCH | {"transformers", "vllm"},
    "exact": set(),
    "generation": TORCH,
    "serve": NUMPY | {"anyio", "prometheus_client", "starlette", "uvicorn"},
    "inspection": NUMPY,
    "records": set(),
    "report": NUMPY | {"rich"},
    "bench": TORCH | {"click", "jinja2", "lm_eval", "transformers"},
    "bundle": set(),
    "doctor": set(),
    "export": TORCH | {"onnx", "onnx_ir", "ml_dtypes"},
    "jetson": NUMPY,
    "package": set(),
    "cli": {"click"},
    "__main__": set(),
}


def modules() -> list[tuple[str, str, Path]]:
    """Every module of the distribution: room, dotted name, file."""
    found = []
    for prefix, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).with_suffix("").parts
            parts = [PACKAGE, *([prefix] if prefix else []), *(p for p in inner if p != "__init__")]
            found.append((parts[1] if len(parts) > 1 else "package", ".".join(parts), path))
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.AST, *, top_only: bool, inside: bool = False) -> Iterator[tuple[str, int]]:
    """Dotted names that the code imports, with their lines; with `top_only` those that importing the module runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name, so that this test reads it"
            assert node.module is not None
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif top_only and (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or _is_type_checking(node)):
            continue
        else:
            yield from imports(node, top_only=top_only)


def room_of(name: str) -> str | None:
    """The room that a dotted name belongs to; None for names from outside."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    rooms = {room for room, _, _ in modules()} | set(MAY_IMPORT)
    return parts[1] if len(parts) > 1 and parts[1] in rooms else "package"


def broken_arrows(room: str, tree: ast.AST) -> list[str]:
    allowed = MAY_IMPORT[room] | {room}
    return [
        f"line {line}: {room} imports {to} ({name})" for name, line in imports(tree, top_only=False) if (to := room_of(name)) is not None and to not in allowed
    ]


def needed_too_much(room: str, tree: ast.AST) -> list[str]:
    outside = [(name.split(".")[0], line) for name, line in imports(tree, top_only=True) if room_of(name) is None]
    return [f"line {line}: {room} needs {top}" for top, line in outside if top not in sys.stdlib_module_names and top not in MAY_NEED[room]]


MODULES = modules()


@pytest.mark.parametrize(("room", "path"), [(r, p) for r, _, p in MODULES], ids=[n for _, n, _ in MODULES])
def test_module_keeps_the_arrows(room: str, path: Path) -> None:
    assert room in MAY_IMPORT, f"{path} is a new room: give it a line in both tables of this test and in docs/architecture.md"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not broken_arrows(room, tree)
    assert not needed_too_much(room, tree)


def test_tables_name_the_same_rooms_and_point_downwards() -> None:
    assert MAY_IMPORT.keys() == MAY_NEED.keys()
    loops_allowed = {frozenset({"evaluation", "rivals"})}  # rivals are contenders of evaluation, which lists them inside a function
    for room, allowed in MAY_IMPORT.items():
        assert allowed <= MAY_IMPORT.keys(), room
        back = {other for other in allowed if room in MAY_IMPORT[other] and frozenset({room, other}) not in loops_allowed}
        assert not back, f"{room} and {back} import each other"


def test_checker_sees_what_it_must() -> None:
    """The checker itself: code that breaks a rule is found, at module level, in functions and behind TYPE_CHECKING."""
    assert broken_arrows("index", ast.parse("from flashhead_edge.reference import step"))
    assert broken_arrows("index", ast.parse("def f():\n    import flashhead_edge.cli"))
    assert broken_arrows("decoding", ast.parse("from flashhead_edge import checkpoint"))
    assert not broken_arrows("index", ast.parse("from flashhead_edge.errors import CheckpointError\nfrom flashhead_edge.codes import Coded"))
    assert needed_too_much("index", ast.parse("import torch.nn"))
    assert needed_too_much("index", ast.parse("try:\n    import torch\nexcept ImportError:\n    pass"))
    assert needed_too_much("index", ast.parse("class A:\n    import torch"))
    assert not needed_too_much("index", ast.parse("import os\nimport numpy as np\ndef f():\n    import torch"))
    assert not needed_too_much("index", ast.parse("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"))


LIGHT = {"click", "flashhead_edge", "colorama"}  # what `flashhead --help` may load beyond the standard library


def help_of(*arguments: str) -> str:
    return f"from flashhead_edge.cli import main\ntry:\n    main({[*arguments, '--help']})\nexcept SystemExit as e:\n    assert e.code == 0"


NUMPY_ROOMS = "import " + ", ".join(f"flashhead_edge.{room}" for room in ("index", "costs", "decoding", "head", "checkpoint", "packed"))


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import flashhead_edge; flashhead_edge.FlashHeadError", {"flashhead_edge"}),
        (help_of(), LIGHT),
        (help_of("convert"), LIGHT),
        (NUMPY_ROOMS, {"flashhead_edge", "numpy"}),
    ],
    ids=["import", "help", "verb help", "numpy rooms"],
)
def test_start_loads_only_what_it_may(code: str, allowed: set[str]) -> None:
    """What the start loads, checked in a fresh process: the reason why it takes under 0.3 s on any machine."""
    # what Python itself loads at its start (path files of installed packages) is taken off
    after = "print('LOADED', *sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    script = f"import sys\nbefore = set(sys.modules)\n{code}\n{after}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.splitlines()[-1].split()[1:]) - set(sys.stdlib_module_names)
    assert {m for m in loaded if not m.startswith("_")} <= allowed


def test_the_drawing_of_the_rooms_is_theirs_and_current() -> None:
    """Red: `make docs`, or put a new room into a layer of scripts/draw_rooms.py."""
    script = runpy.run_path(str(ROOT / "scripts/draw_rooms.py"))
    layer_of = {room: i for i, layer in enumerate(script["LAYERS"]) for box in layer.boxes for rooms in box.rooms for room in rooms.split(", ")}
    assert set(layer_of) == set(MAY_IMPORT) - {"package", "__main__"}  # names without a room of their own
    upwards = [(room, other) for room, i in layer_of.items() for other in MAY_IMPORT[room] if layer_of.get(other, i) < i]
    assert upwards == []
    assert script["PICTURE"].read_text(encoding="utf-8") == script["picture"]()
