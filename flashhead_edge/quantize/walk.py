"""A model run layer by layer: one decoder layer's weights in memory, hidden states carried from layer to layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flashhead_edge.capture import check_finite, recording
from flashhead_edge.checkpoint import Source
from flashhead_edge.checkpoint.loading import model_config
from flashhead_edge.checkpoint.source import weight_map
from flashhead_edge.errors import CheckpointError, UnsupportedModelError, first_line

Read = Callable[[str], Tensor]


class Weights:
    """The tensors of a model folder, read one at a time from the mapped files."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.files: dict[str, Path] = weight_map(source.folder)
        self._opened = {file: safe_open(str(file), framework="pt") for file in sorted(set(self.files.values()))}  # type: ignore[no-untyped-call]

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __call__(self, name: str) -> Tensor:
        """A tensor as it is stored.

        Raises:
            CheckpointError: it cannot be read, or holds NaN or infinity.
        """
        try:
            tensor: Tensor = self._opened[self.files[name]].get_tensor(name)  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.source.name}: {name} cannot be read ({first_line(error)}); fetch the model again") from error
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{self.source.name}: {name} has NaN or infinite values, expected finite numbers; fetch the model again")
        return tensor


@dataclass(eq=False)
class Stream:
    """Texts on their way through the layers: batches of equal length."""

    name: str
    ids: list[Tensor]  # [b, s] int64 each
    states: list[Tensor] = field(default_factory=list)  # [b, s, d] float32 each

    @property
    def positions(self) -> int:
        return sum(i.numel() for i in self.ids)


