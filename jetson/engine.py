"""An exported folder ready to decode: what the loop of `flashhead_edge.generation` asks of an engine, over any backend."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flashhead_edge.checkpoint.families import text_config
from flashhead_edge.checkpoint.jsonfiles import read_json
from flashhead_edge.errors import CheckpointError, SettingsError
from flashhead_edge.exact import Record
from flashhead_edge.generation.protocols import BodySession, Tokenizer
from flashhead_edge.head import Step
from flashhead_edge.jetson.backend import Backend
from flashhead_edge.jetson.folder import AGAIN, is_exported
from flashhead_edge.jetson.tensorrt_folder import is_tensorrt
from flashhead_edge.jetson.tokenizer import load_chat_tokenizer
from flashhead_edge.progress import Progress, silent

BACKENDS = ("auto", "onnxruntime", "tensorrt", "cuda")


@dataclass
class Spent:
    """Time that an engine has spent."""

    head: float = 0.0  # seconds in calls of the head: its time on a CPU; a GPU goes on after the call


@dataclass(frozen=True, eq=False)
class ExportedEngine:
    """A backend with its folder's tokenizer and stop tokens: see `generation.TextEngine`."""

    backend: Backend
    tokenizer: Tokenizer | None
    stop_ids: frozenset[int]
    record: Record = field(default_factory=Record)
    spent: Spent = field(default_factory=Spent)

    @property
    def scale(self) -> float:
        return self.backend.settings.scale

    @property
    def softcap(self) -> float | None:
        return self.backend.settings.softcap

    @property
    def vocab_size(self) -> int:
        return self.backend.settings.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.backend.settings.hidden_size

    @property
    def embedding_rows(self) -> int:
        return self.backend.settings.embedding_rows

    @property
    def context_length(self) -> int | None:
        return self.backend.settings.context_length

    def body(self) -> BodySession:
        return self.backend.body()

    def body_reads(self) -> float:
        return self.backend.settings.body_parameters / (self.vocab_size * self.hidden_size)

    def step_bytes(self, counts: np.ndarray) -> float:
        s = self.backend.settings
        return s.fixed_bytes + sum(n * size for n, size in zip(counts[0, 1:].tolist(), s.item_bytes))

    def step(self, hidden: np.ndarray) -> Step:
        began = time.perf_counter()
        found = self.backend.head.step(hidden)
        self.spent.head += time.perf_counter() - began
        return found

    def step_with_logits(self, hidden: np.ndarray) -> tuple[Step, np.ndarray]:
        began = time.perf_counter()
        found = self.backend.head.step_with_logits(hidden)
        self.spent.head += time.perf_counter() - began
        return found

    def exact_logits(self, hidden: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return self.backend.head.exact_logits(hidden, tokens)

    def dense_tokens(self, states: Sequence[np.ndarray]) -> list[int]:
        return self.backend.head.exact_logits(np.concatenate(states), np.arange(self.vocab_size)).argmax(1).tolist()


def open_engine(
    folder: str | Path, backend: str = "auto", threads: int | None = None, *, native: bool = True, plugin: Path | None = None, context: int | None = None,
    texts: int = 1, progress: Progress = silent,
) -> ExportedEngine:  # fmt: skip
    """Open a folder that `flashhead export` wrote, or with the cuda backend a checkpoint, for decoding without torch.

    Args:
        backend: what computes: onnxruntime, tensorrt, cuda, or what the folder was exported for.
        threads: None is one for each physical core that this process may use.
        native: take our own operators where the folder and this installation have them.
        plugin: TensorRT's plugin library; None: the one in the cache.
        context: positions of the cuda backend's cache; None: the model's, 4,096 at most. Another's cache grows, or was made with its folder.
        texts: that will be made at once; the cuda backend makes its cache for so many, others take what comes.
        progress: of what the cuda backend makes when it sees a checkpoint for the first time.
    Raises:
        CheckpointError: no exported folder, or a damaged one, or parts that do not belong together.
        EngineError: the backend is not installed, too old for the model, or not the one that engines were built with.
        DeviceError: TensorRT's engines or the cuda backend and no GPU, or too little memory.
        SettingsError: `backend`, `threads` or `context` is out of range, or a context of another backend than cuda.
    """
    if backend not in BACKENDS:
        raise SettingsError(f"generate: backend is {backend!r}, expected {', '.join(BACKENDS)}; call again with one of them")
    if context is not None and backend != "cuda":
        raise SettingsError(f"generate: the context is {context:,} and the backend {backend}, expected cuda, whose cache is made when it opens; leave it out")
    folder = Path(folder)
    if backend == "auto":
        backend = "tensorrt" if is_tensorrt(folder) else "onnxruntime"
    opened: Backend
    if backend == "cuda":
        from flashhead_edge.jetson import cuda_folder

        opened = cuda_folder.open_folder(folder, context=context, batch=texts, progress=progress)
        config = read_json(folder / "config.json")
    elif backend == "tensorrt":
        from flashhead_edge.jetson import tensorrt_backend

        if not is_tensorrt(folder):
            raise CheckpointError(f"{folder}: no engines (manifest.json), expected a folder that flashhead export tensorrt wrote; check the path")
        opened = tensorrt_backend.open_folder(folder, plugin)
        config = read_json(folder / "config.json")
    else:
        from flashhead_edge.jetson import onnxruntime_backend

        if is_tensorrt(folder) or not is_exported(folder):
            raise CheckpointError(
                f"{folder}: no exported model (body.onnx, head.onnx, ...), expected a folder that flashhead export onnx wrote; check the path"
            )
        config = read_json(folder / "config.json")
        ours = config.get("flash_head")
        opened = onnxruntime_backend.open_folder(folder, threads, ours.get("fingerprint") if isinstance(ours, dict) else None, native=native)
    tokenizer = load_chat_tokenizer(folder)
    return ExportedEngine(opened, tokenizer, stop_ids(folder, config, tokenizer.eos_token_id))


def stop_ids(folder: Path, config: dict, fallback: int | None) -> frozenset[int]:
    """Where transformers' generate stops: as generation_config.json says, else config.json, else the tokenizer's end of sequence."""
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else text_config(config).get("eos_token_id")
    found = fallback if found is None else found
    try:
        return frozenset(int(t) for t in ([] if found is None else found if isinstance(found, list) else [found]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: eos_token_id is {found!r}, expected a token id or a list of them; restore generation_config.json, or {AGAIN}"
        ) from error
