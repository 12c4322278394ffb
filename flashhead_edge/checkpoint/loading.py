"""A model in memory, from any source and from FlashHead checkpoints: through transformers."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashhead_edge.checkpoint import families
from flashhead_edge.checkpoint.quiet import without_bars
from flashhead_edge.checkpoint.source import CODES_KEY, Source, open_source
from flashhead_edge.errors import CheckpointError, SettingsError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)
NOT_STORED = ("zero_point", "qzeros", "g_idx")  # a symmetric scheme, or one in the order of columns, has none
OURS = ("flash_head", CODES_KEY, "flashhead_quantize", "flash_head_cache_dir", "flash_head_special_token_ids", "n_clusters", "n_probes")


def chosen_device(named: str | None) -> str:
    """Where a model runs: as named, else the GPU if there is one."""
    import torch

    return named or ("cuda" if torch.cuda.is_available() else "cpu")


def check_device(device: str | torch.device) -> None:
    """Raise SettingsError where torch cannot compute on `device`."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        some = "cpu, cuda" if torch.cuda.is_available() else "cpu (torch sees no GPU: flashhead doctor says why)"
        raise SettingsError(f"device {device}: torch cannot use it, expected one of {some}; leave --torch-device out for the default") from error


def load_model(
    source: Source | str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a model in evaluation mode; of a FlashHead checkpoint, the model with its dense head.

    A quantised body goes through transformers' own quantiser where that runs, else it is turned into floats (and
    the log says so). The head's weights are those of `read_head`, exactly.

    Args:
        device: where the model goes.
        dtype: of the weights, float32 unless told; one that cannot hold the stored head is refused.
        trust_remote_code: run Python code that the model brings along.
    Raises:
        CheckpointError: weights are missing or damaged.
        SettingsError: `dtype` cannot hold the head's weights.
        SettingsError: there is no such device here.
    """
    import torch

    check_device(device)
    source = open_source(source, trust_remote_code=trust_remote_code)
    dtype = torch.float32 if dtype is None else dtype
    if source.gguf is not None:
        from flashhead_edge.checkpoint import gguf

        model = gguf.load(source.gguf, source.config)
        _check_dtype(model.get_output_embeddings().weight.dtype, dtype, source.name)
        return model.to(device=device, dtype=dtype)  # type: ignore[no-any-return, call-arg]
    from flashhead_edge.checkpoint.quantised import quantisation
    from flashhead_edge.checkpoint.weights import head_entry

    name, stored, shape = head_entry(source)
    _check_dtype(stored, dtype, source.name)
    scheme = quantisation(source.config, source.folder)
    if scheme is None:
        model = _from_folder(source, dtype)
    else:
        reason = _quantiser_missing(scheme)
        if reason is None:
            model = _from_folder(source, dtype, scheme, device)
        else:
            log.warning("%s: the body is turned into floats in memory, because transformers' own quantiser does not run here: %s", source.name, reason)
            model = _from_floats(source, dtype, scheme)
    rows = model.get_output_embeddings()
    if rows is None or tuple(rows.weight.shape) != shape:
        found = "no output embeddings" if rows is None else f"output embeddings {list(rows.weight.shape)}"
        raise CheckpointError(f"{source.name}: the loaded model has {found}, expected {list(shape)} as {name}; fetch the model again")
    return model.eval() if scheme is not None and getattr(model, "hf_quantizer", None) is not None else model.to(device).eval()  # type: ignore[arg-type]


def cache_arguments(model: Any, cache: Any) -> dict[str, Any]:
    """The arguments with which `model` goes on from a cache of keys and values and adds to it.

    transformers names the argument `cache` from 5.24 on; earlier versions, and code that models bring along, `past_key_values`.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


def _check_dtype(stored: torch.dtype, dtype: torch.dtype, name: str) -> None:
    import torch

    if dtype not in (stored, torch.float32, torch.float64) or (stored == torch.float32 and dtype not in (torch.float32, torch.float64)):
        short = str(stored).removeprefix("torch."), str(dtype).removeprefix("torch.")
        raise SettingsError(
            f"{name}: the head is stored in {short[0]}, expected a dtype that holds it exactly, found {short[1]}; load the model in float32 or {short[0]}"
        )