class Walk:
    """A model without its layers' weights, which runs them one by one.

    Args:
        source: a folder whose tensors have the names of transformers' modules.
    Raises:
        UnsupportedModelError: they have not.
    """

    def __init__(self, source: Source, weights: Weights, device: str) -> None:
        import transformers
        from accelerate import init_empty_weights

        from flashhead_edge.checkpoint import families

        self.weights, self.device = weights, torch.device(device)
        self.name = source.name
        config = model_config(source)
        cls = getattr(transformers, families.architecture(source.config, source.name))
        with init_empty_weights(include_buffers=False):
            self.model: Any = cls(config).eval()
        self.model.requires_grad_(False)
        for module in self.model.modules():
            for name, buffer in list(module._buffers.items()):
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)
        self.config = config.get_text_config()
        decoder = self.model.get_decoder()
        self.layers: nn.ModuleList = decoder.layers
        self.prefixes = {id(m): f"{name}." for name, m in self.model.named_modules()}
        self.calls: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        inside = {id(p) for p in self.layers.parameters()}
        self.small = [  # what stands around the layers and is needed: norms
            name for name, p in decoder.named_parameters() if id(p) not in inside and p is not self.model.get_input_embeddings().weight
        ]
        self.decoder, self.stem = decoder, self.prefixes[id(decoder)]
        lost = [name for i in range(len(self.layers)) for name in self.names(i).values() if name not in weights]
        lost += [f"{self.stem}{name}" for name in self.small if f"{self.stem}{name}" not in weights]
        if lost:
            raise UnsupportedModelError(
                f"{source.name}: {lost[0]} is not among its weights, expected the names that transformers' {cls.__name__} gives its layers; "
                "save the model again with transformers"
            )
        for name in self.small:
            self._set(decoder, name, weights(f"{self.stem}{name}").float())

    def _set(self, module: nn.Module, name: str, value: Tensor) -> None:
        owner, _, last = name.rpartition(".")
        module.get_submodule(owner)._parameters[last] = nn.Parameter(value.to(self.device), requires_grad=False)

    def names(self, i: int) -> dict[str, str]:
        """A layer's tensors: their names in the layer, and in the files."""
        prefix = self.prefixes[id(self.layers[i])]
        return {name: f"{prefix}{name}" for name, _ in self.layers[i].named_parameters()}

    def shapes(self, i: int) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in self.layers[i].named_parameters()}

    @contextlib.contextmanager
    def layer(self, i: int) -> Iterator[tuple[nn.Module, dict[str, torch.dtype]]]:
        """A decoder layer with its weights in float32, and the dtypes that they are stored in."""
        layer, dtypes = self.layers[i], {}
        for name, stored in self.names(i).items():
            tensor = self.weights(stored)
            dtypes[name] = tensor.dtype
            self._set(layer, name, tensor.float())
        try:
            yield layer, dtypes
        finally:
            for name, shape in self.shapes(i).items():
                owner, _, last = name.rpartition(".")
                layer.get_submodule(owner)._parameters[last] = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)

    @contextlib.contextmanager
    def _stubs(self, stub: Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
        """Put a function into every layer's place."""
        for i, layer in enumerate(self.layers):

            def forward(hidden: Tensor, *args: Any, i: int = i, **kwargs: Any) -> Tensor:
                return stub(i, hidden, args, kwargs)

            layer.forward = forward
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def embed(self, streams: Sequence[Stream]) -> None:
        """The states before the first layer, and what each layer is called with for texts of each shape."""
        embedding = self.model.get_input_embeddings()
        name = f"{self.prefixes[id(embedding)]}weight"
        meta = embedding.weight
        self._set(embedding, "weight", self.weights(name).float())
        first: list[Tensor] = []

        def stub(i: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            if i == 0:
                first.append(hidden)
            self.calls[shape].append((args, kwargs))
            return hidden

        try:
            with torch.inference_mode(), self._stubs(stub), recording(self.model, compute=False):
                for stream in streams:
                    for ids in stream.ids:
                        shape = tuple(ids.shape)
                        self.calls[shape] = []  # those of the last text of a shape: they depend on nothing else
                        self.model(input_ids=ids.to(self.device), use_cache=False)
                        stream.states.append(first.pop())
        finally:
            embedding._parameters["weight"] = nn.Parameter(torch.empty(meta.shape, device="meta"), requires_grad=False)

    def step(self, i: int, layer: nn.Module, states: Tensor) -> Tensor:
        """A layer's output for the states of a batch."""
        args, kwargs = self.calls[tuple(states.shape[:2])][i]
        with torch.inference_mode():
            out = layer(states, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def advance(self, i: int, layer: nn.Module, stream: Stream) -> None:
        """Carry a stream's states through a layer."""
        for n, states in enumerate(stream.states):
            stream.states[n] = self.step(i, layer, states)
            check_finite(stream.states[n])

    def head_states(self, stream: Stream) -> list[Tensor]:
        """What reaches the head, [b, s, d] each, after the last layer."""
        out: list[Tensor] = []
        with torch.inference_mode(), recording(self.model, compute=False) as seen:
            for states in stream.states:

                def stub(i: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor = states) -> Tensor:
                    return states

                with self._stubs(stub):
                    self.model(inputs_embeds=torch.zeros_like(states), use_cache=False)
                out.append(seen.pop())
        return out


def moments(walk: Walk, i: int, layer: nn.Module, sites: Sequence[tuple[str, ...]], stream: Stream) -> list[Tensor]:
    """For each site, named by its linear layers, the mean of x x^T over its inputs x, [K, K] float32."""
    sums: list[Tensor | None] = [None] * len(sites)
    rows = [0] * len(sites)
    hooks = []
    for at, linears in enumerate(sites):

        def gather(module: nn.Module, args: tuple[Any, ...], at: int = at) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            total = sums[at]
            product = x.T @ x
            sums[at] = product if total is None else total.add_(product)
            rows[at] += len(x)

        hooks.append(layer.get_submodule(linears[0]).register_forward_pre_hook(gather))
    try:
        for states in stream.states:
            walk.step(i, layer, states)
    finally:
        for hook in hooks:
            hook.remove()
    return [s / n for s, n in zip(sums, rows) if s is not None]
