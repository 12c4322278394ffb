"""A program on disk: weights.safetensors and program.json, whole or absent. numpy only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashhead_edge.checkpoint.atomic import replacing, write_file
from flashhead_edge.checkpoint.tensors import read_header
from flashhead_edge.errors import CheckpointError, ExportError
from flashhead_edge.program.build import Built
from flashhead_edge.program.fingerprint import fnv1a
from flashhead_edge.program.head import Device, HeadPart, decoder_graph, settings_of
from flashhead_edge.program.nodes import Attention, Attribute, Constant, Decoder, Node, Stored, Tensor
from flashhead_edge.program.weights import STORED, Item, write_weights
from flashhead_edge.progress import Progress, silent

FORMAT = 3  # of program.json; to be raised too when a checkpoint's program becomes another one: kept ones are known by it
PROGRAM, WEIGHTS = "program.json", "weights.safetensors"
AGAIN = "write the program again"
SPARE = 8 << 20  # bytes for program.json


@dataclass(frozen=True, eq=False)
class Program:
    """A program that can run: its nodes, and where each tensor lies in the file of weights."""

    folder: Path
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[Node, ...]  # in an order in which they run, the head's last; tensors stand in the attributes as `Stored`
    constants: Mapping[str, str]  # values that are tensors of the file, by name: [columns] in the program's precision
    widths: Mapping[str, int]  # columns of each value
    attentions: tuple[Attention, ...]  # of each layer
    places: Mapping[str, tuple[int, int]]  # absolute byte offset and byte length of each tensor
    precision: str  # float16 or bfloat16
    context: int  # positions of the cache
    batch: int  # texts at once, at most
    device: Device  # that the head's launches are planned for
    settings: Mapping[str, Any]  # of the head and of the model, as a manifest has them
    fingerprint: str  # of the head
    document: Mapping[str, Any]  # the whole of program.json

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS


def program_items(d: Decoder, h: HeadPart) -> list[Item]:
    """All tensors in the order of the file: matrices of the vocabulary first, the head's last."""
    first = {name: d.items[name] for name in d.items if name == "embedding"} | {h.rows.name: h.rows}
    constants = [_constant_item(name, c) for name, c in d.constants.items() if isinstance(c, Constant)]
    return [*first.values(), *(item for name, item in d.items.items() if name not in first), *constants, *h.items]


def sizes_of(d: Decoder, h: HeadPart) -> dict[str, int]:
    """Bytes of each tensor of the file, without making any."""
    return {item.name: item.nbytes for item in program_items(d, h)}


def _constant_item(name: str, c: Constant) -> Item:
    if c.dtype not in STORED or c.array.nbytes % 16:
        raise ExportError(f"{name}: a constant {c.dtype} {list(c.array.shape)}, expected 16-bit floats in multiples of 16 bytes; report this model")
    return Item(name, STORED[c.dtype], c.array.shape, lambda: [c.array])


def write_program(folder: str | Path, built: Built, device: Device, about: Mapping[str, Any], progress: Progress = silent) -> Program:
    """Write a program into a folder of its own, which another one that lies there gives way to.

    Args:
        device: that the head was planned for.
        about: what else program.json shall say, under `about`.
    Raises:
        ExportError: a value does not fit the type.
        FlashHeadError: the disk is full or refuses; the folder is as it was.
    """
    path = Path(folder).expanduser().resolve()
    d, h = built.decoder, built.head
    if not d.attentions:
        raise ExportError("decoder: it has no attention, expected one a layer; report this model")
    items, graph, first = program_items(d, h), decoder_graph(d, h), d.attentions[0]
    settings = settings_of(h.index, h.scale, h.softcap, built.positions, built.vocab) | {
        "body_parameters": d.parameters, "layers": len(d.attentions), "kv_heads": first.kv_heads, "head_size": first.head_size, "q_heads": first.q_heads,
    }  # fmt: skip
    with replacing(path, sum(item.nbytes for item in items) + SPARE) as new:
        written = write_weights(new / WEIGHTS, items, h.index.fingerprint, progress)
        document = {
            "format": FORMAT,
            "fingerprint": h.index.fingerprint,
            "weights_fingerprint": written.fingerprint,
            "weights_bytes": written.size,
            "weights_sha256": written.sha256,
            "precision": d.precision,
            "context": d.context,
            "batch": built.batch,
            "device": asdict(device),
            "settings": settings,
            "notices": list(built.notices),
            "about": dict(about),
            "inputs": [asdict(t) for t in graph.inputs],
            "outputs": [asdict(t) for t in graph.outputs],
            "constants": {name: {"tensor": name} for name in graph.constants},
            "widths": d.widths,
            "attentions": [asdict(a) for a in d.attentions],
            "nodes": [_said(node) for node in graph.nodes],
        }
        write_file(new / PROGRAM, [(json.dumps(document, separators=(",", ":")) + "\n").encode()])
    return read_program(path)


