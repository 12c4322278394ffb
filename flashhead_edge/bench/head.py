"""Time one step of the output head on a GPU: dense in 16, 8 and 4 bits, the published method at 256 probes, the fitted head, and `auto`.

    flashhead bench head
    flashhead bench head --shape Llama-3.2-1B --batch 1 --batch 4 --json

Timed: steps one after the other in a CUDA graph, over copies of the head that together pass the L2 cache more than
twice, so every step reads from memory; the gap between two launches is in the figure. Each replay of the graph decodes
other states, the same in all copies: median and p99 are over these. Checked first: steps against the reference in float64,
and each batch's tokens against those of its states alone. Not timed: making the index, Python's launch outside a graph. The dense
head in 16 bits is torch's product and argmax. Without a checkpoint the heads are made, since random codes cost what real ones cost; how many
clusters open and how many rows each code scores are the means of SmolLM2-135M's evaluation by share of the vocabulary,
printed, and once more with every cap full ("at the cap"). "fitted" has few codes, as `--device h100` chooses them, "fitted,
fewest bytes" the codes that read least. With a checkpoint they are its own, on hidden states of a text.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashhead_edge.bench.energy import Energy, step_energy
from flashhead_edge.bench.provenance import commit
from flashhead_edge.bench.steps import drawn
from flashhead_edge.bench.timing import REPLAYS, copy_bandwidth, graph_of, replayed, timed, timed_graph
from flashhead_edge.caps import most_counts, with_gates
from flashhead_edge.cases import (
    FEW_CODES,
    FEWEST_BYTES,
    PUBLISHED_CLUSTER_SIZE,
    PUBLISHED_PROBES,
    SHAPES,
    SHARES_SOURCE,
    Case,
    DecodeCase,
    DenseCase,
    case_of,
    made_candidates,
    made_dense,
    made_index,
    mean_counts,
)
from flashhead_edge.coding import decode as decoded
from flashhead_edge.coding import to_torch
from flashhead_edge.costs import bytes_per_step, dense_bytes
from flashhead_edge.decoding import Sampling, choose
from flashhead_edge.errors import DeviceError, SettingsError
from flashhead_edge.index import HeadIndex
from flashhead_edge.kernels.crossover import KINDS, store_crossover
from flashhead_edge.kernels.dense import CudaDense, cuda_dense
from flashhead_edge.kernels.head import MOST_ROWS, CudaHead, cuda_head
from flashhead_edge.kernels.ops import decode
from flashhead_edge.progress import Progress, silent
from flashhead_edge.reference import coordinates, probe, run_stages, state_unit, torch_head

CHECKED = 8  # states of each head that are compared with the reference before it is timed
LOGITS_WITHIN = 1e-4  # of 1 + the largest logit's size: coded scores are float32 sums of what the reference sums in float64
MOST_COPIES = 64
BATCHES = (1, 4, 16, 32)
HEADS = ("dense", "int8", "int4", "published", "flash", "auto")  # what can be timed
DENSE_RIVALS = ((8, 0), (8, 32), (4, 32), (4, 128))  # bits, columns that share a scale (0: the row)
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # batches at which the dense and the flash head are compared
CROSSOVER_REPLAYS = 30
POWERED = ("dense bf16", "dense fp16", "published", "fitted")  # two seconds each; the others' bytes and times say enough
NOT_ASKED = Energy((), None, f"asked of {', '.join(POWERED)} alone")
DRAW = DecodeCase(0.8, 50, 0.95, 0.05)  # what a draw is timed with; the number of candidates is the shape's


@dataclass(frozen=True, eq=False)
class Subject:
    """What one set of records is about."""

    name: str
    weight: Tensor  # [V or more, d]
    bias: Tensor | None
    states: Tensor  # [n, d], at least 16
    heads: Sequence[tuple[str, HeadIndex, int]]  # label, index, states that give its mean counts; the one that `auto` chooses for is named "fitted"
    real_weights: bool
    command: str
    calibration: Mapping[str, Any] = field(default_factory=dict)  # of a checkpoint: what it was held to, and what held-out text showed


def bench_shapes(shapes: Sequence[str], batches: Sequence[int], command: str, progress: Progress = silent, *, heads: Sequence[str] = ()) -> dict[str, Any]:
    """Time made heads of known shapes.

    Args:
        shapes: names in `cases.SHAPES`, none is all of them; batches: 1 to 64, none is 1, 4, 16 and 32; heads: of `HEADS`, none is all of them.
        command: the command line, for the records.
    Returns:
        One JSON document: `device`, `bandwidth` (bytes a second), `counts` (what opens, by shape, and where that comes from), `crossovers`, `records`.
    Raises:
        SettingsError: a shape is not known. DeviceError: no GPU, or a kernel disagrees with the reference.
    """
    for name in shapes:
        if name not in SHAPES:
            raise SettingsError(f"bench head: shape {name} is not known, expected one of {', '.join(SHAPES)}; name one of them")
    out = new_document()
    for name in shapes or SHAPES:
        progress(f"{name}: making heads", None)
        measure(made_subject(name, command), batches or BATCHES, heads or HEADS, out, progress)
    return out


def bench_checkpoint(
    folder: Path,
    text: str,
    batches: Sequence[int],
    command: str,
    progress: Progress = silent,
    *,
    heads: Sequence[str] = (),
    store: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Time the head of a checkpoint on hidden states of a text; with `store` keep its crossover for `cuda_head(choice="auto")`.

    Returns:
        As `bench_shapes`; with `store`, `stored` names the file.
    Raises:
        CheckpointError, SettingsError: the folder or the text cannot be read. DeviceError: as `bench_shapes`, or a code without a kernel.
    """
    from flashhead_edge.capture import capture_text, read_text
    from flashhead_edge.checkpoint import load_model, load_tokenizer, open_source, read_head, read_index

    out = new_document()
    content = read_text(text)
    progress("loading the model", None)
    source = open_source(folder, trust_remote_code=trust_remote_code)
    index = read_index(source.folder, read_head(source))
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    model: Any = load_model(source, device="cuda", trust_remote_code=trust_remote_code)
    module = model.get_output_embeddings()
    bias = getattr(module, "bias", None)
    states = capture_text(model, tokenizer, text, content, 512, progress).states
    if len(states) < 16:
        raise SettingsError(f"bench head: {text} has {len(states)} tokens, expected at least 16; give a longer text")
    weight = module.weight.detach()
    subject = Subject(
        source.name, weight, None if bias is None else bias.detach(), states.to("cuda", weight.dtype), [("fitted", index, len(states))], True, command,
        {"target_agreement": index.summary.get("target_agreement"), "agreement": index.summary.get("top1_agreement")},
    )  # fmt: skip
    measure(subject, batches or BATCHES, heads or HEADS, out, progress)
    if store:
        dtype = str(weight.dtype).removeprefix("torch.")
        found = out["crossovers"][-1]
        crossovers, measured = ({kind: one[what] for kind, one in found["kinds"].items()} for what in ("crossover", "measured"))
        out["stored"] = str(store_crossover(torch.cuda.get_device_name(), index, dtype, crossovers, measured, command))
    return out


