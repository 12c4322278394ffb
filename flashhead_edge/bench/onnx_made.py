"""What `flashhead bench onnx` measures where there is no real model: made ones of known shapes, and dense heads beside any head.

A made model has a real one's shape, random weights and a head of random codes. What opens is drawn: of each state the number
of clusters, from the distribution that SmolLM2-135M's head has on five texts (`cases.BYTE_COLUMNS`, by share of the
vocabulary). The state's length is what sets it, since gaps grow with the length and margins only with its square root. The
margins of later codes then let through as many items as the same head does, on the average over the states.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_edge.bench.head import with_shares
from flashhead_edge.bench.vllm import CONFIGS as VLLM_CONFIGS
from flashhead_edge.cases import BYTE_COLUMNS, SHAPES, Case, Settings, case_of, made_index, made_states
from flashhead_edge.checkpoint.atomic import replacing
from flashhead_edge.head import Step
from flashhead_edge.index import HeadIndex
from flashhead_edge.progress import Progress, silent
from flashhead_edge.reference import coordinates, probe, state_unit, torch_head

CONFIGS = VLLM_CONFIGS | {  # transformers' configuration class, and what differs from its defaults
    "Qwen3-0.6B": ("Qwen3Config", {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072}),
}
STATES = 64  # drawn for a made head
HALVINGS = 24  # of the range of lengths: after them a length is known to a millionth
LENGTH = 16.0  # of a random state's entries: so long that the constant coordinate does not matter beside them, shortened ones' included
RANGE = 6.0  # lengths are searched from 2^-6 to 2^6 of a random state's own
DENSE_FORMS = ((8, 32), (8, 128), (4, 32))  # bits, weights that share a scale
ORT_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Made:
    """A made model on the disk."""

    export: Path  # what `flashhead export onnx` writes
    states: Path  # [n, d] float32, in numpy's format: what its head is timed on
    reference: Path  # JSON: `tokens` and `counts` of the reference's steps on them


def made_model(name: str, body: str | None = "int4", settings: Settings = BYTE_COLUMNS, progress: Progress = silent) -> Made:
    """The model of a shape of `CONFIGS`, made and exported once, then kept in the user's cache folder.

    Args:
        body: precision of its body's products; None: the head alone.
    Raises:
        ExportError: the body's builder is missing or failed. FlashHeadError: the disk is full.
    """
    config = CONFIGS[name], SHAPES[name]
    folder = cache_folder() / f"{name}-{body}-{key_of(config, body, settings)}"
    if not folder.is_dir():
        from flashhead_edge.export import export_onnx

        v, d = SHAPES[name]
        parameters = v * d * (1 if body is None else 4)  # on the disk: the matrix, and a body that is smaller; in 16 bits, then exported
        with replacing(folder.resolve(), 3 * parameters) as new:
            progress(f"{name}: making a model", None)
            checkpoint = new / "checkpoint"
            states, step = made_checkpoint(checkpoint, name, settings, body is not None)
            np.save(new / "states.npy", states)
            (new / "reference.json").write_text(json.dumps({"tokens": step.token.tolist(), "counts": step.counts.tolist()}))
            export_onnx(checkpoint, new / "export", body=body, progress=lambda text, share: progress(f"{name}: {text}", share))
            shutil.rmtree(checkpoint)
    return Made(folder / "export", folder / "states.npy", folder / "reference.json")


def cache_folder() -> Path:
    """Where made models and exports are kept: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashhead-edge" / "bench-onnx"