def _said(node: Node) -> dict[str, Any]:
    attributes = {name: {"tensor": a.name} if isinstance(a, Stored) else a for name, a in node.attributes.items()}
    return {
        "op": node.op, "domain": node.domain, "name": node.name, "inputs": node.inputs, "outputs": node.outputs, "attributes": attributes,
    }  # fmt: skip


def read_program(folder: str | Path, name: str = PROGRAM) -> Program:
    """Open a program, its file of weights checked by size and header.

    Args:
        name: of its file of nodes: a folder may hold one for each of several devices, over one file of weights.
    Raises:
        CheckpointError: a file is missing, cut off, damaged, or of another format or model.
    """
    folder = Path(folder)
    path = folder / name
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing, expected a program; {AGAIN}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the file cannot be read ({error}), expected a program; {AGAIN}") from error
    found = document.get("format") if isinstance(document, dict) else type(document).__name__
    if found != FORMAT:
        raise CheckpointError(f"{path}: the program has format {found}, expected {FORMAT}, which this flashhead-edge reads; {AGAIN}")
    places = _places(folder / WEIGHTS, document.get("weights_fingerprint"))
    try:
        program = Program(
            folder=folder,
            inputs=_tensors(document["inputs"]),
            outputs=_tensors(document["outputs"]),
            nodes=tuple(_node(n) for n in document["nodes"]),
            constants={name: str(c["tensor"]) for name, c in document["constants"].items()},
            widths={name: int(width) for name, width in document["widths"].items()},
            attentions=tuple(Attention(**a) for a in document["attentions"]),
            places=places,
            precision=str(document["precision"]),
            context=int(document["context"]),
            batch=int(document["batch"]),
            device=Device(**document["device"]),
            settings=dict(document["settings"]),
            fingerprint=str(document["fingerprint"]),
            document=document,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: the program does not have the expected form ({error!r}); {AGAIN}") from error
    named = {a.name for n in program.nodes for a in n.attributes.values() if isinstance(a, Stored) and a.name} | set(program.constants.values())
    if lost := sorted(named - places.keys()):
        raise CheckpointError(f"{folder / WEIGHTS}: {lost[0]} is missing, expected by {name}; {AGAIN}")
    return program


def _tensors(said: list[dict[str, Any]]) -> tuple[Tensor, ...]:
    return tuple(Tensor(t["name"], t["dtype"], tuple(t["shape"])) for t in said)


def _node(said: Mapping[str, Any]) -> Node:
    def attribute(value: Any) -> Attribute:
        if isinstance(value, dict):
            return Stored(str(value["tensor"]))
        return tuple(value) if isinstance(value, list) else value

    attributes = {name: attribute(value) for name, value in said["attributes"].items()}
    return Node(said["op"], said["name"], tuple(said["inputs"]), tuple(said["outputs"]), attributes, said["domain"])


def _places(path: Path, fingerprint: object) -> dict[str, tuple[int, int]]:
    """Where the tensors of a file of weights lie."""
    header = read_header(path)
    with path.open("rb") as file:
        found = fnv1a(file.read(min((entry.start for entry in header.values()), default=0)))
    if found != fingerprint:
        raise CheckpointError(f"{path}: the weights have fingerprint {found}, expected {fingerprint}: another program's; {AGAIN}")
    return {name: (entry.start, entry.end - entry.start) for name, entry in header.items()}