def new_document() -> dict[str, Any]:
    """The device and its bandwidth, and room for the rest.

    Raises:
        DeviceError: there is no NVIDIA GPU.
    """
    if not torch.cuda.is_available():
        raise DeviceError("bench head: no NVIDIA GPU was found, expected one that torch can use; run it on a machine with a GPU")
    return {"device": torch.cuda.get_device_name(), "bandwidth": copy_bandwidth(), "counts": [], "crossovers": [], "records": []}


def with_shares(index: HeadIndex, weight: Tensor, states: Tensor, shares: Sequence[float], caps: Sequence[int] | None = None) -> HeadIndex:
    """The index with margins such that `states` open and keep these shares of the vocabulary on the average, before any cap.

    Args:
        shares: one a gate; 0 is a margin of 0, infinity an infinite one.
        caps: set afterwards, one a gate; None keeps those of the index.
    """
    gates = [index.probe, *(s.gate for s in index.stages)]
    open_caps, margins = [len(g.error) for g in gates], [0.0] * len(gates)
    for i, share in enumerate(shares):
        if not 0 < share < math.inf:
            margins[i] = share
            continue
        trial = [*margins[:i], math.inf, *[0.0] * (len(gates) - i - 1)]
        head = torch_head(with_gates(index, trial, open_caps), weight)
        if i == 0:
            z = coordinates(head, states)
            scores = probe(head, z)
            gap = (scores.amax(1, keepdim=True) - scores) / (head.probe.error * state_unit(head, z))
            wanted = share * index.vocab_size / index.cluster_size
        else:
            gap = _stage_gaps(index, margins, open_caps, weight, states, i)
            wanted = share * index.vocab_size
        total = gap.flatten()
        total = total[total.isfinite()].sort().values
        margins[i] = float(total[min(len(total) - 1, max(0, round(wanted * len(states)) - 1))]) * (1 + 1e-6)
    return with_gates(index, margins, list(caps) if caps is not None else [g.cap for g in gates])


