"""Weights written one after another into safetensors files of bounded size: what is held is one file's tensors."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from flashhead_edge.checkpoint.atomic import write_file
from flashhead_edge.checkpoint.source import INDEX

LIMIT = 512 << 20  # bytes of a file: gathered in memory before they are written


class ShardWriter:
    """Takes the tensors of a model, writes its files; `finish` gives them their names."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit
        self.held: dict[str, Tensor] = {}
        self.bytes = 0  # of all tensors so far
        self._holding = 0
        self._files: list[list[str]] = []  # the names in each file

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; where it does not fit into the file that is being gathered, that one is written first."""
        size = tensor.numel() * tensor.element_size()
        if self.held and self._holding + size > self.limit:
            self._flush()
        self.held[name] = tensor.detach().cpu().contiguous()
        self._holding += size
        self.bytes += size

    def finish(self) -> None:
        """Write what is held, and the list of files where there are several."""
        self._flush()
        n = len(self._files)
        if n == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        where: dict[str, str] = {}
        for i, names in enumerate(self._files):
            file = f"model-{i + 1:05d}-of-{n:05d}.safetensors"
            self._part(i).rename(self.folder / file)
            where |= dict.fromkeys(names, file)
        document = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(where.items()))}
        write_file(self.folder / INDEX, [json.dumps(document, indent=2).encode() + b"\n"])

    def _part(self, i: int) -> Path:
        return self.folder / f"part-{i}.safetensors"

    def _flush(self) -> None:
        if self.held:
            write_file(self._part(len(self._files)), [save(self.held, {"format": "pt"})])
            self._files.append(list(self.held))
            self.held, self._holding = {}, 0
