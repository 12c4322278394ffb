"""The head's `quant_method` under FlashHead: the seam through which vLLM asks any head for logits.

vLLM's LogitsProcessor calls `lm_head.quant_method.apply(lm_head, hidden)` with the rows to sample and takes the answer
[rows, width] on: over ranks, through scale and soft-cap, to either model runner's sampler. So every feature of the sampler
works on what `apply` returns, as long as it is full-width and finite.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod, VocabParallelEmbedding

from flashhead_edge.checkpoint import read_index
from flashhead_edge.errors import SettingsError, UnsupportedModelError
from flashhead_edge.index import HeadIndex
from flashhead_edge.integrations.hf import PADDING_LOGIT, check_fits
from flashhead_edge.integrations.vllm import check_version
from flashhead_edge.integrations.vllm.files import checkpoint_folder
from flashhead_edge.integrations.vllm.metrics import publish, serve
from flashhead_edge.integrations.vllm.requests import ASKED
from flashhead_edge.integrations.vllm.settings import Settings, read_settings
from flashhead_edge.kernels.head import MOST_ROWS, CudaHead, cuda_head, logits_launcher, token_launcher
from flashhead_edge.reference import TorchHead, torch_head

COPIED_EVERY = 1.0  # seconds between copies of the counters

log = init_logger("vllm.flashhead")  # below vLLM's own logger, so that its handlers show it


def install(model: nn.Module, config: VllmConfig) -> FlashHeadMethod | None:
    """Replace the `quant_method` of a model's head, before its weights are loaded.

    None where there is none: a pipeline's other stages, a pooling model, FlashHead switched off.

    Raises:
        CheckpointError: the index is missing, damaged or made for another head.
        SettingsError: a setting of the user's that FlashHead cannot work with.
        UnsupportedModelError: the head is no plain matrix, or was not found.
    """
    settings, name = read_settings(config.additional_config), config.model_config.model
    if config.model_config.runner_type == "pooling" or not get_pp_group().is_last_rank:
        return None
    head = find_head(model)
    if head is None:
        raise UnsupportedModelError(f"{name}: no output head was found in vLLM's {type(model).__name__}, expected one; serve the original checkpoint")
    if not settings.enabled:
        log.warning("FlashHead: switched off by --additional-config, the dense head computes every step of %s", name)
        return None
    if (untried := check_version()) is not None:
        log.warning("FlashHead: %s", untried)
    wanted, given = getattr(config.model_config, "head_dtype", None), config.model_config.dtype
    if wanted is not None and wanted != given:
        raise SettingsError(f"flashhead: head_dtype is {wanted} beside a model in {given}, expected one type; leave head_dtype out or switch FlashHead off")
    if not isinstance(head.quant_method, (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)):
        found = type(head.quant_method).__name__
        raise UnsupportedModelError(f"{name}: the head's weights are packed ({found}), expected a plain matrix; convert a model whose head is not quantised")
    index = read_index(checkpoint_folder(config))
    if settings.score_all_rows:
        index = dataclasses.replace(index, probe=dataclasses.replace(index.probe, margin=math.inf, cap=index.n_clusters))
    if settings.metrics_port is not None:  # each engine of several that share the requests has a port of its own
        settings = dataclasses.replace(settings, metrics_port=settings.metrics_port + config.parallel_config.data_parallel_rank)
    method = FlashHeadMethod(head.quant_method, index, settings, name, checked=config.load_config.load_format != "dummy", engine=config.instance_id)
    head.quant_method = method
    if config.lora_config is not None:
        keep_adapters_off_the_head(model)
        log.warning("FlashHead: LoRA is on; an adapter of the output head is refused, one of the body moves hidden states that the margins were not set on")
    if config.speculative_config is not None and not config.use_v2_model_runner and settings.exact_for:
        log.warning("FlashHead: vLLM's V1 runner tells nobody of a request's constraints beside drafts: exact_for has no effect")
        method.settings = dataclasses.replace(settings, exact_for=())
    return method


def keep_adapters_off_the_head(model: nn.Module) -> None:
    """Take the head out of the modules that LoRA adapters may change: vLLM then refuses an adapter that does, by name."""
    for module in model.modules():
        names: Any = getattr(module, "embedding_modules", None) or {}
        if "lm_head" in names:
            module.embedding_modules = {k: v for k, v in names.items() if k != "lm_head"}  # type: ignore[assignment]


def find_head(model: nn.Module) -> VocabParallelEmbedding | None:
    """The module whose rows make the logits: the one `ParallelLMHead`, whatever its name, or the embedding where a tied model has no head of its own."""
    found: dict[int, VocabParallelEmbedding] = {id(module): module for module in model.modules() if isinstance(module, ParallelLMHead)}
    for owner in model.modules() if not found else ():
        if not hasattr(owner, "logits_processor"):
            continue
        head = getattr(owner, "lm_head", None)
        if head is None:
            head = getattr(getattr(owner, "model", None), "embed_tokens", None)
        if isinstance(head, VocabParallelEmbedding):
            found[id(head)] = head
    if len(found) > 1:
        raise UnsupportedModelError(f"{type(model).__name__}: {len(found)} heads were found, expected one; choose another model")
    return next(iter(found.values()), None)


class FlashHeadMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Full-width logits by a FlashHead; all else is the dense method's."""

    def __init__(self, dense: QuantizeMethodBase, index: HeadIndex, settings: Settings, name: str, checked: bool, engine: str) -> None:
        self.dense, self.index, self.settings, self.name, self.checked, self.engine = dense, index, settings, name, checked, engine
        self.logits: Callable[[Tensor], Tensor] | None = None  # of [rows, d]: [rows, width of the layer]
        self.tokens: Callable[[Tensor], Tensor] | None = None  # of [rows, d]: greedy tokens [rows]; None on a CPU
        self.dense_from: int | None = None  # batch from which on the dense head is taken; None: never
        self.tokens_dense_from: int | None = None  # likewise where greedy tokens are all that is wanted
        self.dense_states = self.exact_states = 0
        self.rows: Tensor | None = None  # the head's whole matrix [rows, d]: the layer's own, or on each of several ranks all of them gathered
        self.bias: Tensor | None = None
        self.given: Tensor | None = None  # what the model's compute_logits was called with
        self.straight = False  # what it is called with is what reaches the head
        self.reloaded = False  # weights were loaded once more, and not yet compared with the index
        self.totals = torch.zeros(4, dtype=torch.int64)  # states, clusters opened, rows scored exactly, states that a cap cut
        self.copied, self.copied_at = self.totals, 0.0  # of these on the host, and when; on a CPU they are there

    def create_weights(self, layer: Any, *args: Any, **options: Any) -> None:
        self.dense.create_weights(layer, *args, **options)

    def embedding(self, layer: Any, *args: Any, **options: Any) -> Tensor:
        return self.dense.embedding(layer, *args, **options)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        return self.dense.tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Build the head over the loaded rows: every way of loading passes here, before memory is profiled.

        A reload may pass here once more, with rows in memory of its own: vLLM copies them to where the first ones lie, over which the head is built.
        """
        self.dense.process_weights_after_loading(layer)
        if self.logits is None:
            self.build(layer)

    def check_reloaded(self, layer: Any) -> None:
        """Compare the rows with the index once more, at the first step after a reload: while it lasts they are not whole.

        Raises:
            CheckpointError: they are not the rows that the index was made for. Every later step raises it too: half of the old model lies beside the new.
        """
        weight, bias = matrix_of(layer)
        self.check(layer, weight, bias, f"{self.name}, reloaded with other weights")
        for kept, part in ((self.rows, weight), (self.bias, bias)):
            if kept is not None and part is not None and kept.data_ptr() != part.data_ptr():  # gathered from several ranks
                kept.copy_(part)
        self.reloaded = False

    def check(self, layer: Any, weight: Tensor, bias: Tensor | None, name: str) -> None:
        """Raise CheckpointError where the rows are not those that the index was made for; `name` begins its sentence."""
        rows = min(layer.org_vocab_size, len(weight))
        check_fits(self.index, weight[:rows], None if bias is None else bias[:rows], name)

    def build(self, layer: Any) -> None:
        """Check the rows against the index and put a head over them.

        Raises:
            CheckpointError: they are not the rows that the index was made for.
        """
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        weight, bias = matrix_of(layer)
        if self.checked:
            self.check(layer, weight, bias, self.name)
        self.rows, self.bias = weight, bias
        if ranks > 1:
            layer.register_buffer("flashhead_rows", weight, persistent=False)
            layer.register_buffer("flashhead_bias", bias, persistent=False)
        self.totals = self.totals.to(weight.device)
        layer.register_buffer("flashhead_totals", self.totals, persistent=False)
        if weight.device.type == "cuda":
            head = cuda_head(self.index, weight, bias, choice="auto" if self.settings.crossover == "auto" else "flash")
            layer.register_buffer("flashhead_image", head.image, persistent=False)
            layer.register_buffer("flashhead_workspace", head.workspace, persistent=False)
            self.logits, self.dense_from = by_kernel(head, len(weight), self.totals), head.logits_dense_from
            self.tokens, self.tokens_dense_from = tokens_by_kernel(head, self.totals), head.dense_from
            self.copied = torch.zeros(4, dtype=torch.int64, pin_memory=True)
        else:
            self.logits = by_reference(torch_head(self.index, weight, bias), len(weight), self.totals)
            self.copied = self.totals
        if ranks > 1:
            self.logits = columns_of(self.logits, rank * len(layer.weight), len(layer.weight))
        if isinstance(self.settings.crossover, int):
            self.dense_from = self.tokens_dense_from = self.settings.crossover
        if rank == 0:
            publish(self.seen, self.name)
            if self.settings.metrics_port is not None:
                serve(self.settings.metrics_port, self.seen, self.name)
            log.info("%s", start_line(self, weight))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits [rows, width of the layer] of hidden states [rows, d]: finite, in memory that nobody else holds; float32 where FlashHead computes them."""
        given, self.given = self.given, None
        self.straight = given is not None and given.data_ptr() == x.data_ptr() and given.shape == x.shape
        if self.logits is None:
            self.build(layer)  # a way of loading that did not pass by process_weights_after_loading: the first call is before memory is profiled
            assert self.logits is not None
        if self.reloaded:
            self.check_reloaded(layer)
        self.copy_totals()
        asked = ASKED.get(self.engine)
        if asked is not None and asked.exact:
            self.exact_states += len(x)
            return self.dense.apply(layer, x, bias)
        if self.dense_from is not None and len(x) >= self.dense_from:
            self.dense_states += len(x)
            return self.dense.apply(layer, x, bias)
        return self.logits(x)

    def takes_tokens(self, x: Tensor) -> bool:
        """Whether the step wants greedy tokens alone, of states that reach the head as they are, below the crossover: asked once a step."""
        asked = ASKED.get(self.engine)
        if asked is None or not asked.greedy or not asked.takes_tokens or self.reloaded:
            return False
        asked.greedy = False  # whoever calls next in this step, such as a draft, gets logits
        self.copy_totals()
        return self.straight and self.tokens is not None and x.ndim == 2 and (self.tokens_dense_from is None or len(x) < self.tokens_dense_from)

    def copy_totals(self) -> None:
        """Copy the counters to the host now and then, without waiting: other threads read them there."""
        now = time.monotonic()
        if self.copied is self.totals or now - self.copied_at < COPIED_EVERY or torch.cuda.is_current_stream_capturing():
            return
        self.copied.copy_(self.totals, non_blocking=True)
        self.copied_at = now

    def seen(self) -> dict[str, int]:
        """What was computed until the last copy, by the names of `metrics.NAMES`: makes no CUDA call, for other threads."""
        return self._named(self.copied)

    def counts(self) -> dict[str, int]:
        """What was computed so far, by the names of `metrics.NAMES`. Waits for the device."""
        return self._named(self.totals)

    def _named(self, totals: Tensor) -> dict[str, int]:
        states, opened, exact, capped = totals.tolist()
        return {
            **{"states_flash": states, "states_dense": self.dense_states, "states_dense_asked": self.exact_states},
            **{"clusters_opened": opened, "exact_rows": exact, "capped": capped},
        }


