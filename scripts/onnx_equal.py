"""Is the exported head the checkpoint's? Tokens on real hidden states, against the reference over the same index.

    python scripts/onnx_equal.py CHECKPOINT OUT --text FILE [--text FILE ...] [--positions 4000] [--standard-operators]

States are those of OUT's own body at the first positions of each text. Every state is given to the head alone and in a batch
of 16: to the native one where this installation has it, unless head.onnx is asked for. A step whose token differs is listed
with how far it is from being decided otherwise: the gap between the two best exact logits, and the winner's distance from each
margin, in logits. Exit code 1 where a step differs that rounding does not explain: neither its gap nor the distance of either
token lies within what activations rounded to 1/65,024 of their largest can move a score by (Hoeffding's bound at a chance of
1e-9 over the rounding errors of independent entries).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch

from flashhead_edge.checkpoint import open_source, read_head, read_index
from flashhead_edge.coding import decode
from flashhead_edge.evaluation.run import read_text
from flashhead_edge.index import slot_of_token
from flashhead_edge.jetson.engine import open_engine
from flashhead_edge.jetson.evaluation import states_of
from flashhead_edge.jetson.onnxruntime_backend import OnnxRuntime
from flashhead_edge.reference import TorchHead, coordinates, exact_logits, probe, run_stages, state_unit, torch_head

HALF_STEP = 1 / (127 * 512)  # of the largest entry: what an entry is rounded by at most
CHANCE = 1e-9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--positions", type=int, default=4000)
    parser.add_argument("--standard-operators", action="store_true")
    a = parser.parse_args()
    weights = read_head(open_source(a.checkpoint))
    index = read_index(a.checkpoint, weights)
    head = torch_head(index, weights.weight, weights.bias)
    engine = open_engine(a.out)
    if a.standard_operators and isinstance(engine.backend, OnnxRuntime):
        engine.backend.step_part = "head"
    different = unexplained = total = batched = 0
    for text in a.text:
        ids = list(engine.tokenizer(read_text(Path(text))[0], add_special_tokens=False)["input_ids"])[: a.positions]
        states = states_of(engine, ids)
        alone = np.array([int(engine.step(states[i : i + 1]).token[0]) for i in range(len(states))])
        together = np.concatenate([engine.step(part).token for part in np.array_split(states, -(-len(states) // 16))])
        hidden = torch.from_numpy(states)
        want = torch.cat([head.step(part).token for part in hidden.split(64)]).numpy()
        total += len(states)
        batched += int((alone != together).sum())
        for i in np.flatnonzero(alone != want).tolist():
            different += 1
            near, said = explain(head, hidden[i : i + 1], int(want[i]), int(alone[i]))
            unexplained += not near
            print(f"{Path(text).name} {i}: reference {want[i]}, exported {alone[i]}; {said}; {'within rounding' if near else 'NOT EXPLAINED'}")
    which = engine.backend.about["head_operators"]
    print(f"{which}: {total:,} steps, {different} other tokens, {unexplained} of them not within rounding; {batched} differ between alone and in a batch")
    return int(unexplained + batched > 0)


def explain(head: TorchHead, hidden: torch.Tensor, one: int, other: int) -> tuple[bool, str]:
    """Whether rounding may decide a step between two tokens, and by how much each is from where it is decided."""
    index = head.index
    exact = exact_logits(head.weight, head.bias, hidden, torch.tensor([one, other]))[0].double()
    gap = abs(float(exact[0] - exact[1]))
    slots = slot_of_token(index)[[one, other]]
    z, trail = coordinates(head, hidden), run_stages(head, hidden)
    unit, moves = float(state_unit(head, z)[0, 0]), moved_by(head, hidden, z)
    clusters = probe(head, z)[0]
    distances = []
    for slot in slots.tolist():
        k = slot // index.cluster_size
        distances.append(float(head.probe.margin * head.probe.error[k] * unit - (clusters.max() - clusters[k])))
    total = clusters.repeat_interleave(index.cluster_size)
    for rows, gate in head.stages:
        total = total + z[0, : rows.columns] @ decode(rows).double().T
        best = float(total[trail.slot[trail.row == 0]].max())
        distances += [float(gate.margin * gate.error[slot] * unit - (best - total[slot])) for slot in slots.tolist()]
    nearest = min(map(abs, distances), default=math.inf)
    float32 = 1e-5 * (1 + float(exact.abs().max()))
    return gap <= float32 or nearest <= moves, f"gap {gap:.2g}, nearest margin {nearest:.2g}, rounding moves a score by up to {moves:.2g}"


def moved_by(head: TorchHead, hidden: torch.Tensor, z: torch.Tensor) -> float:
    """What rounded activations move the difference of two coded scores by, at most but for a chance of 1e-9, in logits.

    What is rounded is the state with its rows' scales before the rotation, and z with each code's steps before that code.
    """
    t, index = HALF_STEP * math.sqrt(2 * math.log(2 / CHANCE)), head.index
    most = 0.0
    if head.rotation is not None and head.mean is not None:
        scale = torch.from_numpy(index.rotation.scale[:, 0]).double()
        x = (hidden.double() - head.mean)[0] * scale
        turned = head.rotation[:, : head.centroids.shape[1] - 1] / scale[:, None] @ head.centroids.double()[:, 1:].T
        most += t * float(x.abs().max()) * float(turned.norm(dim=0).max())
    codes = [(head.centroids.double(), index.centroids)]
    codes += [(decode(rows, torch.arange(0, index.slots, 97)).double(), stage.rows) for (rows, _), stage in zip(head.stages, index.stages)]
    for values, coded in codes:
        steps = torch.ones(coded.columns) if coded.steps is None else torch.from_numpy(coded.steps)
        used = steps > 0
        zs = z[0, : coded.columns][used] * steps[used]
        most += t * float(zs.abs().max()) * float((values[:, used] / steps[used]).norm(dim=1).max())
    return 2 * most


if __name__ == "__main__":
    raise SystemExit(main())
