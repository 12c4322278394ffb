"""FlashHead inside transformers: the model's own `generate` runs on the reduced head.

`FlashHead.load(folder).attach(model)` replaces what the model's output embedding computes, and nothing else: the
module, its weights and the state dict stay, so tied embeddings stay tied, saving writes what it wrote before, and
whatever the model does after the head (scale, soft-cap) still happens. `detach()` puts the module back as it was.
On an NVIDIA GPU, over rows in 16 bits, the CUDA kernels compute the head; where they cannot, the log says why.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flashhead_edge.errors import CheckpointError, DeviceError, SettingsError, UnsupportedModelError
from flashhead_edge.head import Step
from flashhead_edge.index import HeadIndex
from flashhead_edge.reference import TorchHead, torch_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flashhead_edge.kernels.head import CudaHead

PADDING_LOGIT = -3.0e4  # of rows beyond the vocabulary: finite in float16, and of probability 0 after any model's scale
BLOCK_NUMBERS = 1 << 22  # full-width numbers made at a time, for calls of many rows
LOG = logging.getLogger(__name__)


class FlashHead:
    """A head index, and the model that it stands in, once attached. A `head.Head` on its own as well."""

    def __init__(self, index: HeadIndex, *, folder: Path | None = None, device: str | torch.device = "cpu") -> None:
        self.index = index
        self.folder = folder
        self.device = torch.device(device)
        self._module: nn.Module | None = None
        self._before: Any = None
        self._alone: TorchHead | CudaHead | None = None

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> FlashHead:
        """Read the head of a FlashHead checkpoint. The rows are not read: `attach` takes the model's.

        Whether the index was made for the rows is checked when they are first there, in `attach` or at the first step.

        Args:
            device: where a head that is not attached computes; an attached one computes where its model's head is.
        Raises:
            CheckpointError: the folder holds no head index, or a broken one.
        """
        from flashhead_edge.checkpoint import read_index

        return cls(read_index(Path(folder)), folder=Path(folder), device=device)

    @property
    def attached(self) -> bool:
        return self._module is not None

    @property
    def computed(self) -> TorchHead | CudaHead:
        """The head on its device: over the model's rows where attached, else over the folder's, read once."""
        if self._module is not None:
            return self._module.forward.current()  # type: ignore[operator, union-attr, attr-defined]
        if self._alone is None:
            if self.folder is None:
                raise SettingsError("FlashHead: no model is attached and the index came from no folder, expected one of them; attach a model first")
            from flashhead_edge.checkpoint import open_source, read_head, read_index

            weights = read_head(open_source(self.folder))
            read_index(self.folder, weights)  # an index for other weights is refused here
            bias = None if weights.bias is None else weights.bias.to(self.device)
            self._alone = head_on_device(self.index, weights.weight.to(self.device), bias)
        return self._alone

    def step(self, hidden: Tensor) -> Step:
        """One step for hidden states [N, d], any float dtype, after the final norm: see `head.Step`."""
        with torch.no_grad():
            return self.computed.step(hidden.to(self.computed.weight.device))

    def logits(self, hidden: Tensor) -> Tensor:
        """Full-width raw logits [N, V] float32, every one finite."""
        with torch.no_grad():
            return self.computed.logits(hidden.to(self.computed.weight.device))

    def step_with_logits(self, hidden: Tensor) -> tuple[Step, Tensor]:
        """Both from one pass of the stages."""
        with torch.no_grad():
            return self.computed.step_with_logits(hidden.to(self.computed.weight.device))

    def attach(self, model: PreTrainedModel) -> FlashHead:
        """Make `model` use this head. Its output embedding then gives full-width logits in float32, without gradient.

        Raises:
            UnsupportedModelError: the model generates no text, or its head is not a plain matrix.
            CheckpointError: the head has another shape, or other weights, than the index was made for.
            SettingsError: this head is attached already, or the model has one.
        """
        if self._module is not None:
            raise SettingsError("FlashHead: this head is attached to a model already, expected a free one; call detach() first")
        module = output_head(model)
        if isinstance(module.__dict__.get("forward"), _Replaced):
            raise SettingsError(f"FlashHead: {type(model).__name__} has a FlashHead attached already, expected its own head; call detach() on that one first")
        check_fits(self.index, module.weight, bias_of(module), type(model).__name__)  # type: ignore[arg-type]
        self._before = module.__dict__.get("forward")
        self._alone = None
        module.forward = _Replaced(module, self.index)  # type: ignore[assignment]
        self._module = module
        return self

    def detach(self) -> None:
        """Put the model's own head back. Does nothing where none is attached."""
        if self._module is None:
            return
        if self._before is None:
            del self._module.__dict__["forward"]
        else:
            self._module.__dict__["forward"] = self._before
        self._module = self._before = None

    def __repr__(self) -> str:
        where = f"attached on {self.computed.weight.device}" if self.attached else "not attached"
        return f"FlashHead({self.index.vocab_size:,} x {self.index.hidden_size:,}, {self.index.n_clusters:,} clusters, {where})"