def _stage_gaps(index: HeadIndex, margins: Sequence[float], caps: Sequence[int], weight: Tensor, states: Tensor, i: int) -> Tensor:
    """Gaps in own errors of the slots that code `i` (from 1) scores, one state after the other."""
    first = dataclasses.replace(with_gates(index, margins, caps), stages=index.stages[:i])
    first = with_gates(first, [*margins[:i], math.inf], caps[: i + 1])
    head = torch_head(first, weight)
    trail = run_stages(head, states)
    row, slot, score = trail.row[trail.exact], trail.slot[trail.exact], trail.score[trail.exact]
    best = score.new_full((len(states),), -math.inf).scatter_reduce(0, row, score, "amax")
    unit = state_unit(head, coordinates(head, states))[:, 0]
    return (best[row] - score) / (head.stages[-1][1].error[slot] * unit[row])


def check_head(head: CudaHead, states: Tensor) -> np.ndarray:
    """Counts of steps [N, 2 + stages], after each was compared with the reference: tokens, counts, and where these are equal the candidates.

    Raises:
        DeviceError: a token, a count or a set of candidates is not the reference's.
    """
    want, found = torch_head(head.index, head.weight, head.bias).step(states), head.step(states)
    wrong = int((want.token != found.token).sum())
    if wrong:
        raise DeviceError(f"head_step: {wrong} of {len(states)} tokens are not the reference's, expected none; do not use this kernel")
    # an item within rounding of a margin may fall on the other side
    off = float(((want.counts - found.counts).abs() / want.counts.clamp(min=100)).max())
    if off > 0.02:
        raise DeviceError(f"head_step: counts differ from the reference's by {off:.1%}, expected rounding at margins alone; do not use this kernel")
    same = (want.counts == found.counts).all(1)
    width = max(want.ids.shape[1], found.ids.shape[1])
    ids = [torch.nn.functional.pad(s.ids, (0, width - s.ids.shape[1]), value=-1)[same] for s in (want, found)]
    wrong = int((ids[0] != ids[1]).any(1).sum())
    if wrong > 1:  # of a hundred states one has two items that change places at a threshold
        raise DeviceError(f"head_step: candidates of {wrong} of {len(states)} states are not the reference's, expected all; do not use this kernel")
    return found.counts.cpu().numpy()


