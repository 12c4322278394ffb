"""How faithful an exported head is on texts, without torch: the body's states, the exported head, and the model's own rows as the judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_edge.costs import dense_bytes
from flashhead_edge.errors import SettingsError
from flashhead_edge.evaluation.measures import Found, Measured, as_json, join, measure_all, summarise
from flashhead_edge.evaluation.run import read_text, summary, untimed_record, within
from flashhead_edge.jetson.engine import ExportedEngine, open_engine
from flashhead_edge.jetson.inspection import describe_model
from flashhead_edge.progress import Progress, silent

WINDOW = 512  # tokens read at a time, each window from an empty cache: as calibration and `evaluate` of a checkpoint read them


@dataclass(frozen=True, eq=False)
class ExportedContender:
    """The exported head, as `evaluation` measures heads."""

    engine: ExportedEngine
    settings: dict[str, Any]
    name: str = "exported"

    def find(self, hidden: np.ndarray, full: bool = True) -> Found:
        step = self.engine.step(hidden)  # of the operators that decode; full-width logits come from a model of their own
        wide = self.engine.step_with_logits(hidden)[1] if full else None
        return Found(step.token, step.ids, step.logits, step.counts, step.capped, wide)

    def cost(self, counts: np.ndarray | None, n: int) -> np.ndarray:
        assert counts is not None and len(counts) == n
        s = self.engine.backend.settings
        return s.fixed_bytes + counts[:, 1:] @ np.array(s.item_bytes, np.int64)


@dataclass(frozen=True, eq=False)
class ExactRows:
    """The dense head: every row of the model's own matrix, in float32."""

    engine: ExportedEngine

    def tokens(self, hidden: np.ndarray) -> np.ndarray:
        return self.logits(hidden).argmax(1)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.engine.exact_logits(hidden, np.arange(self.engine.vocab_size)))


def evaluate_export(
    folder: str | Path,
    texts: Sequence[str | Path],
    positions: int = 8000,
    progress: Progress = silent,
    *,
    threads: int | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure an exported folder's head on texts against its own dense head, over the states of its own body.

    Args:
        folder: from `flashhead export onnx`, with a body.
        texts: UTF-8 files; of each the first `positions` tokens count, read in windows of 512.
        command: the command line, for the record.
    Returns:
        The document of `evaluate_checkpoint`, without rivals and without freely running text.
    Raises:
        CheckpointError, EngineError: see `open_engine`.
        SettingsError: a setting is out of range, or a text is missing, empty or not UTF-8.
    """
    if positions < 1:
        raise SettingsError(f"evaluation: {positions} positions, expected at least 1; call again with another value")
    if not texts:
        raise SettingsError("evaluation: no text given, expected at least one; give a text file (--text FILE)")
    contents = [read_text(Path(text)) for text in texts]
    progress("opening the models", None)
    engine = open_engine(folder, threads=threads)
    about = describe_model(Path(folder) / "head.onnx")
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise SettingsError(f"evaluation: {folder} has no tokenizer, expected tokenizer.json in it; export the checkpoint again")
    contender, judge = ExportedContender(engine, about["settings"]), ExactRows(engine)
    dense = dense_bytes(engine.vocab_size, engine.hidden_size)
    parts: list[Measured] = []
    records = []
    for i, (text, (content, digest)) in enumerate(zip(texts, contents)):
        inner = within(progress, Path(text).name, i, len(texts))
        ids = list(tokenizer(content, add_special_tokens=False)["input_ids"])[: positions + 1]
        if not ids:
            raise SettingsError(f"evaluation text {text}: no tokens found, expected at least one; give a file with text in it")
        hidden = states_of(engine, ids[:positions], inner)
        targets = np.full(len(hidden), -1)
        targets[: len(ids) - 1] = ids[1 : positions + 1]
        (measured,) = measure_all([contender], hidden, targets, judge, vocab_size=engine.vocab_size, scale=engine.scale, softcap=engine.softcap, progress=inner)
        parts.append(measured)
        found = summarise(contender, measured, dense, lambda token: tokenizer.decode([token]))
        records.append({"text": Path(text).name, "sha256": digest, **as_json(found), "rivals": []})
    pooled = summarise(contender, join(parts), dense, lambda token: tokenizer.decode([token]))
    record = untimed_record(Path(folder).resolve().name, (engine.vocab_size, engine.hidden_size), WINDOW, "exported", engine.backend.about, command)
    calibration = about["calibration"]
    return {**record, **as_json(pooled), "rivals": [], "summary": summary(records, calibration), "texts": records, "calibration": calibration}


def states_of(engine: ExportedEngine, ids: Sequence[int], progress: Progress = silent) -> np.ndarray:
    """Hidden states of every position of a text, window by window, [n, d] float32."""
    out = []
    for at in range(0, len(ids), WINDOW):
        progress("reading the text", 0.4 * at / len(ids))
        out.append(engine.backend.body().states(ids[at : at + WINDOW]))
    return np.concatenate(out)
