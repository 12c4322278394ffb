"""The TensorRT backend: an exported folder whose engines compute whole steps, from a token to the next one.

The cache is allocated once, for the whole context and the largest batch; every layer's past and present are one address, so that a step
writes its keys and values in place. From TensorRT 10.3 on that is the interface's aliased output; 8.6 has none, and binding an address
twice lies outside of what that version promises: it works there because the plugin alone touches the cache, and tests hold it to that.

A decode step has the same shapes wherever its text is (positions are device data), so that it is captured once for each batch size as a
CUDA graph: the settings' copy to the device, the engine, the results' copy to the host. Prompts go through a second context in chunks.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.decoding import Sampling
from flashhead_edge.errors import CheckpointError, EngineError, SettingsError
from flashhead_edge.generation.positions import CutByLength
from flashhead_edge.head import Step
from flashhead_edge.jetson import plugins
from flashhead_edge.jetson.driver import Device, Graph, Memory, Pinned, Stream, device_facts
from flashhead_edge.jetson.folder import ExportSettings
from flashhead_edge.jetson.plan import check_fits, free_gpu
from flashhead_edge.jetson.plan_sources import tensorrt_need
from flashhead_edge.jetson.steps import joined, logits_by_rows, step_of
from flashhead_edge.jetson.tensorrt_engine import Context, Engine, Runtime, load_tensorrt, to_float32, to_half
from flashhead_edge.jetson.tensorrt_folder import WEIGHTS, Manifest, check_files, check_machine, read_manifest

DECODE, PREFILL = 0, 1  # profiles of the decoder's engine
ALIGNMENT = 256  # bytes: where a tensor begins
SETTINGS: dict[str, tuple[type, int]] = {  # what a step reads of each row beside its token: type and columns
    "lengths": (np.int32, 1), "temperature": (np.float32, 1), "top_p": (np.float32, 1), "min_p": (np.float32, 1), "top_k": (np.int32, 1),
    "seed": (np.uint64, 1), "step": (np.int32, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where an output lies in the block of outputs."""

    offset: int
    shape: tuple[int, ...]
    dtype: Any

    @property
    def bytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