def key_of(*what: Any) -> str:
    """A name for what is made from `what` by the code as it is: other code or other settings make it anew."""
    import flashhead_edge.export as export
    from flashhead_edge import cases

    digest = hashlib.sha256(repr(what).encode())
    for path in sorted([*Path(export.__path__[0]).rglob("*.py"), Path(cases.__file__), Path(__file__)]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def made_checkpoint(folder: Path, name: str, settings: Settings, with_body: bool) -> tuple[np.ndarray, Step]:
    """A FlashHead checkpoint with random weights in bfloat16: states for its head [n, d], and the reference's step on them."""
    import transformers
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from flashhead_edge.checkpoint import open_source, read_head
    from flashhead_edge.checkpoint.assets import ASSETS, index_arrays
    from flashhead_edge.checkpoint.write import write_index

    kind, sizes = CONFIGS[name]
    v, d = SHAPES[name]
    common = {"vocab_size": v, "hidden_size": d, "max_position_embeddings": 4096, "tie_word_embeddings": True, "dtype": "bfloat16"}
    common |= {"bos_token_id": 1, "eos_token_id": 2}  # the builder wants an end
    config = getattr(transformers, kind)(**sizes, **common)
    config.architectures = [{"LlamaConfig": "Llama", "Qwen3Config": "Qwen3", "Gemma3TextConfig": "Gemma3"}[kind] + "ForCausalLM"]
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in getattr(transformers, config.architectures[0])(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = {n: made_tensor(s, generator) for n, s in shapes.items() if with_body or (len(s) == 2 and s[0] == v)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    del tensors
    config.save_pretrained(folder)
    # of one word: nobody reads the text, but the body's builder wants a tokenizer
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    head = read_head(open_source(folder))
    index, states, step = drawn_head(case_of(name, settings), settings, head.weight)
    document = json.loads((folder / "config.json").read_text())
    document |= {"architectures": ["FlashHead" + config.architectures[0]], "flash_head_cache_dir": ASSETS}
    (folder / "config.json").unlink()
    (folder / ASSETS).mkdir()
    index = dataclasses.replace(index, fingerprint=head.fingerprint)
    write_index(folder, document, index, index_arrays(index))
    return states, step


def made_tensor(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Weights of a fresh model: norms of one, matrices whose products keep a state's size."""
    if len(shape) < 2:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(torch.bfloat16)


def drawn_head(case: Case, settings: Settings, weight: Tensor, n: int = STATES, seed: int = 2) -> tuple[HeadIndex, np.ndarray, Step]:
    """A made head, states [n, d] whose opened clusters are drawn from the settings' distribution, and the reference's step on them."""
    v, size = case.vocab_size, case.cluster_size
    shares = drawn_shares(settings, n, seed)
    directions = LENGTH * torch.from_numpy(made_states(case, n, seed))
    weight = weight[:v]
    index = made_index(case)
    start = with_shares(index, weight, directions, settings.mean[:1])
    states = with_lengths(start, weight, directions, torch.from_numpy(shares[:, 0] * v / size))
    index = with_shares(index, weight, states, shares.mean(0).tolist())
    states = states.float()
    return index, states.numpy(), torch_head(index, weight).step(states)


def drawn_shares(settings: Settings, n: int, seed: int) -> np.ndarray:
    """What n states open and what each code keeps, as shares of the vocabulary [n, gates]: one draw from each n-th of the distribution, in random order.

    Between the percentiles that are known the share runs straight, from nothing up to the cap.
    """
    at = [0.0, *(int(name[1:]) / 100 for name in settings.percentiles), 1.0]
    known = np.array([np.zeros(len(settings.caps)), *settings.percentiles.values(), settings.caps])
    random = np.random.default_rng(seed)
    draw = random.permutation((np.arange(n) + random.random(n)) / n)
    return np.stack([np.interp(draw, at, column) for column in known.T], 1)


def with_lengths(index: HeadIndex, weight: Tensor, states: Tensor, opened: Tensor) -> Tensor:
    """The states [n, d] nearer to the index's mean or further from it, so that each opens as many clusters as `opened` [n] says, before any cap."""
    head = torch_head(index, weight)
    mean = torch.zeros(states.shape[1], dtype=torch.float64) if head.mean is None else head.mean
    away = states.double() - mean
    low = torch.full((len(states), 1), -RANGE, dtype=torch.float64)
    high = -low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        z = coordinates(head, mean + away * torch.exp2(middle))
        scores = probe(head, z)
        gap = (scores.amax(1, keepdim=True) - scores) / (head.probe.error * state_unit(head, z))
        more = (gap <= head.probe.margin).sum(1, keepdim=True) > opened[:, None]  # a longer state opens fewer
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return mean + away * torch.exp2(high)


def write_dense_heads(
    rows: Tensor, bias: np.ndarray | None, folder: Path, forms: tuple[tuple[int, int], ...] = DENSE_FORMS, fp32: bool = True
) -> dict[str, Path]:
    """ONNX Runtime's own dense heads over rows [V, d] float32: hidden_states [N, d] -> logits [N, V], both float32; files by name.

    Coded ones by ONNX Runtime's quantiser, with activations in 8 bits, as ONNX Runtime GenAI exports heads.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    module = quantiser_module()
    v, d = rows.shape
    weights = [numpy_helper.from_array(np.ascontiguousarray(rows.T.numpy()), "rows")]
    nodes = [helper.make_node("MatMul", ["hidden_states", "rows"], ["logits" if bias is None else "product"], name="head")]
    if bias is not None:
        weights.append(numpy_helper.from_array(bias[:v].astype(np.float32), "bias"))
        nodes.append(helper.make_node("Add", ["product", "bias"], ["logits"], name="bias"))
    given, out = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n])] for name, n in (("hidden_states", d), ("logits", v)))
    graph = helper.make_graph(nodes, "dense_head", given, out, weights)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(ORT_DOMAIN, 1)])

    def save(made: Any, name: str) -> Path:
        path = folder / f"{name.replace(', ', '_').replace(' ', '_')}.onnx"
        onnx.save_model(made, str(path), save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
        return path

    files = {}
    for bits, block in forms:
        coded = onnx.ModelProto()
        coded.CopyFrom(model)
        how = module.DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True, accuracy_level=4, bits=bits)
        quantiser = module.MatMulNBitsQuantizer(coded, algo_config=how)
        quantiser.process()
        name = dense_name(bits, block)
        files[name] = save(quantiser.model.model, name)
    if fp32:
        files[dense_name(32, 0)] = save(model, dense_name(32, 0))
    return files


def quantiser_module() -> Any:
    """ONNX Runtime's quantiser. Its import lets everybody's log messages through: that is taken back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    from onnxruntime.quantization import matmul_nbits_quantizer

    root.handlers[:] = handlers
    root.setLevel(level)
    return matmul_nbits_quantizer


def dense_name(bits: int, block: int) -> str:
    return f"dense int{bits}, blocks of {block}" if block else f"dense fp{bits}"


def export_rows(export: Path) -> tuple[Tensor, np.ndarray | None]:
    """The model's own rows [V or more, d] and the bias [V or more] of an export's head, float32."""
    import onnx_ir as ir

    arrays: Mapping[str, Any] = ir.load(export / "head.onnx").graph.initializers
    found = {name: arrays[f"head.{name}"].const_value.numpy() for name in ("rows", "bias") if f"head.{name}" in arrays}
    return torch.from_numpy(found["rows"].astype(np.float32)), found.get("bias")
