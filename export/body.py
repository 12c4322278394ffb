"""The decoder's body as an ONNX model: everything before the head, by ONNX Runtime GenAI's model builder.

The builder is a well-kept exporter of many families with the operators that ONNX Runtime is fast at. What it leaves
open is put right here on the graph that it returns, and each of these is checked against transformers in the tests:

* sliding windows: the builder gives Mistral and Phi-3 none;
* the epsilon of Phi's norms, which it does not find in the config, and Gemma's norms, which it rounds to 16 bits;
* layers without rotary positions: its SmolLM3 fails on them;
* Gemma's embedding scale, which it rounds to two decimals;
* the embedding, which it stores in 32 bits: here it is the checkpoint's own matrix in the checkpoint's own dtype, which
  a tied head shares;
* zero points of GPTQ checkpoints of version 2, which it reads as those of version 1;
* codes of compressed-tensors checkpoints, which it does not read (`packed`);
* the width of the cache, which its inputs leave unnamed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from flashhead_edge.checkpoint.source import INDEX, Source, open_source, weight_map
from flashhead_edge.errors import ExportError, SettingsError, UnsupportedModelError
from flashhead_edge.export.packed import packed_group, put_codes, write_floats
from flashhead_edge.export.passes.attention import LayerRule, apply_layer_rules, name_cache_width
from flashhead_edge.export.passes.embedding import embedding_tensor, share_embedding
from flashhead_edge.export.passes.lowering import remove_unused
from flashhead_edge.export.passes.products import take_back_raised_zeros
from flashhead_edge.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PRECISIONS = ("fp32", "fp16", "int8", "int4")
GROUPS = (32, 64, 128)
HEAD_WIDTH = 16  # ONNX Runtime's attention operator takes multiples of it
OPSET = 21  # the builder writes 22, whose operators of its graphs are those of 21
IR_VERSION = 10

# Families whose exported body the tests compare with transformers'.
FAMILIES = {
    "LlamaForCausalLM", "SmolLM3ForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM",
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM", "GraniteForCausalLM",
}  # fmt: skip
OWN_INTEGERS = ("gptq", "awq")  # schemes whose codes the builder takes over unchanged
PACKED = "compressed-tensors"  # one whose codes are put in after it


@dataclass(frozen=True, eq=False)
class Body:
    """A decoder's body, in the `onnxruntime` dialect."""

    model: ir.Model  # input_ids, attention_mask, past_key_values.* -> hidden_states [B, S, d] float32, present.*
    genai_config: dict[str, Any]  # genai_config.json as the builder writes it, for a model without a head
    precision: str  # of its products: fp32, fp16, int8, int4
    group: int | None  # weights that share a scale, where they are coded


