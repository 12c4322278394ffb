"""What `bench.vllm` does inside vLLM's worker: switches the head, marks the parts of a step in a trace, counts. Mixed into its class by vLLM itself."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashhead_edge.bench.head import Subject, find_crossover, with_shares
from flashhead_edge.bench.vllm import MARK
from flashhead_edge.caps import with_gates
from flashhead_edge.cases import FEW_CODES, PUBLISHED_CLUSTER_SIZE, PUBLISHED_PROBES, Case, made_index
from flashhead_edge.errors import SettingsError
from flashhead_edge.integrations.vllm.method import FlashHeadMethod, by_kernel, find_head, tokens_by_kernel
from flashhead_edge.kernels.crossover import KINDS
from flashhead_edge.kernels.head import cuda_head

FITTED = 64  # states that set the margins of a made head


class Marks:
    """Spans: in a profile, or by the host's clock, or nothing."""

    on = False  # in a profile
    timing = False  # by the host's clock

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def around(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work, updated=())
        def marked(*args: Any, **options: Any) -> Any:
            if self.on:
                with torch.profiler.record_function(MARK + name):
                    return work(*args, **options)
            began = time.perf_counter()
            result = work(*args, **options)
            if self.timing:
                self.seconds.setdefault(name, []).append(time.perf_counter() - began)
            return result

        return marked


class Marked:
    """An object whose calls are marked, itself in all else."""

    def __init__(self, inner: Any, call: Callable[..., Any]) -> None:
        self._inner, self._call = inner, call

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._call(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class BenchWorker:
    """Methods that `LLM.collective_rpc` calls, in the order in which they stand here."""

    model_runner: Any

    def bench_capture(self) -> dict[str, Any]:
        """Keep the hidden states that reach the head from now on; dense meanwhile. Norms of dummy weights become those of a fresh model."""
        model = self.model_runner.get_model()
        for module in model.modules():
            if type(module).__name__ == "RMSNorm":  # Gemma's adds 1 to its weights
                module.weight.data.fill_(1)
        layer = find_head(model)
        if layer is None or not isinstance(layer.quant_method, FlashHeadMethod):
            raise SettingsError(f"bench vllm: the head of {type(model).__name__} is not FlashHead's, expected an active plugin; name a FlashHead checkpoint")
        self.bench_layer, self.bench_marks = layer, Marks()
        self.bench_states: list[Tensor] = []
        method, runner = layer.quant_method, self.model_runner
        method.dense_from = method.tokens_dense_from = None

        def capture(x: Tensor) -> Tensor:
            self.bench_states.append(x.detach().clone())
            return method.dense.apply(layer, x)

        method.logits, method.tokens = capture, None
        runner.execute_model = self.bench_marks.around("step", runner.execute_model)
        runner.sampler = Marked(runner.sampler, self.bench_marks.around("sampler", runner.sampler))
        weight = layer.weight
        about = {"runner": "v2" if ".gpu.model_runner" in type(runner).__module__ else "v1", "device": torch.cuda.get_device_name()}
        return about | {"shape": [method.index.vocab_size, weight.shape[1]], "dtype": str(weight.dtype).removeprefix("torch.")}

    def bench_prepare(self) -> dict[str, int | None]:
        """Build the heads over the loaded rows, with margins that open as many clusters as a real one's; the batches from which on dense is faster."""
        layer, method = self.bench_layer, self.bench_layer.quant_method
        weight, index, states = layer.weight, method.index, torch.cat(self.bench_states)
        v, d = index.vocab_size, index.hidden_size
        totals = {name: torch.zeros(4, dtype=torch.int64, device=weight.device) for name in ("published", "flash")}
        index = with_shares(index, weight[:v], states[:: max(1, len(states) // FITTED)], FEW_CODES.mean)
        published = made_index(Case("published", v, d, PUBLISHED_CLUSTER_SIZE, (), "float16", (math.inf,), (1.0,), always=0, state_power=0.0))
        flash = cuda_head(index, weight)
        subject = Subject("", weight[:v], None, states, (), False, "")
        counts = flash.step(states[:FITTED]).counts.double().mean(0).cpu().numpy()
        self.bench_crossovers = {kind: find_crossover(flash, subject, counts, kind == "logits")[0] for kind in KINDS}
        dense, wide, least = functools.partial(method.dense.apply, layer), by_kernel(flash, len(weight), totals["flash"]), self.bench_crossovers["logits"]
        self.bench_heads: dict[str, Callable[[Tensor], Tensor]] = {
            "dense": dense,
            "published": by_kernel(cuda_head(with_gates(published, [math.inf], [PUBLISHED_PROBES]), weight), len(weight), totals["published"]),
            "flash, logits": lambda x: wide(x) if least is None or len(x) < least else dense(x),
        }
        self.bench_heads["flash"] = self.bench_heads["flash, logits"]
        self.bench_tokens, self.bench_totals = tokens_by_kernel(flash, totals["flash"]), totals
        method.tokens_dense_from = self.bench_crossovers["tokens"]
        return self.bench_crossovers

    def bench_mode(self, mode: str) -> None:
        """Which head computes the steps from now on.

        `flash` gives tokens alone where the runner takes them; both kinds of it are the dense head from their crossover on, as a server has it.
        """
        method = self.bench_layer.quant_method
        method.logits = self.bench_marks.around("head", self.bench_heads[mode])
        method.tokens = self.bench_marks.around("head", self.bench_tokens) if mode == "flash" else None

    def bench_counts(self) -> dict[str, list[int]]:
        """By head: states, clusters opened, rows scored exactly and states that a cap cut, since the start."""
        return {name: totals.tolist() for name, totals in self.bench_totals.items()}

    def bench_host(self, on: bool) -> dict[str, list[float]]:
        """Seconds of host time of each span since `on`, by name."""
        found = self.bench_marks.seconds
        self.bench_marks.timing, self.bench_marks.seconds = on, {}
        return found

    def bench_profile(self, path: str | None) -> None:
        """Begin a profile, or with a path end it and write its trace there."""
        if path is None:
            self.bench_marks.on = True
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            self.bench_profiler = torch.profiler.profile(activities=activities)
            self.bench_profiler.start()
            return
        torch.cuda.synchronize()
        self.bench_profiler.stop()
        self.bench_marks.on = False
        self.bench_profiler.export_chrome_trace(path)