def whole(part: Tensor, ranks: int) -> Tensor:
    """The head's matrix or bias of which each rank has an equal part, padding last: one rank's own, or gathered from all."""
    return part if ranks == 1 else tensor_model_parallel_all_gather(part.detach(), dim=0)


def matrix_of(layer: Any) -> tuple[Tensor, Tensor | None]:
    """A head's whole matrix [rows, d] and its bias."""
    ranks, bias = get_tensor_model_parallel_world_size(), getattr(layer, "bias", None)
    return whole(layer.weight, ranks), None if bias is None else whole(bias, ranks)


def columns_of(logits: Callable[[Tensor], Tensor], start: int, count: int) -> Callable[[Tensor], Tensor]:
    """A rank's columns of full-width logits, which vLLM gathers again."""
    return lambda x: logits(x)[:, start : start + count].contiguous()


def by_kernel(head: CudaHead, width: int, totals: Tensor) -> Callable[[Tensor], Tensor]:
    """Full-width logits of any number of states on a GPU."""
    launcher = logits_launcher(head, width, totals)
    return lambda x: launcher(x) if len(x) <= MOST_ROWS else torch.cat([launcher(part) for part in x.split(MOST_ROWS)])


def tokens_by_kernel(head: CudaHead, totals: Tensor) -> Callable[[Tensor], Tensor]:
    """Greedy tokens of any number of states on a GPU."""
    launcher = token_launcher(head, totals)
    return lambda x: launcher(x) if len(x) <= MOST_ROWS else torch.cat([launcher(part) for part in x.split(MOST_ROWS)])