def build_body(source: Source | str | Path, work: Path, *, precision: str = "int4", group: int = 32, progress: Progress = silent) -> Body:
    """Build the body of a model or of a FlashHead checkpoint.

    Args:
        source: a model folder in Hugging Face's form.
        work: an empty folder on a disk with room for the model in 32 bits (fp32, fp16) or as asked (int4, int8). The
            model's tensors are read from there, and the embedding from `source`, until the model has been saved.
        precision: of the weights of all products: fp32, fp16 (stored so, multiplied in 32 bits on a CPU: ONNX Runtime has
            no 16-bit product there), int8 or int4 (symmetric, a scale for each `group` weights, activations in 8 bits). A
            GPTQ, AWQ or compressed-tensors checkpoint keeps its own integers and groups.
        group: 32, 64 or 128.
    Raises:
        SettingsError: a precision or group that there is not.
        UnsupportedModelError: a family that has no body here.
        ExportError: the builder is not installed or failed; a size or a quantisation that ONNX Runtime's operators do not take.
    """
    if precision not in PRECISIONS or group not in GROUPS:
        raise SettingsError(
            f"a body of {precision} in groups of {group}: expected one of {', '.join(PRECISIONS)} in groups of {', '.join(map(str, GROUPS))}; choose another"
        )
    source = open_source(source)
    config = _checked_config(source)
    rules = layer_rules(config)
    scheme = _own_integers(source, precision)
    codes = None if scheme is None or scheme["quant_method"] != PACKED else scheme
    if codes is not None:
        scheme, group = None, packed_group(source, codes, precision)
    _need_builder()
    folder, out = work / "source", work / "body"
    _link_source(source, config, scheme, folder, weights=codes is None)
    if codes is not None:
        progress("body: the weights as floats", None)
        write_floats(source, codes, folder)
    options = {
        "exclude_lm_head": "true",
        "shared_embeddings": "false",
        "op_types_to_quantize": "MatMul",
        "windowed_kv_cache": "false",  # a ring for each window needs an attribute that ONNX Runtime 1.23 does not know
        "hf_token": "false",
        "accuracy_level": "4",
        "is_symmetric": "true",
        "block_size": str(group),
    }
    if scheme is None:
        options["fuse_mlp_gate_up"] = "true"
    asked = {"source": str(folder), "out": str(out), "cache": str(work / "cache"), "precision": "fp32" if precision == "fp16" else precision}
    _run_builder(asked | {"options": options}, source.name, config.num_hidden_layers, progress)
    model = ir.load(out / "model.onnx")
    model.graph.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
    apply_layer_rules(model, rules)
    name_cache_width(model, _head_width(config))
    if scheme is not None and scheme["quant_method"] == "gptq":
        take_back_raised_zeros(model, second=scheme.get("checkpoint_format") == "gptq_v2")
    if codes is not None:
        put_codes(model, source, group)
    rows, tied = embedding_tensor(source)
    share_embedding(model, rows, "head.rows" if tied else "model.embed_tokens", _embedding_scale(config))
    _type_constants(model)
    remove_unused(model)
    genai = json.loads((out / "genai_config.json").read_text(encoding="utf-8"))
    return Body(model, genai, precision, group if precision in ("int8", "int4") else None)


def _type_constants(model: ir.Model) -> None:
    """Give constants their own shape and type: the builder calls them all scalars, which strict shape inference refuses."""
    for node in model.graph:
        if node.op_type == "Constant":
            tensor = node.attributes["value"].as_tensor()
            node.outputs[0].shape, node.outputs[0].type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)


def layer_rules(config: PreTrainedConfig) -> list[LayerRule]:
    """What each layer's attention sees and whether it turns its queries and keys, as transformers' own code has it."""
    n = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * n  # a window without types is every layer's
    turned = getattr(config, "no_rope_layers", None) or [1] * n  # the list says 1 where there are rotary positions
    return [LayerRule(window if window and kind == "sliding_attention" else None, bool(rope)) for kind, rope in zip(types, turned, strict=True)]


def _embedding_scale(config: PreTrainedConfig) -> float | None:
    """The factor after the embedding where the builder's is not exact."""
    return float(config.hidden_size) ** 0.5 if str(config.model_type).startswith("gemma") else None