def check_batch(head: CudaHead, states: Tensor) -> None:
    """Raise DeviceError where a state's token is another one among others than alone."""
    alone = torch.cat([head.token(state) for state in states.split(1)])
    wrong = int((head.token(states) != alone).sum())
    if wrong:
        raise DeviceError(f"head_step: {wrong} of {len(states)} tokens are others in a batch than alone, expected none; do not use this kernel")


def copies_of(bytes_read: float) -> int:
    """Copies of a head that together pass the L2 cache more than twice."""
    size = torch.cuda.get_device_properties(0).L2_cache_size
    return min(MOST_COPIES, max(2, math.ceil(2.2 * size / bytes_read)))


def twin(head: CudaHead) -> CudaHead:
    """The same head in other memory, the matrix too: copies that decode one state read the same rows."""
    return dataclasses.replace(head, weight=head.weight.clone(), image=head.image.clone(), workspace=torch.zeros_like(head.workspace))


Step = Callable[[Tensor], object]


def times_of(steps: Sequence[Step], states: Tensor, batch: int, replays: int = REPLAYS) -> np.ndarray:
    """Microseconds of a step over hidden states [n, d], `batch` of them a step; replay after replay the next ones."""
    bound, refill = _over(steps, states, batch)
    return timed(bound, replays, refill)


def times_and_power(steps: Sequence[Step], states: Tensor, batch: int, head: str) -> tuple[np.ndarray, Energy]:
    """The same times, and what a step draws, of `POWERED` heads."""
    bound, refill = _over(steps, states, batch)
    graph, count = graph_of(bound)
    times = timed_graph(graph, count, REPLAYS, refill)
    return times, step_energy(functools.partial(replayed, graph, count)) if head in POWERED else NOT_ASKED


def _over(steps: Sequence[Step], states: Tensor, batch: int) -> tuple[list[Callable[[], object]], Callable[[int], object]]:
    """Steps over one place for their states, and what puts the next states there."""
    hidden = states.new_empty(batch, states.shape[1])
    every = torch.arange(batch, device=states.device)

    def refill(i: int) -> None:
        torch.index_select(states, 0, (i * batch + every) % len(states), out=hidden)

    refill(0)
    return [functools.partial(step, hidden) for step in steps], refill


def steps_of(head: CudaHead, bytes_read: float, work: Callable[[CudaHead, Tensor], object] = CudaHead.token) -> list[Step]:
    """One step for each copy of a head of which a step reads so many bytes."""
    return [functools.partial(work, twin(head)) for _ in range(copies_of(bytes_read))]


def dense_steps(subject: Subject, vocab_size: int, logits: bool = False) -> list[Step]:
    """The dense head over copies of its matrix: torch's product in the rows' own precision, and its argmax unless `logits` are all that is wanted."""
    first, bias = subject.weight[:vocab_size], None if subject.bias is None else subject.bias[:vocab_size]
    weights = [first, *(first.clone() for _ in range(copies_of(first.numel() * first.element_size()) - 1))]

    def product(weight: Tensor, h: Tensor) -> Tensor:
        found = h @ weight.T if bias is None else torch.addmm(bias, h, weight.T)
        return found if logits else found.argmax(1)

    return [functools.partial(product, weight) for weight in weights]


def coded_steps(head: CudaDense) -> list[Step]:
    """One step for each copy of a dense head in whole numbers."""
    return [
        dataclasses.replace(head, codes=head.codes.clone(), scales=head.scales.clone(), workspace=head.workspace.clone()).token
        for _ in range(copies_of(head.bytes_per_step))
    ]


def step_bytes(index: HeadIndex, counts: np.ndarray, batch: int) -> float:
    """Bytes that a step of a batch reads at these counts of a state: what all states share once, the rest for each."""
    d = index.hidden_size
    one, fixed = (float(bytes_per_step(index, np.round(c)[None].astype(np.int64), 2 * d)[0]) for c in (counts, np.zeros_like(counts)))
    return fixed + batch * (one - fixed)


