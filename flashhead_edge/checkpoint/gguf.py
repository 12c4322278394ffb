"""A GGUF file as a model: its config, its head in 16 bits, the whole model in 16 bits, and its tokenizer repaired."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashhead_edge.checkpoint import families
from flashhead_edge.checkpoint.gguf_families import DROPPED, FAMILIES, file_config
from flashhead_edge.checkpoint.gguf_file import TYPES, read_gguf
from flashhead_edge.checkpoint.quiet import without_bars, without_warnings
from flashhead_edge.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HEADS = ("output.weight", "token_embd.weight")
BLOCK = 8192  # rows turned into floats together
UNUSED = 5  # token type of the rows that only pad the vocabulary
# Pre-tokenizers that split digits one by one before the byte-level step (llama.cpp, llm_tokenizer_bpe).
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what the GGUF readers raise on a damaged file into one sentence."""
    try:
        yield
    except ImportError as error:
        raise CheckpointError(f"{path}: reading GGUF needs the packages gguf and accelerate; pip install 'flashhead-edge[torch]'") from error
    except (ValueError, KeyError, IndexError, OSError, RuntimeError, struct.error, OverflowError, AttributeError) as error:
        raise CheckpointError(f"{path}: no GGUF file that can be read ({type(error).__name__}: {error}); fetch the file again") from error


@lru_cache(maxsize=1)
def _parsed(path: Path, size: int, changed: int) -> GGUFReader:
    from gguf import GGUFReader

    return GGUFReader(path)


def _reader(path: Path) -> GGUFReader:
    """The file's tensors and fields; parsed once, since the token lists take seconds."""
    about = path.stat()
    return _parsed(path, about.st_size, about.st_mtime_ns)


def read_config(path: Path) -> dict[str, Any]:
    """The model's config in the terms of config.json."""
    from transformers import AutoConfig

    with _reading(path):
        config: dict[str, Any] = (_own_config(path) or AutoConfig.from_pretrained(path.parent, gguf_file=path.name)).to_dict()
    for key in ("_name_or_path", "_model_name_or_path", "quantization_config"):
        config.pop(key, None)
    config["architectures"] = [families.architecture(config, path.name)]
    return config


def _own_config(path: Path) -> PretrainedConfig | None:
    """The config as we read it, since transformers' reader drops how rotary positions are stretched; None for a family that is known to it alone.

    Raises:
        UnsupportedModelError: such a family with stretched positions.
    """
    from transformers import CONFIG_MAPPING

    file = read_gguf(path)
    kind = str(file.values.get("general.architecture"))
    if kind in FAMILIES:
        said = file_config(file, path.name)
        return CONFIG_MAPPING[said["model_type"]](**said)
    if any(name in file.tensors for name in DROPPED) or str(file.values.get(f"{kind}.rope.scaling.type") or "none") != "none":
        raise UnsupportedModelError(
            f"{path}: rotary positions of a GGUF file of the architecture {kind!r} are stretched, which its reader drops, expected one of "
            f"{', '.join(FAMILIES)}; convert the folder of safetensors that it was made from"
        )
    return None


def has_codes(path: Path) -> bool:
    """Whether backends without torch can run the file's own codes: a family and types that `packed` reads, and a matrix of few bits among them."""
    file = read_gguf(path)
    kinds, read = {tensor.kind for tensor in file.tensors.values()}, {name for name, _, _ in TYPES.values()}
    return str(file.values.get("general.architecture")) in FAMILIES and kinds <= read and any(kind.startswith("Q") for kind in kinds)


def read_head(path: Path) -> tuple[Tensor, Tensor | None, bool, int]:
    """The head in float16, or in bfloat16 where float16 overflows: weight [rows, d], bias, tied, tokens that are named."""
    with _reading(path):
        reader = _reader(path)
        tensors = {t.name: t for t in reader.tensors}
        name = next((n for n in HEADS if n in tensors), None)
        if name is None:
            raise CheckpointError(f"{path}: neither {HEADS[0]} nor {HEADS[1]}, expected a whole language model; name the file with all tensors")
        weight = _half(tensors[name], path)
        bias = _half(tensors["output.bias"], path) if "output.bias" in tensors else None
        return weight, bias, name == HEADS[1], _named(reader, len(weight))


def _half(tensor: Any, path: Path) -> Tensor:
    """A tensor's values in float16, or bfloat16 where float16 overflows."""
    from gguf.quants import dequantize

    shape = [int(n) for n in reversed(tensor.shape)]
    data = tensor.data if len(shape) > 1 else tensor.data[None]
    for dtype in (torch.float16, torch.bfloat16):
        out = torch.empty(len(data), shape[-1], dtype=dtype)
        for first in range(0, len(data), BLOCK):
            values = torch.from_numpy(dequantize(data[first : first + BLOCK], tensor.tensor_type))
            if dtype == torch.float16 and float(values.abs().amax()) > torch.finfo(dtype).max:
                break
            out[first : first + BLOCK] = values
        else:
            return out.view(shape)
    raise CheckpointError(f"{path}: {tensor.name} has values that no 16-bit float holds, expected ones within 65,504; fetch the file again")


def _named(reader: GGUFReader, rows: int) -> int:
    """Tokens that the file names, without the unused ones at the end."""
    types = reader.fields.get("tokenizer.ggml.token_type")
    if types is None:
        return rows
    used = [i for i, t in enumerate(types.contents()) if int(t) != UNUSED]
    return used[-1] + 1 if used else rows


def load(path: Path, config: dict[str, Any]) -> PreTrainedModel:
    """The whole model in float16 (bfloat16 where float16 overflows), as it is written to a checkpoint.

    The head's rows are those of `read_head`, whatever way transformers rounds.
    """
    import transformers

    cls = getattr(transformers, families.architecture(config, path.name))
    # packed weights are slow in 16 bits, it warns; here none stays packed
    with _reading(path), without_warnings(), without_bars():
        import accelerate  # noqa: F401  # whose absence transformers reports as it does a damaged file

        for dtype in (torch.float16, torch.bfloat16):
            model: PreTrainedModel = cls.from_pretrained(path.parent, gguf_file=path.name, config=_own_config(path), dtype=dtype)
            if all(bool(torch.isfinite(p).all()) for p in model.parameters()):
                break
    weight, bias, _, _ = read_head(path)
    head = model.get_output_embeddings()
    head.weight.data = weight  # its own dtype, even where the body needs the other one; a tied embedding is the same parameter
    if bias is not None:
        head.bias.data = bias
    # nothing is quantised any more: transformers would refuse to save it
    model.hf_quantizer = None  # type: ignore[assignment]
    for owner in (model, model.config):
        if hasattr(owner, "quantization_config"):
            del owner.quantization_config
    model.config.architectures = [cls.__name__]
    return model.eval()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The file's tokenizer, with the digit splitting that transformers' loader drops."""
    from transformers import AutoTokenizer

    with _reading(path):
        kind = _reader(path).fields.get("tokenizer.ggml.pre")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if kind is not None and kind.contents() in DIGITS:
        split_digits(tokenizer)
    return tokenizer


def split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Split digits one by one before the byte-level step, where that is not done yet."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if "Digits" not in str(backend.pre_tokenizer):
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
