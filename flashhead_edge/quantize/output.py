"""What stands beside the quantised layers: the other weights, the settings, the model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flashhead_edge.checkpoint import Source
from flashhead_edge.checkpoint.assets import to_json
from flashhead_edge.checkpoint.atomic import copy_file, write_file
from flashhead_edge.checkpoint.card import split_front_matter
from flashhead_edge.checkpoint.shards import ShardWriter
from flashhead_edge.checkpoint.write import CARD, QUANTIZED, original_card, source_files
from flashhead_edge.quantize.walk import Weights


def scheme(group: int, symmetric: bool, left: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` as compressed-tensors, transformers and vLLM read it."""
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": sorted({"lm_head", *left}),
    }


def write_rest(new: Path, source: Source, weights: Weights, writer: ShardWriter, done: set[str], report: dict[str, Any], left: Iterable[str]) -> None:
    """Write the tensors that are not in `done` as they are, then the source's other files, config.json and the card."""
    for name in weights.files:
        if name not in done:
            writer.add(name, weights(name))
    writer.finish()
    for file in source_files(source):
        if not file.name.endswith((".safetensors", ".safetensors.index.json")):
            target = new / file.relative_to(source.folder)
            target.parent.mkdir(exist_ok=True)
            copy_file(file, target)
    config = {k: v for k, v in source.config.items() if k != "auto_map"}
    config |= {"quantization_config": scheme(report["group"], report["symmetric"], left), QUANTIZED: report}
    write_file(new / "config.json", [to_json(config).encode()])
    write_file(new / CARD, [card(report, original_card(source.folder)).encode()])


def card(report: Mapping[str, Any], original: str) -> str:
    """README.md: what was done and what it costs, then the source's own card."""
    front, rest = split_front_matter(original)
    kind = "symmetric" if report["symmetric"] else "with zero points"
    sizes = report["bytes"]
    lines = [
        front or "---\ntags:\n- compressed-tensors\n---\n",
        f"# {report['model']} in 4 bits",
        "",
        f"W4A16: the decoder's linear layers in 4 bits, groups of {report['group']}, {kind}, in compressed-tensors' pack-quantized form; head and embedding "
        "untouched. Activation-aware scaling and clipping by `flashhead quantize`, chosen on "
        f"{report['positions']:,} positions of text that the model samples itself and of texts given for it, seed {report['seed']}.",
        "",
        f"Weights: {sizes['before'] / 1e6:,.1f} MB before, {sizes['after'] / 1e6:,.1f} MB now.",
        "",
        "| text, held out | positions | perplexity: float | round-to-nearest | here | agreement: round-to-nearest | here |",
        "|---|---|---|---|---|---|---|",
    ]
    for t in report["texts"]:
        near, ours = t["nearest"], t["ours"]
        lines.append(
            f"| {t['name']} | {t['positions']:,} | {t['float']['perplexity']:.3f} | {near['perplexity']:.3f} | {ours['perplexity']:.3f} "
            f"| {100 * near['top1_agreement']:.2f} % | {100 * ours['top1_agreement']:.2f} % |"
        )
    lines += ["", "Agreement: the dense head's greedy token, teacher-forced, is that of the model in floats.", ""]
    return "\n".join(lines) + (f"\n{rest.lstrip()}" if rest.strip() else "")