def by_reference(head: TorchHead, width: int, totals: Tensor) -> Callable[[Tensor], Tensor]:
    """The same by the reference, on a CPU."""

    def logits(x: Tensor) -> Tensor:
        step, wide = head.step_with_logits(x)
        totals.add_(torch.stack([torch.tensor(len(x)), step.counts[:, 0].sum(), step.counts[:, -1].sum(), step.capped.sum()]))
        return torch.nn.functional.pad(wide, (0, width - wide.shape[1]), value=PADDING_LOGIT)

    return logits


ASKED_WORDS = {"constrained": "constrain tokens", "logprobs": "ask for log-probabilities"}


def start_line(method: FlashHeadMethod, weight: Tensor) -> str:
    """What the log says at start."""
    index, settings, summary = method.index, method.settings, method.index.summary
    kinds = ", ".join(s.rows.kind for s in index.stages) or "no row codes"
    promise = "not calibrated"
    if "target_agreement" in summary and "top1_agreement" in summary:
        texts = ", ".join(text["name"] for text in summary.get("texts", ()))
        promise = f"target {summary['target_agreement']:.1%}, {summary['top1_agreement']:.2%} held out on {texts}"
    least = method.dense_from if method.tokens is None else method.tokens_dense_from
    turn = "at every batch" if least is None else f"below a batch of {least}"
    if method.tokens is not None and method.dense_from != least:
        turn += f" where tokens alone are wanted, {'at every batch' if method.dense_from is None else f'below {method.dense_from}'} where logits are"
    if least is not None and least <= 1:
        turn = "at no batch: with this crossover the dense head computes every step"
    asked = " or ".join(ASKED_WORDS[kind] for kind in settings.exact_for)
    exact = f"the dense head for requests that {asked}" if settings.exact_for else "for every request"
    slow = "; on a CPU it runs as the reference in torch, slower than the dense head: for tests" if weight.device.type == "cpu" else ""
    every = ", every row scored" if settings.score_all_rows else ""
    unchecked = "" if method.checked else "; dummy weights: whether the index fits them was not checked"
    if method.checked and not index.fingerprint:
        unchecked = "; a released checkpoint, which names no weights: whether they are those of its clusters cannot be checked"
    return (
        f"FlashHead is active on {method.name}: {index.n_clusters:,} clusters of {index.cluster_size}, centroids {index.centroids.kind}, {kinds}, "
        f"exact rows {str(weight.dtype).removeprefix('torch.')}, {promise}, "
        f"{turn}, {exact}{every}{unchecked}{slow}"
    )