def find_crossover(head: CudaHead, subject: Subject, counts: np.ndarray, logits: bool = False) -> tuple[int | None, list[dict[str, Any]]]:
    """The smallest batch at which the dense head is faster than the flash head, and what was measured: of greedy tokens, or of full-width logits.

    Upwards over LADDER until the dense head is faster, then by halves down to one batch; None where it never is.
    """
    measured: list[dict[str, Any]] = []

    def dense_wins(batch: int) -> bool:
        read = step_bytes(head.index, counts, batch)
        steps = dense_steps(subject, head.index.vocab_size, logits), steps_of(head, read, CudaHead.wide_logits if logits else CudaHead.token)
        dense, flash = (float(np.median(times_of(s, subject.states, batch, CROSSOVER_REPLAYS))) for s in steps)
        measured.append({"batch": batch, "dense": dense, "flash": flash})
        return flash > dense

    below, found = 0, None
    for batch in LADDER:
        if dense_wins(batch):
            found = batch
            break
        below = batch
    while found is not None and found - below > 1:
        middle = (below + found) // 2
        below, found = (below, middle) if dense_wins(middle) else (middle, found)
    return found, measured


def check_dense(head: CudaDense, values: Tensor, states: Tensor) -> None:
    """Compare tokens with float64 wherever the best logits lie further apart than float32 sums may be wrong.

    Args:
        values: [V, d] the decoded rows.
    Raises:
        DeviceError: a token differs.
    """
    want, size = states.double() @ values.double().T, states.double().abs() @ values.double().abs().T
    best = want.topk(min(2, want.shape[1]), dim=1)
    clear = best.values[:, 0] - best.values[:, -1] > 2 * (values.shape[1] + 8) * 2.0**-23 * size.amax(1)
    wrong = int((head.token(states) != best.indices[:, 0])[clear].sum())
    if wrong:
        raise DeviceError(f"dense_head: {wrong} of {int(clear.sum())} tokens are not those of float64, expected none; do not use this kernel")


def made_subject(name: str, command: str, seed: int = 0) -> Subject:
    """Made heads at a known shape: published, fitted in few codes, the same with every cap full, and fitted in the fewest bytes."""
    v, d = SHAPES[name]
    generator = torch.Generator("cuda").manual_seed(seed)
    weight = torch.randn(v, d, device="cuda", dtype=torch.bfloat16, generator=generator) * 0.05
    states = torch.randn(256, d, device="cuda", dtype=torch.bfloat16, generator=generator)
    few, least = (made_index(case_of(name, settings), seed) for settings in (FEW_CODES, FEWEST_BYTES))
    caps = [few.probe.cap, *(s.gate.cap for s in few.stages)]
    fitted = [
        ("fitted", with_shares(few, weight, states[:16], FEW_CODES.mean), 16),
        ("fitted, at the cap", with_shares(few, weight, states[:16], [min(1.2 * s, 0.99) for s in FEW_CODES.caps], caps), CHECKED),
        ("fitted, fewest bytes", with_shares(least, weight, states[:16], FEWEST_BYTES.mean), 16),
    ]
    published = made_index(Case(name, v, d, PUBLISHED_CLUSTER_SIZE, (), "float16", (math.inf,), (1.0,), always=0, state_power=0.0), seed)
    published = with_gates(published, [math.inf], [PUBLISHED_PROBES])
    return Subject(name, weight, None, states, [("published", published, CHECKED), *fitted], False, command)


