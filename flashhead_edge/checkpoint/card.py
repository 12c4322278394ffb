"""The model card of a checkpoint: the contract on top, the source's own card below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashhead_edge.index import HeadIndex

MARK = "<!-- flashhead: the card of the original model follows -->"


def split_front_matter(text: str) -> tuple[str, str]:
    """A card's YAML head (with its lines of dashes; empty where there is none) and the rest."""
    lines = text.splitlines(keepends=True)
    if lines and lines[0].strip() == "---":
        for i, line in enumerate(lines[1:], 1):
            if line.strip() == "---":
                return "".join(lines[: i + 1]), "".join(lines[i + 1 :])
    return "", text


def source_card(text: str) -> str:
    """The original model's card in `text`, which may be one that we wrote."""
    front, rest = split_front_matter(text)  # the head stays: it is the original's, or what we put where there was none
    return front + rest.split(MARK, 1)[1].lstrip("\n") if MARK in rest else text


def build_card(name: str, index: HeadIndex, original: str, contract: str | None = None) -> str:
    """README.md of a checkpoint.

    Args:
        name: of the source model.
        original: its card, or an empty text.
        contract: our part, where the caller wrote it; else it is made from `index.summary`.
    """
    front, rest = split_front_matter(original)
    if not front:
        base = f"base_model: {name}\n" if name.count("/") == 1 else ""
        front = f"---\n{base}tags:\n- flashhead\n---\n"
    ours = contract if contract is not None else _contract(name, index)
    below = f"\n{rest.lstrip()}" if rest.strip() else ""
    return f"{front}\n{ours.strip()}\n\n{MARK}\n{below}"


def _share(value: Any) -> str:
    return f"{100 * float(value):.2f} %"


def _contract(name: str, index: HeadIndex) -> str:
    """What the checkpoint promises, from the calibration's summary: keys that are absent leave their line out."""
    s: Mapping[str, Any] = index.summary
    lines = [f"# {name} with a FlashHead", "", "The model's own weights, and an index that finds the next token without reading the whole output head.", ""]
    lines += ["## Contract", ""]
    if "target_agreement" in s:
        lines.append(f"- Target: the dense head's greedy token at {_share(s['target_agreement'])} of the steps.")
    if s.get("reached") is False:
        lines.append("- **The target was not reached**: these are the best settings found, see the texts below.")
    if s.get("extrapolated"):
        lines.append(f"- Extrapolated, set by fewer than 10 held-out misses: the margins of {', '.join(s['extrapolated'])}.")
    if "top1_agreement" in s:
        interval = s.get("top1_agreement_interval")
        about = f" (95 % interval {_share(interval[0])} to {_share(interval[1])})" if interval else ""
        measured = [t for t in s.get("texts") or [] if isinstance(t, Mapping) and "top1_agreement" in t]
        worst = min(measured, key=lambda t: t["top1_agreement"], default=None)
        found = worst or s
        at = f" over {int(found['positions']):,} positions" if "positions" in found else ""
        at += f" of {worst['name']}" if worst else ""
        lines.append(f"- Measured agreement on held-out positions of the calibration: {_share(s['top1_agreement'])}{about}{at}.")
    else:
        lines.append("- Agreement with the dense head was not measured: run `flashhead calibrate` or `flashhead evaluate`.")
    if "bytes_per_step" in s and "dense_bytes_per_step" in s:
        share = s["bytes_per_step"] / s["dense_bytes_per_step"]
        lines.append(f"- Bytes read per step: {s['bytes_per_step'] / 1e6:.2f} MB, {_share(share)} of the dense head in 16 bits.")
    if "most_bytes_per_step" in s:
        lines.append(f"- No step reads more than {s['most_bytes_per_step'] / 1e6:.2f} MB.")
    texts = s.get("texts") or []
    if texts:
        lines += ["- Calibrated on:"] + [f"  - {_text(t)}" for t in texts]
    size = f"{index.vocab_size:,} tokens in {index.n_clusters:,} clusters of {index.cluster_size}, hidden size {index.hidden_size:,}"
    lines += [
        f"- Head: {s.get('head', 'fitted')}, {size}.",
        f"- Made for the head weights `{index.fingerprint}`.",
        "",
        "## Use",
        "",
        "```",
        "pip install 'flashhead-edge[torch]'",
        'flashhead generate FOLDER --prompt "Hello"',
        "flashhead evaluate FOLDER --text FILE",
        "```",
        "",
        "```python",
        "import flashhead_edge",
        "from flashhead_edge.checkpoint import load_model",
        "",
        "model = load_model(FOLDER)",
        "flashhead_edge.load_head(FOLDER).attach(model)",
        "```",
    ]
    return "\n".join(lines)


def _text(text: Any) -> str:
    if not isinstance(text, Mapping):
        return str(text)
    parts = [str(text.get("name", "text"))]
    if "positions" in text:
        parts.append(f"{int(text['positions']):,} positions")
    if "top1_agreement" in text:
        parts.append(f"agreement {_share(text['top1_agreement'])}")
    if "sha256" in text:
        parts.append(f"SHA-256 of its tokens `{text['sha256']}...`")
    return ", ".join(parts)
