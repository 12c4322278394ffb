"""What the tests here share: tiny checkpoints of the families.

Their weights are random and their head's margins let everything through: FlashHead then gives the dense head's tokens.
On a GPU they are float16, Gemma's bfloat16.
"""

from __future__ import annotations

import dataclasses
import math
import socket
from pathlib import Path

VOCAB_SIZE, HIDDEN_SIZE = 1_003, 128  # not divisible by vLLM's padding of 64
COMMON = {
    **{"vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "dtype": "float32"},
}
FAMILIES = {  # transformers' model class, and what differs from COMMON
    "Llama": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "Llama, tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "Mistral": ("MistralForCausalLM", {"tie_word_embeddings": False}),
    "Qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "Qwen3 MoE": ("Qwen3MoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "tie_word_embeddings": False}),
    "Gemma 3, soft cap": ("Gemma3ForCausalLM", {"final_logit_softcapping": 20.0, "query_pre_attn_scalar": 32, "sliding_window": 64}),
    "ERNIE 4.5 MoE": (
        "Ernie4_5_MoeForCausalLM",
        {
            **{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1, "num_nextn_predict_layers": 1},
            **{"use_bias": False, "tie_word_embeddings": False, "pad_token_id": 0},
        },
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {"tie_word_embeddings": False, "num_key_value_heads": 4}),  # on newer versions by vLLM's transformers backend
    "Phi-3": ("Phi3ForCausalLM", {"tie_word_embeddings": False, "pad_token_id": 0}),
}
SPECIAL = {"<|vision_start|>": 1, "<|vision_end|>": 2, "<|image_pad|>": 3, "<|video_pad|>": 4}
VISION = {
    **{"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": HIDDEN_SIZE, "num_position_embeddings": 64},
    **{"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2},
}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4}
SEEING = {  # models that see: their class, and what their text's and their eye's configurations say beside COMMON and VISION
    "Qwen3-VL": (
        "Qwen3VLForConditionalGeneration",
        {"rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True}, "rope_theta": 10_000.0},
        {"deepstack_visual_indexes": [0]},
    ),
    "Qwen3.5": (
        "Qwen3_5ForConditionalGeneration",
        {**LINEAR, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["linear_attention", "full_attention"]},
        {},
    ),
}


GROUP = 128
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
QUANTISED = {  # what a configuration says of a quantised body
    "compressed-tensors W4A16": {
        **{"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]},
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}},
    },
    "GPTQ": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False},
    "AWQ": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "FP8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
}


def made_model(folder: Path, family: str, narrow: bool = False, scheme: str | None = None) -> Path:
    """A checkpoint of a family with a FlashHead.

    Args:
        narrow: with margins that let few through, of codes that know nothing, so that its tokens are its own.
        scheme: a name in QUANTISED, of a body whose linear layers are random codes.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    from flashhead_edge.caps import with_gates
    from flashhead_edge.cases import Case, made_index
    from flashhead_edge.checkpoint import fingerprint
    from flashhead_edge.checkpoint.assets import ASSETS, index_arrays
    from flashhead_edge.checkpoint.write import write_index

    torch.manual_seed(0)
    if family in SEEING:
        kind, changes, eye = SEEING[family]
        model_class = getattr(transformers, kind)
        ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), SPECIAL.values()))
        config = model_class.config_class(text_config={**COMMON, **changes}, vision_config={**VISION, **eye}, tie_word_embeddings=False, **ids)
    else:
        kind, changes = FAMILIES[family]
        model_class = getattr(transformers, kind)
        config = model_class.config_class(**{**COMMON, **changes})
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that the best logit leads by more than sums in another order differ
    half = None
    if scheme is not None or torch.cuda.is_available():  # the kernels read 16 bits, and vLLM refuses Gemma in float16
        half = torch.bfloat16 if "Gemma" in family else torch.float16
        model.to(half)
    model.save_pretrained(folder)
    if scheme is not None:
        quantise(folder, scheme)
    special = SPECIAL if family in SEEING else {}
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE) if i not in special.values()} | special, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=list(special))
    tokenizer.save_pretrained(folder)
    if family in SEEING:
        images = getattr(transformers, "Qwen2VLImageProcessorFast", transformers.Qwen2VLImageProcessor)(patch_size=16)  # the name of older versions
        transformers.Qwen3VLProcessor(images, tokenizer, transformers.Qwen3VLVideoProcessor()).save_pretrained(folder)
    weight = model.get_output_embeddings().weight.detach()
    index = made_index(Case("made", VOCAB_SIZE, HIDDEN_SIZE, 16, ("bits32",), "bits32", (1.0, 1.0), (1.0, 1.0)))
    gates = [index.probe, *(stage.gate for stage in index.stages)]
    index = with_gates(
        dataclasses.replace(index, fingerprint=fingerprint(weight)), [1.0, 0.5] if narrow else [math.inf] * 2, [len(gate.error) for gate in gates]
    )
    config = model.config.to_dict() | {"architectures": [f"FlashHead{kind}"], "flash_head_cache_dir": ASSETS}
    if half is not None:
        config["dtype"] = str(half).removeprefix("torch.")
    if scheme is not None:
        config["quantization_config"] = QUANTISED[scheme]
    (folder / ASSETS).mkdir()
    (folder / "config.json").unlink()
    write_index(folder, config, index, index_arrays(index))
    return folder


def quantise(folder: Path, scheme: str) -> None:
    """Give the linear layers of a saved model's body random codes of a scheme."""
    import torch
    from safetensors.torch import load_file, save_file

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)

    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        n, k = weight.shape if weight.ndim == 2 else (0, 0)
        layer = name.removesuffix("weight")
        if "_proj." not in name:
            tensors[name] = weight
        elif scheme == "FP8":
            tensors |= {name: weight.to(torch.float8_e4m3fn), f"{layer}weight_scale": torch.tensor(1.0)}
        elif scheme == "compressed-tensors W4A16":
            scales = torch.full((n, k // GROUP), 0.02, dtype=torch.float16)
            tensors |= {f"{layer}weight_packed": words(n, k // 8), f"{layer}weight_scale": scales, f"{layer}weight_shape": torch.tensor([n, k])}
        else:
            scales = torch.full((k // GROUP, n), 0.02, dtype=torch.float16)
            zeros = torch.full((k // GROUP, n // 8), 0x77777777 if scheme == "GPTQ" else 0x08888888, dtype=torch.int32)
            codes = words(k // 8, n) if scheme == "GPTQ" else words(k, n // 8)
            tensors |= {f"{layer}qweight": codes, f"{layer}qzeros": zeros, f"{layer}scales": scales}
            if scheme == "GPTQ":
                tensors[f"{layer}g_idx"] = torch.arange(k, dtype=torch.int32) // GROUP
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
