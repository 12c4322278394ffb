"""One real vLLM engine for all tests here, in this process: on a GPU if there is one, else vLLM's build for CPUs.

The checkpoint is the folder in FLASHHEAD_CHECKPOINT, or SmolLM2-135M-Instruct converted on few positions.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that tests reach the head
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    if "FLASHHEAD_CHECKPOINT" in os.environ:
        return Path(os.environ["FLASHHEAD_CHECKPOINT"])
    model = subprocess.run([sys.executable, str(ROOT / "scripts" / "fetch_model.py")], check=True, capture_output=True, text=True).stdout.split()[-1]
    out = tmp_path_factory.mktemp("checkpoint") / "out"
    subprocess.run([sys.executable, "-m", "flashhead_edge", "convert", model, str(out), "--positions", "4000"], check=True, capture_output=True, cwd=ROOT)
    return out


@pytest.fixture(scope="session")
def engine(checkpoint):
    import torch
    from vllm import LLM

    on_gpu = torch.cuda.is_available()
    options = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2 << 30} if on_gpu else {"enforce_eager": True}
    settings = {"flashhead": {"crossover": "never"}}
    return LLM(str(checkpoint), dtype="auto" if on_gpu else "float32", max_model_len=1024, additional_config=settings, **options)


@pytest.fixture(scope="session")
def method(engine):
    """The head's `quant_method` in the engine."""
    from flashhead_edge.integrations.vllm.method import find_head

    return engine.apply_model(lambda model: find_head(model).quant_method)[0]