def _head_width(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _checked_config(source: Source) -> PreTrainedConfig:
    from flashhead_edge.checkpoint.loading import model_config

    config = model_config(source)
    family = (config.architectures or [""])[0]
    if family not in FAMILIES:
        known = ", ".join(sorted(name.removesuffix("ForCausalLM") for name in FAMILIES))
        raise UnsupportedModelError(
            f"{source.name}: {family} has no body in ONNX here, expected one of the families {known}; "
            "export the head alone (--body none), or choose another model"
        )
    if _head_width(config) % HEAD_WIDTH:
        raise ExportError(
            f"{source.name}: attention heads of {_head_width(config)} values, expected a multiple of {HEAD_WIDTH}, as ONNX Runtime's operator takes them; "
            "export the head alone (--body none), or choose another model"
        )
    scaled = [kind for kind, rope in _nested_rope(config).items() if rope.get("rope_type", "default") != "default"]
    if scaled:
        raise ExportError(
            f"{source.name}: scaled rotary positions for {', '.join(scaled)} layers, which the builder would give all layers, expected none beside those of "
            "other layers; export the head alone (--body none), or choose another model"
        )
    return config


def _nested_rope(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Rotary settings by type of layer, where a model has several."""
    settings = getattr(config, "rope_parameters", None) or {}
    return {kind: rope for kind, rope in settings.items() if isinstance(rope, dict)}


def _own_integers(source: Source, precision: str) -> dict[str, Any] | None:
    """The quantisation that a checkpoint keeps, or None where its weights are floats."""
    from flashhead_edge.checkpoint.quantised import method, quantisation

    scheme = quantisation(source.config, source.folder)
    if scheme is None:
        return None
    kind, bits = method(scheme, source.name), scheme.get("bits") or scheme.get("w_bit")
    if kind == PACKED:
        return scheme
    if kind not in OWN_INTEGERS:
        raise ExportError(
            f"{source.name}: the weights are quantised as {kind}, which ONNX Runtime GenAI's builder does not read for a CPU, expected "
            f"{', '.join((*OWN_INTEGERS, PACKED))}, or floats; export from the checkpoint that it was quantised from"
        )
    if precision != f"int{bits}":
        raise ExportError(f"{source.name}: the weights are integers of {bits} bits, expected a body of int{bits}, found {precision}; pass --body int{bits}")
    if scheme.get("desc_act") and not scheme.get("sym", True):  # ONNX Runtime 1.32 is right where all are equal
        raise ExportError(
            f"{source.name}: GPTQ with zero points and columns in the order of activations (desc_act), which ONNX Runtime multiplies wrongly, "
            "expected a symmetric one, or columns in their own order; export the head alone (--body none), or choose another checkpoint"
        )
    return scheme


def _need_builder() -> None:
    if find_spec("onnxruntime_genai") is None or find_spec("torch") is None:
        raise ExportError(
            "the body of a decoder: onnxruntime-genai and torch are not both installed, expected both (Python 3.11 or newer), which its export needs; "
            'pip install "flashhead-edge[export]"'
        )


def _link_source(source: Source, config: PreTrainedConfig, scheme: dict[str, Any] | None, folder: Path, weights: bool = True) -> None:
    """The folder as the builder wants it: the original class and none of our keys in config.json, everything else linked, the weights too if asked."""
    folder.mkdir(parents=True)
    if scheme is not None:
        config.quantization_config = scheme
    if getattr(config, "no_rope_layers", None):
        config.no_rope_layers = [1] * config.num_hidden_layers  # put right afterwards: see `layer_rules`
    config.dtype = "float32"  # the builder adds 1 to Gemma's norms in the dtype that it loads: in 16 bits that rounds them
    config.save_pretrained(folder)
    stored = {path.name for path in weight_map(source.folder).values()} | {INDEX}
    for path in sorted(source.folder.iterdir()):
        other = path.suffix in (".json", ".jinja", ".model", ".txt") and path.name not in stored
        if path.is_file() and path.name != "config.json" and (other or (weights and path.name in stored)):
            (folder / path.name).symlink_to(path.resolve())


def _run_builder(asked: dict[str, Any], name: str, layers: int, progress: Progress) -> None:
    """Run the builder in a process of its own.

    Raises:
        ExportError: it failed; its last line says why.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "flashhead_edge.export.run_builder", json.dumps(asked)]
    last: deque[str] = deque(maxlen=40)
    progress("body: loading the model", 0.0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line.strip())
            at = re.match(r"Reading layer (\d+)", line)
            if at:
                progress(f"body: layer {int(at[1]) + 1} of {layers}", (int(at[1]) + 1) / (layers + 1))
    if process.returncode:
        said = next((line for line in reversed(last) if line), f"exit code {process.returncode}")
        raise ExportError(
            f"{name}: the model builder of onnxruntime-genai {version('onnxruntime-genai')} failed ({said}), expected a model that it can build; "
            "install another version, or export the head alone (--body none)"
        )
