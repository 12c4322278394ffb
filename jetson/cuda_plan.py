"""What the CUDA backend takes of a GPU, before anything is loaded: a checkpoint's program built for its sizes alone, laid out as the backend lays it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashhead_edge.checkpoint.assets import read_index
from flashhead_edge.jetson import cuda_library as native
from flashhead_edge.jetson.cuda_memory import device_bytes
from flashhead_edge.jetson.cuda_program import MemoryPlan, Program, head_of, memory_plan
from flashhead_edge.jetson.driver import DeviceFacts
from flashhead_edge.jetson.plan import Layer, Need
from flashhead_edge.packed import open_weights
from flashhead_edge.program.build import build_program
from flashhead_edge.program.file import sizes_of
from flashhead_edge.program.head import Device, decoder_graph
from flashhead_edge.program.nodes import Node

CHUNK = 256  # tokens of a prompt that the backend reads together
POSITION = 4  # bytes of a prompt's token


@dataclass(frozen=True, eq=False)
class Planned:
    """A program that is not written: what `cuda_program.memory_plan` asks of one."""

    nodes: Sequence[Node]
    constants: Mapping[str, str]
    widths: Mapping[str, int]
    places: Mapping[str, tuple[int, int]]
    weights: Path
    precision: str
    context: int
    batch: int


def planned_program(folder: Path, *, precision: str, context: int, group: int, batch: int, device: Device) -> Planned:
    """The program of a checkpoint as `program.kept.cached_program` would write it, its tensors' sizes alone.

    Raises:
        What `read_index`, `open_weights` and `build_program` raise.
    """
    with open_weights(folder) as weights:
        built = build_program(
            weights, weights.config, read_index(folder), precision=precision, context=context, group=group, device=device, batch=batch
        )  # fmt: skip
        graph = decoder_graph(built.decoder, built.head)
        places = {name: (0, size) for name, size in sizes_of(built.decoder, built.head).items()}
    return Planned(graph.nodes, {name: name for name in graph.constants}, built.decoder.widths, places, folder, precision, context, batch)


def program_need(program: Program, name: str, facts: DeviceFacts, chunk: int = CHUNK) -> Need:
    """What a program takes of a GPU beyond a context, for its own context and batch."""
    head, limits = head_of(program), native.limits_of(facts)
    dtype = native.BF16 if program.precision == "bfloat16" else native.FP16
    return need_of_plan(program, memory_plan(program, head, limits, min(chunk, program.context), dtype), name)


def need_of_plan(program: Program, plan: MemoryPlan, name: str) -> Need:
    """The same of a layout that is made already. Its parts add up to what the range takes of the device, for the program's context and batch."""
    head: Mapping[str, Any] = program.nodes[-1].attributes
    size = {key: program.places[head[key].name][1] if head[key].name else 0 for key in ("rows", "image", "bias")}
    apart = program.places["embedding"][1] if head["rows"].name != "embedding" and "embedding" in program.places else 0
    tables = {a.name for n in program.nodes for a in [n.attributes.get("rotations")] if a is not None}  # type: ignore[union-attr]
    turned = sum(program.places[table][1] for table in tables)
    caches = plan.cache_bytes // (program.batch * program.context)
    known = sum(size.values()) + turned + plan.cache_bytes + plan.exchange_bytes + POSITION * program.context
    layers = sum(length for _, length in program.places.values()) - sum(size.values()) - turned
    return Need(
        name=name,
        kind="cuda",
        weights=layers,
        index=size["image"],
        exact_rows=size["rows"] + size["bias"],
        copies=0,
        runtime=0,
        scratch=device_bytes(plan.size) - known - layers,
        layers=(Layer(caches),),
        limit=program.context,
        positions=(turned + plan.exchange_bytes) // program.context + POSITION,
        tables=apart,
        notes=("on a GPU, beyond the context that every program on it has; weights in 4 bits, coded anew where the checkpoint has them in 16",),
    )


def checkpoint_need(
    folder: Path, facts: DeviceFacts, *, precision: str, context: int, group: int, batch: int, positions: int | None
) -> Need:  # fmt: skip
    """What a checkpoint takes on the CUDA backend, for a context and a batch.

    Args:
        positions: that the model was made for, where it says so: the most that a plan may ask for.
    Raises:
        As `planned_program`.
    """
    device = Device(facts.multiprocessors, facts.shared_bytes, facts.capability)
    program = planned_program(folder, precision=precision, context=context, group=group, batch=batch, device=device)
    return replace(program_need(program, folder.name, facts), limit=positions)
