"""The ONNX Runtime backend: an exported folder whose parts belong together, and its head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashhead_edge.errors import SettingsError
from flashhead_edge.head import Step
from flashhead_edge.jetson.folder import PARTS, ExportSettings, check_belongs, part_file, read_settings
from flashhead_edge.jetson.onnxruntime_body import FIRST_CAPACITY, OnnxBody
from flashhead_edge.jetson.onnxruntime_sessions import NATIVE_BODY, NATIVE_HEAD, failed, open_model, parts_of, runtime_errors, usable_threads
from flashhead_edge.jetson.onnxruntime_step import OneState
from flashhead_edge.jetson.onnxruntime_texts import SharedCache, TextBody
from flashhead_edge.jetson.plan import check_fits, free_here
from flashhead_edge.jetson.plan_sources import onnx_need

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

STEP = ("token", "candidate_ids", "candidate_logits", "counts", "capped")
TOKENS_AT_ONCE = 8192  # of the model's own rows that a dense pass widens to float32 at a time


@dataclass(eq=False)
class OnnxRuntime:
    """An exported folder in ONNX Runtime on the CPU. Its parts are opened when they are first used."""

    folder: Path
    threads: int  # 0: one for each physical core
    fingerprint: str | None  # of the head that config.json names
    step_part: str = "head"  # the part that makes steps: "head", in standard operators, or NATIVE_HEAD
    body_part: str = "body"  # or NATIVE_BODY
    sessions: dict[str, InferenceSession] = field(default_factory=dict)
    found: dict[str, ExportSettings] = field(default_factory=dict)
    single: dict[str, OneState] = field(default_factory=dict)  # of parts that make steps
    shared: SharedCache | None = None  # of all texts, where the body takes several at once

    @property
    def most_texts(self) -> None:
        """A cache grows with its texts."""

    @property
    def settings(self) -> ExportSettings:
        self.session(self.body_part)
        return self.found[self.body_part]

    @property
    def head(self) -> OnnxHead:
        return OnnxHead(self)

    @property
    def about(self) -> dict[str, Any]:
        import onnxruntime

        head, body = ("native" if part in (NATIVE_HEAD, NATIVE_BODY) else "standard operators" for part in (self.step_part, self.body_part))
        return {
            "backend": "onnxruntime",
            "backend_version": onnxruntime.__version__,
            "device": "cpu",
            "threads": self.threads or None,
            "head_operators": head,
            "body_operators": body,
        }

    def body(self) -> OnnxBody | TextBody:
        session = self.session(self.body_part)
        if all(value.name != "texts" for value in session.get_inputs()):
            return OnnxBody(session, self.settings)
        if self.shared is None:
            self.shared = SharedCache(session, self.settings)
        return TextBody(self.shared)

    def session(self, part: str) -> InferenceSession:
        """A part, opened and checked.

        Raises:
            CheckpointError: it is missing, damaged, from elsewhere, or exported from another head.
            EngineError: ONNX Runtime does not know the model's operators.
        """
        if part not in self.sessions:
            path = part_file(self.folder, part)
            session = open_model(path, self.threads)
            settings = read_settings(path, part, session.get_modelmeta().custom_metadata_map)
            if self.fingerprint is not None:
                check_belongs(path, settings, self.fingerprint, "config.json")
            for other in self.found.values():
                check_belongs(path, settings, other.fingerprint, f"{other.part}.onnx")
            self.sessions[part], self.found[part] = session, settings
        return self.sessions[part]


def open_folder(folder: Path, threads: int | None, fingerprint: str | None, *, native: bool = True) -> OnnxRuntime:
    """Open an exported folder: body and head at once, what only sampling and exact mode need when they need it.

    Args:
        threads: None is one for each physical core that this process may use.
        fingerprint: of the head that the folder's config.json names, None where it names none.
        native: take our own operators where the folder and this installation have them.
    Raises:
        SettingsError: `threads` is out of range.
        CheckpointError, EngineError: see `OnnxRuntime.session`.
        DeviceError: too little memory, before anything is loaded.
    """
    if threads is not None and threads < 1:
        raise SettingsError(f"generate: threads is {threads}, expected 1 or more; call again with another value")
    for part in PARTS:
        part_file(folder, part)
    body, head = parts = parts_of(folder, native)
    check_fits(onnx_need(folder, parts), free_here(), FIRST_CAPACITY)
    backend = OnnxRuntime(folder, threads or usable_threads(), fingerprint, step_part=head, body_part=body)
    for part in (backend.body_part, backend.step_part):
        backend.session(part)
    return backend


@dataclass(frozen=True, eq=False)
class OnnxHead:
    """The exported head: `head.Head` over numpy, without an index."""

    backend: OnnxRuntime

    def step(self, hidden: np.ndarray) -> Step:
        part = self.backend.step_part
        session = self.backend.session(part)
        if len(hidden) != 1:
            return Step(*run(session, STEP, {"hidden_states": single(hidden)}))
        if part not in self.backend.single:
            self.backend.single[part] = OneState(session)
        return self.backend.single[part].step(hidden)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return self.step_with_logits(hidden)[1]

    def step_with_logits(self, hidden: np.ndarray) -> tuple[Step, np.ndarray]:
        *step, logits = run(self.backend.session("head_logits"), (*STEP, "logits"), {"hidden_states": single(hidden)})
        return Step(*step), logits

    def exact_logits(self, hidden: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        session, h = self.backend.session("rescore"), single(hidden)
        parts = np.array_split(np.ascontiguousarray(tokens, np.int64), max(1, -(-len(tokens) // TOKENS_AT_ONCE)))
        found = [run(session, ("logits",), {"hidden_states": h, "tokens": part})[0] for part in parts if len(part)]
        return np.concatenate(found, 1) if found else np.empty((len(h), 0), np.float32)


def run(session: InferenceSession, outputs: Sequence[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs of a part of the head.

    Raises:
        EngineError: ONNX Runtime failed. DeviceError: there was too little memory.
    """
    try:
        found: list[np.ndarray] = session.run(outputs, inputs)
    except runtime_errors() as error:
        raise failed("head", error) from error
    return found


def single(hidden: np.ndarray) -> np.ndarray:
    """Hidden states [N, d] as the models take them."""
    return np.ascontiguousarray(hidden, np.float32)