def model_config(source: Source, scheme: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The transformers config of a source: the original class, none of our keys, quantised only as `scheme` says."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if source.trust_remote_code and "auto_map" in source.config:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=True)
        if scheme is None and hasattr(config, "quantization_config"):
            del config.quantization_config
    else:
        plain = {k: v for k, v in source.config.items() if k not in (*OURS, "auto_map", "quantization_config")}
        if scheme is not None:
            plain["quantization_config"] = scheme
        config = CONFIG_MAPPING[source.config["model_type"]].from_dict(plain)
        text = config.get_text_config()
        if scheme is None and hasattr(text, "quantization_config"):
            del text.quantization_config
    config.architectures = [families.architecture(source.config, source.name)]
    return config


def _model_class(source: Source) -> Any:
    import transformers

    if source.trust_remote_code and "auto_map" in source.config:
        return transformers.AutoModelForCausalLM
    name = families.architecture(source.config, source.name)
    cls = getattr(transformers, name, None)
    if cls is None:
        raise CheckpointError(f"{source.name}: transformers has no class {name}, expected one of its causal language models; install a newer version")
    return cls


def _from_folder(source: Source, dtype: torch.dtype, scheme: dict[str, Any] | None = None, device: Any = "cpu") -> PreTrainedModel:
    import torch
    from safetensors import SafetensorError

    remote = {"trust_remote_code": True} if source.trust_remote_code and "auto_map" in source.config else {}
    placed = {} if scheme is None else {"device_map": {"": device}}
    try:
        with without_bars():
            model, info = _model_class(source).from_pretrained(
                source.folder, config=model_config(source, scheme), dtype=dtype, use_safetensors=True, output_loading_info=True, **remote, **placed
            )
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{source.name}: transformers cannot load the model ({first_line(error)}); fetch the model again") from error
    _check_complete(info, source.name, () if scheme is None else NOT_STORED)
    if scheme is not None and scheme.get("quant_method") == "compressed-tensors":
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))  # it unpacks its weights then, and only where no forward is replaced yet
    return model  # type: ignore[no-any-return]


def _from_floats(source: Source, dtype: torch.dtype, scheme: dict[str, Any]) -> PreTrainedModel:
    """A quantised model with its weights turned into floats, tensor by tensor."""
    from safetensors import safe_open

    from flashhead_edge.checkpoint.quantised import dequantised
    from flashhead_edge.checkpoint.source import weight_map

    files = weight_map(source.folder)
    opened = {file: safe_open(str(file), framework="pt") for file in sorted(set(files.values()))}
    state = dict(dequantised(scheme, set(files), lambda name: opened[files[name]].get_tensor(name), dtype, source.name))  # type: ignore[no-untyped-call]
    try:
        with without_bars():
            model, info = _model_class(source).from_pretrained(None, config=model_config(source), state_dict=state, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{source.name}: transformers cannot load the model ({first_line(error)}); fetch the model again") from error
    _check_complete(info, source.name)
    return model  # type: ignore[no-any-return]


def _check_complete(info: dict[str, Any], name: str, spared: tuple[str, ...] = ()) -> None:
    """transformers fills what is missing with random numbers and only warns.

    Args:
        spared: endings of names that a quantiser makes itself where the file leaves them out.
    """
    for what in ("missing_keys", "mismatched_keys"):
        keys = sorted(str(k) for k in info.get(what) or () if not str(k).endswith(spared))
        if keys:
            raise CheckpointError(
                f"{name}: {len(keys)} weights are {what.removesuffix('_keys')} (first {keys[0]}), expected all of them; fetch the model again"
            )


def _quantiser_missing(scheme: dict[str, Any]) -> str | None:
    """Why transformers' own quantiser does not run here, or None where it does."""
    from transformers.quantizers.auto import AutoHfQuantizer

    groups = (scheme.get("config_groups") or {}).values() if scheme.get("quant_method") == "compressed-tensors" else ()
    if scheme.get("format") == "pack-quantized" and any((group.get("weights") or {}).get("symmetric") is False for group in groups):
        # compressed-tensors 0.20 packs zero points when it writes, and gives transformers shapes of unpacked ones when it reads
        return "compressed-tensors does not load packed zero points into a model"
    try:
        AutoHfQuantizer.from_config(dict(scheme), pre_quantized=True).validate_environment(device_map=None, weights_only=True)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        return first_line(error)
    return None