def measure(subject: Subject, batches: Sequence[int], heads: Sequence[str], out: dict[str, Any], progress: Progress) -> None:
    """Add the records of a subject's heads to a document; of `auto` also the crossover of the fitted head."""
    index = next(index for label, index, _ in subject.heads if label == "fitted")
    v, d, states = index.vocab_size, index.hidden_size, subject.states
    bandwidth: float = out["bandwidth"]
    records: list[dict[str, Any]] = []
    dense_name = "dense bf16" if subject.weight.dtype == torch.bfloat16 else "dense fp16"

    def record(head: str, batch: int, found: tuple[np.ndarray, Energy], bytes_read: float, counts: np.ndarray | None = None, **settings: Any) -> None:
        times, energy = found
        median, floor = float(np.median(times)), bytes_read / bandwidth * 1e6

        def over(other: str) -> float | None:
            return next((r["microseconds"] / median for r in records if r["head"] == other and r["batch"] == batch), None)

        records.append(
            {
                **{"model": subject.name, "shape": [v, d], "real_weights": subject.real_weights, "batch": batch, "context": None, "head": head},
                **{"settings": settings, "backend": "cuda", "backend_version": torch.version.cuda, "device": out["device"], "threads": None},
                **{"microseconds": median, "microseconds_p99": float(np.percentile(times, 99)), "tokens_per_second": batch / median * 1e6},
                **{"bytes_per_step": bytes_read, "bytes_per_step_p99": None, "dense_bytes_per_step": dense_bytes(v, d), "floor_microseconds": floor},
                **{"top1_agreement": None, "top1_agreement_interval": None, "speedup_over_dense": 1.0 if head == dense_name else over(dense_name)},
                **{"speedup_over_published": 1.0 if head == "published" else over("published"), "bandwidth": bandwidth},
                **{"spread": float(np.median(np.abs(times - median))), "counts": None if counts is None else [round(float(c), 1) for c in counts]},
                **drawn(energy, batch),
                **(subject.calibration if counts is not None or head == "auto" else {}),
                **{"commit": commit(), "command": subject.command},
            }
        )

    for batch in batches if "dense" in heads else ():
        progress(f"{subject.name}: {dense_name}", None)
        record(dense_name, batch, times_and_power(dense_steps(subject, v), states, batch, dense_name), dense_bytes(v, d))
    for bits, group in DENSE_RIVALS:
        if f"int{bits}" not in heads or (group and d % group):
            continue
        progress(f"{subject.name}: dense int{bits}", None)
        rows = made_dense(DenseCase(v, d, bits, group))
        coded = cuda_dense(rows)
        check_dense(coded, decoded(to_torch(rows, "cuda")), states[:CHECKED])
        for batch in batches:
            name = f"dense int{bits}, " + (f"groups of {group}" if group else "one scale a row")
            record(name, batch, times_and_power(coded_steps(coded), states, batch, name), coded.bytes_per_step * -(-batch // MOST_ROWS), codes="random")
        del coded
    for label, one, counted in subject.heads:
        if ("published" if label == "published" else "flash") not in heads and not (label == "fitted" and "auto" in heads):
            continue
        progress(f"{subject.name}: {label}", None)
        head = cuda_head(one, subject.weight, subject.bias)
        check_head(head, states[:counted])
        counts = head.step(states).counts.double().mean(0).cpu().numpy()
        for batch in batches if label == "published" or "flash" in heads else ():
            check_batch(head, states[:batch])
            read = step_bytes(one, counts, batch)
            record(label, batch, times_and_power(steps_of(head, read), states, batch, label), read, counts)
        if label == "fitted":
            out["counts"].append(expected_counts(subject, one, counts))
        if label == "fitted" and "auto" in heads:
            progress(f"{subject.name}: crossover", None)
            kinds: dict[str, dict[str, Any]] = {}
            for kind in KINDS:
                crossover, measured = find_crossover(head, subject, counts, kind == "logits")
                kinds[kind] = {"crossover": crossover, "measured": measured}
            out["crossovers"].append({"model": subject.name, "shape": [v, d], "kinds": kinds})
            auto = dataclasses.replace(head, dense_from=kinds["tokens"]["crossover"])
            for batch in batches:
                is_dense = auto.takes_dense(batch)
                read = dense_bytes(v, d) if is_dense else step_bytes(one, counts, batch)
                record("auto", batch, times_and_power(steps_of(auto, read), states, batch, "auto"), read, takes="dense" if is_dense else "flash")
        if label == "fitted" and "flash" in heads:
            time_draw(head, counts, batches, record)
            check_logits(head, states[:CHECKED])
            for batch in batches:
                read = step_bytes(one, counts, batch) + batch * 4 * v
                record(
                    "fitted, full-width logits",
                    batch,
                    times_and_power(steps_of(head, read, CudaHead.wide_logits), states, batch, "fitted, full-width logits"),
                    read,
                    counts,
                )
        del head
        torch.cuda.empty_cache()
    out["records"] += records


def expected_counts(subject: Subject, index: HeadIndex, counts: np.ndarray) -> dict[str, Any]:
    """What a step of the fitted head opens and scores: the measured mean, every cap full, and for a made head what it is made after."""
    rows: dict[str, Any] = {}
    source = f"this head on {len(subject.states)} states of the text"
    if not subject.real_weights:
        case = case_of(subject.name, FEW_CODES)
        rows = {name: mean_counts(case, shares).tolist() for name, shares in {"mean": FEW_CODES.mean, **FEW_CODES.percentiles}.items()}
        source = SHARES_SOURCE
    caps = [index.probe.cap, *(s.gate.cap for s in index.stages)]
    rows |= {"at the cap": most_counts(index, caps).tolist(), "measured mean": counts.tolist()}
    return {"model": subject.name, "source": source, "clusters": index.n_clusters, "counts": rows}


def check_logits(head: CudaHead, states: Tensor) -> None:
    """Raise DeviceError where full-width logits differ from the reference's by more than float32 sums may, in states of which both scored the same rows."""
    reference = torch_head(head.index, head.weight, head.bias)
    (want, wide), (step, logits) = reference.step_with_logits(states), head.step_with_logits(states)
    same = (want.counts == step.counts).all(1)
    worst = float(((logits - wide).abs().amax(1) / (1 + wide.abs().amax(1)))[same].max()) if bool(same.any()) else 0.0
    if not worst <= LOGITS_WITHIN:
        raise DeviceError(f"head_step: full-width logits are off by {worst:.1e} of the largest, expected at most {LOGITS_WITHIN}; do not use this kernel")


def time_draw(head: CudaHead, counts: np.ndarray, batches: Sequence[int], record: Callable[..., None]) -> None:
    """Record a seeded draw from as many candidates as a step of the fitted head has.

    Raises:
        DeviceError: a token is not that of the definition.
    """
    case = dataclasses.replace(DRAW, candidates=max(2, round(float(counts[-1]))))
    for batch in batches:
        ids, logits, _ = made_candidates(case, batch)
        floats = [torch.full((batch,), x, dtype=torch.float64, device="cuda") for x in (case.temperature, case.top_p, case.min_p)]
        whole = [torch.full((batch,), x, dtype=torch.int64, device="cuda") for x in (case.top_k, 1, 0)]
        count = torch.full((batch,), case.candidates, dtype=torch.int64, device="cuda")
        on_device = torch.from_numpy(ids).cuda(), torch.from_numpy(logits).cuda(), count

        def draw(values: Sequence[Tensor] = (*on_device, *floats, *whole)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return decode(*values, 0, head.architecture)

        sampling = Sampling(case.temperature, case.top_k, case.top_p, case.min_p, seed=1)
        wrong = int((draw()[0].cpu().numpy() != choose(ids, logits, sampling, np.zeros(batch, np.int64))).sum())
        if wrong:
            raise DeviceError(f"decode: {wrong} of {batch} tokens are not those of the definition, expected none; do not use this kernel")
        settings = {"temperature": case.temperature, "top_k": case.top_k, "top_p": case.top_p, "min_p": case.min_p, "candidates": case.candidates}
        record("draw from the candidates", batch, (timed([draw] * 20), NOT_ASKED), batch * case.candidates * 12, **settings)
