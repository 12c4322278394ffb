"""Draw docs/rooms.svg: the rooms of the package in layers, each of which imports from its own and those below alone. `make docs` runs it.

python scripts/draw_rooms.py

tests/test_imports.py holds the layers against the imports that are allowed, and the file against this script.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

PICTURE = Path(__file__).resolve().parent.parent / "docs/rooms.svg"
WIDTH, LEFT, RIGHT, GAP = 1080, 190, 1050, 14  # of the drawing, of its boxes, between two boxes
BAND, BETWEEN, TOP = 98, 26, 20  # height of a layer, between two layers, above the first
STYLE = """text{font-family:system-ui,"Segoe UI","Helvetica Neue",Arial,sans-serif;fill:#1b2430}
.n{font-size:15px;font-weight:600}.m{font-size:12px;font-weight:600}.s{font-size:12px;fill:#51606f}.l{font-size:12px;font-weight:600;fill:#7a8794;letter-spacing:.04em}
.b{fill:#fff;stroke:#9db0c2;stroke-width:1.2}.k{fill:#e8f1fb;stroke:#3f79b7;stroke-width:1.4}
.band{fill:#f5f7f9}.a{stroke:#51606f;stroke-width:1.6;fill:none;marker-end:url(#h)}"""
HEAD = (
    '<marker id="h" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
    '<path d="M0 0L10 5L0 10z" fill="#51606f"/></marker>'
)


@dataclass(frozen=True)
class Box:
    """Rooms that are drawn together, and lines on what they hold."""

    rooms: tuple[str, ...]  # the first one larger; names in one string are drawn in one line
    words: tuple[str, ...]
    key: bool = False  # what everything else is judged by


@dataclass(frozen=True)
class Layer:
    """A layer and its name, in two lines or one."""

    name: tuple[str, ...]
    boxes: tuple[Box, ...]


LAYERS = (
    Layer(("what a", "person calls"), (
        Box(("cli",), ("one file a verb,", "no logic")), Box(("bench",), ("the measured", "comparisons")), Box(("serve",), ("OpenAI's API", "on the device")),
        Box(("bundle",), ("a model, packed", "for a board")), Box(("doctor",), ("what this", "machine has")),
        Box(("inspection",), ("what is in", "a checkpoint")),
    )),
    Layer(("what runs and", "shows heads"), (
        Box(("generation", "exact"), ("the decode loop",)), Box(("jetson",), ("without torch: ONNX,", "TensorRT, CUDA")),
        Box(("export",), ("to ONNX", "and TensorRT")), Box(("records",), ("the one form of", "a measurement")),
        Box(("report",), ("tables, pages,", "the explorer")),
    )),
    Layer(("what judges", "and chooses"), (
        Box(("calibration", "search, caps"), ("the least cost",)), Box(("conversion", "devices"), ("to a checkpoint",)),
        Box(("fitting", "capture"), ("a head from states",)), Box(("evaluation", "rivals"), ("agreement, bytes",)), Box(("quantize",), ("a body", "in 4 bits")),
        Box(("integrations",), ("in transformers", "and vLLM")),
    )),
    Layer(("the method",), (
        Box(("reference",), ("the three stages:", "what is correct"), key=True), Box(("kernels",), ("the stages", "on a GPU")),
        Box(("decoding",), ("greedy, sampling", "over candidates")), Box(("clustering", "coding"), ("equal sizes; codes",)),
        Box(("checkpoint", "packed"), ("model folders",)), Box(("program",), ("a decoder", "as nodes")),
    )),
    Layer(("plain data,", "numpy only"), (
        Box(("index",), ("arrays and settings", "of one head"), key=True), Box(("codes",), ("coded matrices", "and their checks")),
        Box(("head",), ("the protocol of", "every backend")), Box(("costs",), ("bytes that", "a step reads")),
        Box(("cases",), ("made heads for", "tests and benches")),
    )),
    Layer(("for everyone",), (
        Box(("errors",), ("what a caller", "can catch")), Box(("progress",), ("where long", "work is")), Box(("intervals",), ("how sure", "a share is")),
    )),
)  # fmt: skip


def picture() -> str:
    """The drawing as text."""
    height = TOP + len(LAYERS) * BAND + (len(LAYERS) - 1) * BETWEEN + TOP
    words = {6: "Six", 7: "Seven"}.get(len(LAYERS), str(len(LAYERS)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" aria-labelledby="t d">',
        '<title id="t">The rooms of flashhead-edge</title>',
        f'<desc id="d">{words} layers of modules; each imports only from its own layer and those below it.</desc>',
        f"<style>\n{STYLE}\n</style>\n<defs>{HEAD}</defs>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for i, layer in enumerate(LAYERS):
        top = TOP + i * (BAND + BETWEEN)
        parts += _layer(layer, top)
        if i:
            parts.append(f'<path class="a" d="M{(LEFT + RIGHT) / 2:g} {top - BETWEEN + 2}V{top - 3}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _layer(layer: Layer, top: int) -> list[str]:
    parts = [f'<rect class="band" x="16" y="{top}" width="{WIDTH - 32}" height="{BAND}" rx="9"/>']
    first = top + BAND / 2 + 4 - 8 * (len(layer.name) - 1)
    parts += [f'<text class="l" x="32" y="{first + 16 * i:g}">{escape(line)}</text>' for i, line in enumerate(layer.name)]
    most = max(len(each.boxes) for each in LAYERS)
    wide = (RIGHT - LEFT - GAP * (max(len(layer.boxes), most - 1) - 1)) / max(len(layer.boxes), most - 1)  # a layer of few boxes does not stretch them
    for i, box in enumerate(layer.boxes):
        x = LEFT + i * (wide + GAP)
        middle = x + wide / 2
        parts.append(f'<rect class="{"k" if box.key else "b"}" x="{x:.1f}" y="{top + 12}" width="{wide:.1f}" height="{BAND - 24}" rx="7"/>')
        lines = [("n", box.rooms[0]), *(("m", room) for room in box.rooms[1:]), *(("s", line) for line in box.words)]
        parts += [
            f'<text class="{kind}" x="{middle:.1f}" y="{top + 39 + 18 * min(j, 1) + 15 * max(j - 1, 0)}" text-anchor="middle">{escape(line)}</text>'
            for j, (kind, line) in enumerate(lines)
        ]
    return parts


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