def placed(wanted: dict[str, tuple[tuple[int, ...], Any]]) -> tuple[dict[str, Place], int]:
    """Outputs one behind the other, and how long they are."""
    found, at = {}, 0
    for name, (shape, dtype) in wanted.items():
        found[name] = Place(at, shape, dtype)
        at += -(-found[name].bytes // ALIGNMENT) * ALIGNMENT
    return found, at


@dataclass(eq=False)
class Captured:
    """A decode step of some rows as a graph."""

    graph: Graph
    places: dict[str, Place]
    bytes: int  # of the results that it copies to the host


@dataclass(eq=False)
class TensorRT:
    """An exported folder in TensorRT. Use it from one thread at a time; `close` frees everything that it has on the device."""

    manifest: Manifest
    library: Path | None
    device: Device
    stream: Stream
    runtime: Runtime
    facts: Any
    engines: dict[str, Engine] = field(default_factory=dict)
    contexts: dict[tuple[str, int], Context] = field(default_factory=dict)
    cache: dict[str, Memory] = field(default_factory=dict)
    captured: dict[tuple[str, int, bool], Captured] = field(default_factory=dict)
    captures: int = 0  # graphs that have been made
    memory: dict[str, Memory] = field(default_factory=dict)
    pinned: dict[str, Pinned] = field(default_factory=dict)
    rows: tuple[np.ndarray, np.ndarray | None] | None = None
    owner: object | None = None  # whose text the cache holds

    # ---- what a backend is asked

    @property
    def most_texts(self) -> int:
        """There is one cache."""
        return 1

    @property
    def settings(self) -> ExportSettings:
        return self.manifest.settings

    @property
    def head(self) -> TensorRTHead:
        return TensorRTHead(self)

    @property
    def about(self) -> dict[str, Any]:
        return {
            "backend": "tensorrt",
            "backend_version": str(self.runtime.trt.__version__),
            "device": self.facts.name,
            "threads": None,
            "layers": self.manifest.layers,
            "precision": self.manifest.precision,
        }

    def body(self) -> TensorRTBody:
        body = self.owner = TensorRTBody(self)
        return body

    def close(self) -> None:
        """Free graphs, contexts, engines, memory and the context; harmless when called twice."""
        if not self.device.open:
            return
        self.device.use()
        self.stream.wait()
        for captured in self.captured.values():
            captured.graph.close()
        for held in (self.captured, self.contexts, self.engines):
            held.clear()
        for freed in (*self.cache.values(), *self.memory.values(), *self.pinned.values()):
            freed.close()
        self.stream.close()
        self.device.close()

    def __enter__(self) -> TensorRT:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- engines

    def why(self) -> str:
        """What a plugin complained of last."""
        return plugins.last_error(self.library) if self.library is not None else ""

    def engine(self, part: str) -> Engine:
        if part not in self.engines:
            self.engines[part] = self.runtime.engine(self.manifest.engine(part), self.why)
        return self.engines[part]

    def context(self, part: str, profile: int = 0) -> Context:
        key = part, profile
        if key not in self.contexts:
            self.contexts[key] = self.engine(part).context(profile, self.stream, self.why)
        return self.contexts[key]

    def allocate(self) -> None:
        """Cache, and blocks for what steps read and write."""
        m, decoder = self.manifest, self.engine("decoder")
        for tensor in decoder.tensors.values():
            if tensor.is_input and tensor.name.startswith("past_key_values."):
                self.cache[tensor.name] = Memory(tensor.bytes((m.max_batch, *tensor.shape[1:])))
        ids, (_, results) = 4 * max(m.chunk, m.max_batch), self.places(m.max_batch)
        settings = sum(self.setting_bytes(name) for name in SETTINGS)
        states = 2 * m.chunk * m.settings.hidden_size
        for name, size in (("ids", ids), ("settings", settings), ("results", results), ("states", states)):
            self.memory[name] = Memory(size)
        for name, size in (("ids", ids), ("settings", settings), ("results", results)):
            self.pinned[name] = Pinned(size)
        self.setting("top_p", m.max_batch)[:] = 1.0

    def setting_bytes(self, name: str) -> int:
        dtype, columns = SETTINGS[name]
        return -(-self.manifest.max_batch * columns * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT

    def setting_at(self, name: str) -> int:
        """Where a setting begins in its block."""
        return sum(self.setting_bytes(before) for before in list(SETTINGS)[: list(SETTINGS).index(name)])

    def setting(self, name: str, rows: int) -> np.ndarray:
        """The host's side of a setting: what is written here the next step reads."""
        dtype, columns = SETTINGS[name]
        start = self.setting_at(name)
        return self.pinned["settings"].array[start : start + rows * columns * np.dtype(dtype).itemsize].view(dtype)

    def places(self, rows: int) -> tuple[dict[str, Place], int]:
        """Where a step of some rows puts its results: what everybody reads comes first."""
        decoder, d = self.engine("decoder").tensors, self.settings.hidden_size
        candidates = decoder["candidate_ids"].shape[1]
        half = np.float16 if self.manifest.precision == "float16" else np.uint16
        return placed(
            {
                "token": ((rows,), np.int32), "counts": ((rows, 2 + self.manifest.stages), np.int32), "capped": ((rows,), np.int32),
                "logprob": ((rows,), np.float32), "hidden_states": ((rows, d), half),
                "candidate_ids": ((rows, candidates), np.int32), "candidate_logits": ((rows, candidates), np.float32),
            }
        )  # fmt: skip

    def addresses(self, rows: int, first: int) -> dict[str, int]:
        """Of a step's tensors: some rows, the cache's from row `first` on."""
        places, _ = self.places(rows)
        found = {name: self.memory["settings"].pointer + self.setting_at(name) for name in SETTINGS}
        found |= {name: self.memory["results"].pointer + place.offset for name, place in places.items()}
        found["input_ids"] = found["token"]  # a step's token is the next step's input
        for name, memory in self.cache.items():
            at = memory.pointer + first * (memory.size // self.manifest.max_batch)
            found |= {name: at, name.replace("past_key_values.", "present."): at}
        return found

    def shapes(self, rows: int, tokens: int) -> dict[str, tuple[int, ...]]:
        """Of a step's inputs."""
        found: dict[str, tuple[int, ...]] = {name: (rows, 2) if name == "seed" else (rows,) for name in SETTINGS}
        found["input_ids"] = rows, tokens
        decoder = self.engine("decoder").tensors
        return found | {name: (rows, *decoder[name].shape[1:]) for name in self.cache}

    # ---- steps

    def copy_ids(self, ids: Sequence[int] | np.ndarray, target: int) -> None:
        """Tokens to an address of the device. The host's side is free again when the stream has been waited for."""
        self.pinned["ids"].array[: 4 * len(ids)].view(np.int32)[:] = ids
        self.stream.to_device(target, self.pinned["ids"].pointer, 4 * len(ids))

    def begin(self, ids: Sequence[int] | np.ndarray) -> None:
        """Tokens for the next decode step to read, one a row: it puts those that it chooses in their place."""
        self.copy_ids(ids, self.memory["results"].pointer + self.places(len(ids))[0]["token"].offset)

    def decode_graph(self, rows: int, everything: bool, part: str = "decoder") -> Captured:
        """The step of one token in each of the first rows of the cache. When it is made the cache's first position is written: no text may be in it.

        Args:
            everything: copy states and candidates to the host too.
            part: the engine; a measurement has others beside it.
        """
        key = part, rows, everything
        if key not in self.captured:
            context, names = self.context(part, DECODE), self.engine(part).tensors
            places, size = self.places(rows)
            addresses, shapes = ({n: v for n, v in each.items() if n in names} for each in (self.addresses(rows, 0), self.shapes(rows, 1)))
            context.bind(addresses, shapes)
            context.run(self.stream, self.why)  # once outside of a graph: what is done at a first run is no part of it
            self.stream.wait()
            copied = size if everything else places["hidden_states"].offset
            settings, results = self.memory["settings"], self.memory["results"]
            with self.stream.captured() as graph:
                self.stream.to_device(settings.pointer, self.pinned["settings"].pointer, settings.size)
                context.run(self.stream, self.why)
                self.stream.to_host(self.pinned["results"].pointer, results.pointer, copied)
            self.captures += 1
            self.captured[key] = Captured(graph, places, copied)
        return self.captured[key]

    def results(self, places: dict[str, Place], name: str) -> np.ndarray:
        """A result on the host, to be copied by who keeps it."""
        place = places[name]
        return self.pinned["results"].array[place.offset : place.offset + place.bytes].view(place.dtype).reshape(place.shape)

    def step(self, token: int, length: int) -> tuple[np.ndarray, Step]:
        """One token of row 0 at the end of `length` positions, it included: hidden state [1, d] float32, and the head's step."""
        captured = self.decode_graph(1, True)
        self.setting("lengths", 1)[:] = length
        self.begin([token])
        captured.graph.launch(self.stream)
        self.stream.wait()
        return self.taken(captured.places)

    def taken(self, places: dict[str, Place]) -> tuple[np.ndarray, Step]:
        """State and step of a single row from the host's block of results."""
        hidden = to_float32(self.results(places, "hidden_states"), self.manifest.precision)
        return hidden, step_of(*(self.results(places, name) for name in ("token", "candidate_ids", "candidate_logits", "counts", "capped")))

    def prefill(self, ids: Sequence[int], length: int, row: int = 0) -> dict[str, Place]:
        """Tokens of a row after `length` positions, a chunk at most: their results, of the last one, lie in the host's block afterwards."""
        context, n, m = self.context("decoder", PREFILL), len(ids), self.manifest
        places, size = self.places(1)
        self.setting("lengths", 1)[:] = length + n
        addresses = self.addresses(1, row) | {"input_ids": self.memory["ids"].pointer, "hidden_states": self.memory["states"].pointer}
        context.bind(addresses, self.shapes(1, n))
        settings, results = self.memory["settings"], self.memory["results"]
        self.copy_ids(ids, self.memory["ids"].pointer)
        self.stream.to_device(settings.pointer, self.pinned["settings"].pointer, settings.size)
        context.run(self.stream, self.why)
        width = 2 * m.settings.hidden_size
        self.stream.on_device(results.pointer + places["hidden_states"].offset, self.memory["states"].pointer + (n - 1) * width, width)
        self.stream.to_host(self.pinned["results"].pointer, results.pointer, size)
        self.stream.wait()
        return places

    def read(self, ids: Sequence[int], length: int, row: int = 0) -> dict[str, Place]:
        """Tokens of a row after `length` positions, in chunks."""
        if not len(ids):
            raise EngineError("body: no token was given, expected at least one; give a text")
        if length + len(ids) > self.manifest.context:
            raise EngineError(
                f"body: the text has {length + len(ids):,} tokens, expected at most the engine's {self.manifest.context:,} positions; "
                "shorten it, or export with a larger --context"
            )
        for start in range(0, len(ids), self.manifest.chunk):
            part = ids[start : start + self.manifest.chunk]
            places = self.prefill(part, length + start, row)
        return places

    # ---- many texts at once

    def decode(self, prompts: Sequence[Sequence[int]], steps: int, sampling: Sampling | None = None) -> Iterator[np.ndarray]:
        """Continue several texts by tokens that are chosen on the device: tokens [B] int32 of each step, the first step's included.

        Args:
            prompts: 1 to max_batch of them, of any lengths.
            steps: tokens of each text.
            sampling: None is greedy; row b draws with seed + b, as if it were alone. The device has temperature, top-p and min-p in float32.
        Raises:
            SettingsError: too many texts, or settings that the device does not have. EngineError: a text does not fit.
        """
        s, rows, m = sampling or Sampling(), len(prompts), self.manifest
        if not 1 <= rows <= m.max_batch:
            raise SettingsError(f"decode: {rows} texts, expected 1 to {m.max_batch}, which the engine was built for; export with a larger --batch")
        if s.changes_logits or s.allowed is not None:
            raise SettingsError("decode: penalties, biases or a choice of allowed tokens, expected none on the device; decode through the engine's loop")
        longest = max(map(len, prompts))
        if longest + steps - 1 > m.context:
            raise EngineError(f"decode: {longest:,} tokens and {steps:,} steps, expected at most the engine's {m.context:,} positions; ask for fewer")
        self.device.use()
        mine = self.owner = object()
        captured = self.decode_graph(rows, False)  # whose first run writes into the cache
        lengths = np.array([len(p) for p in prompts], np.int32)
        first: np.ndarray = np.empty(rows, np.int32)
        try:
            for row, prompt in enumerate(prompts):
                self._sample(s, [s.seed + row], 0)
                first[row] = self.results(self.read(prompt, 0, row), "token")[0]
            yield first
            if steps == 1:
                return
            self._sample(s, [s.seed + row for row in range(rows)], 0)
            self.begin(first)
            for step in range(1, steps):
                if self.owner is not mine:
                    raise EngineError("decode: another text has taken over the cache, expected one at a time; begin these again")
                self.device.use()
                self.setting("lengths", rows)[:] = lengths + step
                self.setting("step", rows)[:] = step
                captured.graph.launch(self.stream)
                self.stream.wait()
                yield self.results(captured.places, "token").copy()
        finally:
            self._sample(Sampling(), [0] * m.max_batch, 0)

    def _sample(self, s: Sampling, seeds: Sequence[int], step: int) -> None:
        rows = len(seeds)
        for name, value in (("temperature", s.temperature), ("top_p", s.top_p), ("min_p", s.min_p), ("top_k", s.top_k), ("step", step)):
            self.setting(name, rows)[:] = value
        self.setting("seed", rows)[:] = [seed % 2**64 for seed in seeds]


class TensorRTBody(CutByLength):
    """The body in the middle of one text. There is one cache: a later text takes it over."""

    def __init__(self, backend: TensorRT) -> None:
        self.backend, self.length = backend, 0
        self.last: tuple[np.ndarray, Step] | None = None

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """Run tokens after what the cache holds: hidden state of the last one, [1, d] float32. The head's step came with it and is kept.

        Raises:
            EngineError: the text is longer than the engine's context, another text has the cache, or TensorRT failed.
            CheckpointError: the model gives states that are no numbers.
        """
        b = self.backend
        if b.owner is not self:
            raise EngineError("body: another text has taken over the cache, expected one text at a time; begin this one again")
        b.device.use()
        if len(ids) == 1 and self.length < b.manifest.context:
            found = b.step(ids[0], self.length + 1)
        else:
            found = b.taken(b.read(ids, self.length))
        if not np.isfinite(found[0].sum()):
            raise CheckpointError(
                "hidden states: NaN or infinity found, expected finite values; the weights are damaged, or the model needs export's --precision bfloat16"
            )
        self.length += len(ids)
        self.last = found
        return found[0]


@dataclass(frozen=True, eq=False)
class TensorRTHead:
    """The exported head: `head.Head` over numpy, without an index."""

    backend: TensorRT

    def step(self, hidden: np.ndarray) -> Step:
        owner = self.backend.owner
        if isinstance(owner, TensorRTBody) and owner.last is not None and owner.last[0] is hidden:
            return owner.last[1]
        return self._run("head", hidden)[0]

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return self.step_with_logits(hidden)[1]

    def step_with_logits(self, hidden: np.ndarray) -> tuple[Step, np.ndarray]:
        step, logits = self._run("head_logits", hidden)
        assert logits is not None
        return step, logits

    def exact_logits(self, hidden: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """On the host, by the rows in the folder's file: for few tokens, or where time does not matter."""
        rows, bias = self.backend.rows or self._open_rows()
        return logits_by_rows(hidden, tokens, rows, bias, self.backend.manifest.precision)

    def _open_rows(self) -> tuple[np.ndarray, np.ndarray | None]:
        path = self.backend.manifest.folder / WEIGHTS
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        half = np.float16 if self.backend.manifest.precision == "float16" else np.uint16

        def opened(name: str) -> np.ndarray:
            start, _ = header[name]["data_offsets"]
            return np.memmap(path, half, "r", 8 + length + start, tuple(header[name]["shape"]))

        rows = opened("head.rows" if "head.rows" in header else "embedding")
        self.backend.rows = rows, opened("head.bias") if "head.bias" in header else None
        return self.backend.rows

    def _run(self, part: str, hidden: np.ndarray) -> tuple[Step, np.ndarray | None]:
        found = [self._once(part, hidden[at : at + self.backend.manifest.max_batch]) for at in range(0, len(hidden), self.backend.manifest.max_batch)]
        steps, logits = zip(*found)
        step = steps[0] if len(steps) == 1 else joined(steps)
        return step, None if part == "head" else np.concatenate(logits)

    def _once(self, part: str, hidden: np.ndarray) -> tuple[Step, np.ndarray | None]:
        """A run of one of the head's own engines."""
        b, n = self.backend, len(hidden)
        b.device.use()
        context, tensors = b.context(part), b.engine(part).tensors
        kinds = {"INT32": np.int32, "FLOAT": np.float32}
        outputs = {t.name: ((n, *t.shape[1:]), kinds[t.kind]) for t in tensors.values() if not t.is_input}
        places, size = placed(outputs)
        states = to_half(hidden, b.manifest.precision)
        start = -(-states.nbytes // ALIGNMENT) * ALIGNMENT
        name = f"{part} alone"
        if name not in b.memory or b.memory[name].size < start + size:
            b.memory[name], b.pinned[name] = Memory(start + size), Pinned(start + size)
        memory, pinned = b.memory[name], b.pinned[name]
        pinned.array[: states.nbytes] = states.reshape(-1).view(np.uint8)
        addresses = {name: memory.pointer + start + place.offset for name, place in places.items()} | {"hidden_states": memory.pointer}
        context.bind(addresses, {"hidden_states": states.shape})
        b.stream.to_device(memory.pointer, pinned.pointer, states.nbytes)
        context.run(b.stream, b.why)
        b.stream.to_host(pinned.pointer + start, memory.pointer + start, size)
        b.stream.wait()

        def read(name: str) -> np.ndarray:
            place = places[name]
            return pinned.array[start + place.offset : start + place.offset + place.bytes].view(place.dtype).reshape(place.shape)

        step = step_of(*(read(name) for name in ("token", "candidate_ids", "candidate_logits", "counts", "capped")))
        return step, read("logits").copy() if "logits" in places else None


def open_folder(folder: Path, plugin: Path | None = None, stream: int | None = None, *, check: bool = False) -> TensorRT:
    """Open an exported folder on this machine's GPU.

    Args:
        plugin: the plugin library; None: the one in the cache.
        stream: the handle of a stream to work in, such as pycuda's; None: one of its own.
        check: read engines and weights whole and compare their hashes first.
    Raises:
        CheckpointError: no such folder, or a damaged one.
        DeviceError: no GPU, or too little memory.
        EngineError: TensorRT is not installed, or engines, GPU, TensorRT and plugin library do not belong together.
    """
    manifest = read_manifest(folder)
    facts = device_facts()  # before TensorRT: 8.6 ends the process where there is no GPU
    if manifest.layers != "plugin":
        raise EngineError(f"{folder}: an export with native layers, expected plugin ones: native engines are built and not run by this version; {PLUGINS}")
    trt = load_tensorrt()
    library = plugins.find_library(int(str(trt.__version__).split(".")[0]), plugin, facts.capability)
    check_machine(manifest, facts, str(trt.__version__), hashlib.sha256(library.read_bytes()).hexdigest())
    check_files(manifest, contents=check)
    check_fits(tensorrt_need(folder), free_gpu(facts.free_bytes), manifest.context, manifest.max_batch)
    plugins.load_library(trt, library)
    plugins.add_folder(library, folder.resolve())
    device = Device()
    backend = TensorRT(manifest, library, device, Stream(stream), Runtime(trt), facts)
    try:
        backend.allocate()
        backend.context("decoder", DECODE)
        backend.context("decoder", PREFILL)
        backend.decode_graph(1, True)  # now, since its first run writes into the cache
    except BaseException:
        backend.close()
        raise
    atexit.register(_close, weakref.ref(backend))
    return backend


def _close(reference: weakref.ref[TensorRT]) -> None:
    """Close a backend that is left open when the interpreter ends: later TensorRT's objects and the driver would go in any order."""
    backend = reference()
    if backend is not None:
        backend.close()


PLUGINS = "export again with --layers plugin"
