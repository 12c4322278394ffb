"""GPUs by NVML (the package nvidia-ml-py), for machines whose GPU has no device files: workstations, Thor, GB10.

On Orin NVML answers "not supported", or zeros as if they were values: there the device files are read and NVML is not asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SOURCE = "NVML"


def read_gpus(unread: dict[str, str]) -> list[dict[str, object]]:
    """The GPUs, what NVML does not answer being None.

    Name, load (share), clock (MHz), temperature, power and its limit (watts), energy (joules since the driver was loaded), memory (bytes), bandwidth (GB/s).

    Args:
        unread: gets why NVML, or one of its answers, is missing.
    """
    try:
        import pynvml
    except ImportError:
        unread[SOURCE] = "nvidia-ml-py is not installed: pip install nvidia-ml-py to see other GPUs than a Jetson's"
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        unread[SOURCE] = _words(error)
        return []
    try:
        return [_gpu(pynvml, index, unread) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        unread[SOURCE] = _words(error)
        return []
    finally:
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError as error:
            unread[SOURCE] = _words(error)


def _gpu(pynvml: Any, index: int, unread: dict[str, str]) -> dict[str, object]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)

    def ask(what: str, look: Callable[[], Any]) -> Any:
        try:
            return look()
        except pynvml.NVMLError as error:
            unread[f"{SOURCE}, GPU {index}, {what}"] = _words(error)
            return None

    name = ask("name", lambda: pynvml.nvmlDeviceGetName(handle))
    memory = ask("memory", lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    load = ask("load", lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    memory_clock = ask("largest memory clock", lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM))
    bus = ask("memory bus", lambda: pynvml.nvmlDeviceGetMemoryBusWidth(handle))
    power = ask("power", lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    limit = ask("power limit", lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    energy = ask("energy", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    return {
        "name": name.decode(errors="replace") if isinstance(name, bytes) else name,
        "load": None if load is None else load / 100,
        "clock": ask("clock", lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        "most_clock": ask("largest clock", lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        "temperature": ask("temperature", lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        "power": None if power is None else power / 1000,
        "power_limit": None if limit is None else limit / 1000,
        "energy": None if energy is None else energy / 1000,
        "memory_total": memory.total if memory is not None and memory.total else None,
        "bandwidth": 2 * memory_clock * bus / 8e3 if memory_clock and bus else None,  # two transfers a clock
        "memory_free": memory.free if memory is not None and memory.total else None,
    }


def _words(error: Exception) -> str:
    return f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}"