class _Replaced:
    """The forward of an output embedding under FlashHead: hidden states [..., d] to logits [..., rows of the matrix]."""

    def __init__(self, module: nn.Module, index: HeadIndex) -> None:
        self.module, self.index = module, index
        self.head, self.place = self.made()

    def made(self) -> tuple[TorchHead | CudaHead, tuple[torch.device, int]]:
        """The head over the module's weights, and where those lie."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return head_on_device(self.index, weight, bias_of(self.module)), (weight.device, weight.data_ptr())

    def current(self) -> TorchHead | CudaHead:
        """The head over the module's weights as they are now: the model may have moved to another device since."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        if self.head.weight is not weight or self.place != (weight.device, weight.data_ptr()):
            self.head, self.place = self.made()
        return self.head

    def __call__(self, hidden: Tensor) -> Tensor:
        head = self.current()
        rows, vocab = len(head.weight), head.index.vocab_size
        flat = hidden.reshape(-1, hidden.shape[-1])
        out = torch.full((len(flat), rows), PADDING_LOGIT, dtype=torch.float32, device=flat.device)
        block = max(1, BLOCK_NUMBERS // vocab)
        with torch.no_grad():
            for start in range(0, len(flat), block):
                out[start : start + block, :vocab] = head.logits(flat[start : start + block])
        return out.view(*hidden.shape[:-1], rows)


def head_on_device(index: HeadIndex, weight: Tensor, bias: Tensor | None = None) -> TorchHead | CudaHead:
    """The head over the model's own rows [V or more, d], by the CUDA kernels where they can compute it, else by the reference; the log says which and why."""
    if weight.device.type != "cuda":
        return torch_head(index, weight, bias)
    try:
        from flashhead_edge.kernels.head import cuda_head

        head = cuda_head(index, weight, bias)
        head.launch(weight.new_zeros(1, index.hidden_size))  # compiles, so that what is missing is said here
    except DeviceError as error:
        LOG.warning("%s: the torch reference computes the head on %s, slowly", error, weight.device)
        return torch_head(index, weight, bias)
    return head


def output_head(model: PreTrainedModel) -> nn.Module:
    """The module that turns the model's hidden states into logits: a plain matrix [rows, d].

    Raises:
        UnsupportedModelError: an encoder, a model without a head, or a head that is no matrix of floats in memory.
    """
    name = type(model).__name__
    generates = bool(getattr(model, "can_generate", lambda: False)())
    module = model.get_output_embeddings() if generates else None
    if module is None:
        raise UnsupportedModelError(f"{name}: no output head that generates text was found, expected a causal language model; choose another model")
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point() or weight.device.type == "meta":
        found = type(module).__name__ if weight is None else f"{type(module).__name__} with a {weight.dtype} weight on {weight.device}"
        raise UnsupportedModelError(f"{name}: the output head is a {found}, expected a matrix of floats in memory; load the model with its head unquantised")
    if type(weight) not in (Tensor, nn.Parameter):  # torchao's codes, for one, say that they are floats
        found = f"{type(module).__name__} whose weight is a {type(weight).__name__}"
        raise UnsupportedModelError(f"{name}: the output head is a {found}, expected a plain matrix of floats; load the model with its head unquantised")
    return module


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias [rows] of an output head, or None."""
    return module._parameters.get("bias")


def check_fits(index: HeadIndex, weight: Tensor, bias: Tensor | None, name: str) -> None:
    """Raise CheckpointError where `weight` is not the matrix that `index` was made for.

    A model loaded in float32 from 16-bit weights still fits: every value is then one of the narrower type, and the
    fingerprint of that type is tried as well. The index of a released checkpoint has none where it was read without the head: then the shape must do.
    """
    from flashhead_edge.checkpoint import fingerprint

    rows, d = weight.shape
    if d != index.hidden_size or rows < index.vocab_size:
        raise CheckpointError(
            f"{name}: the output head is [{rows}, {d}], the head index expects [{index.vocab_size} or more, {index.hidden_size}]; "
            "attach the model that the checkpoint was converted from, or convert this one"
        )
    parts = [weight.detach()] if bias is None else [weight.detach(), bias.detach()]
    narrower = [t for t in (torch.bfloat16, torch.float16) if parts[0].dtype == torch.float32 and all(same_in(p, t) for p in parts)]
    if index.fingerprint and not any(fingerprint(*(p.to(t) for p in parts)) == index.fingerprint for t in [parts[0].dtype] + narrower):
        raise CheckpointError(
            f"{name}: the output head, in {str(weight.dtype).removeprefix('torch.')}, has fingerprint {fingerprint(*parts)[:19]}, the head index was made for "
            f"{index.fingerprint[:19]}; use the model that the checkpoint was converted from, in the type that its head is stored in (vLLM's --dtype), "
            "or convert this one"
        )


def same_in(weight: Tensor, dtype: torch.dtype, block: int = 16384) -> bool:
    """Whether every value of `weight` is one of `dtype`: a block of rows at a time, no copy of the matrix."""
    return all(bool(torch.equal(part.to(dtype).to(part.dtype), part)) for part in weight.split(block))


def load_head(folder: str | Path, device: str | torch.device = "cpu") -> FlashHead:
    """Read the head of a FlashHead checkpoint: see `FlashHead.load`."""
    return FlashHead.load(folder, device)
