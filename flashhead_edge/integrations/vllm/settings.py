"""What a user sets: ``--additional-config '{"flashhead": {...}}'``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from flashhead_edge.errors import SettingsError

CONSTRAINED, LOGPROBS = "constrained", "logprobs"  # kinds of requests


@dataclass(frozen=True)
class Settings:
    """The plugin's settings."""

    enabled: bool = True  # False: the dense head, and the log says so
    crossover: int | str = "auto"  # batch from which on the dense head is taken; auto: as measured on this device, never: no batch
    exact_for: tuple[str, ...] = (CONSTRAINED, LOGPROBS)  # of a step with such a request the dense head computes the logits
    score_all_rows: bool = False  # every row by the row code, not only those of open clusters: nearer to dense where tokens are few or their odds matter
    metrics_port: int | None = None  # on 127.0.0.1, of the worker's own; None: no port

    def __post_init__(self) -> None:
        if not isinstance(self.enabled, bool):
            raise SettingsError(f"flashhead: enabled is {self.enabled!r}, expected true or false; change --additional-config")
        if not isinstance(self.score_all_rows, bool):
            raise SettingsError(f"flashhead: score_all_rows is {self.score_all_rows!r}, expected true or false; change --additional-config")
        number = isinstance(self.crossover, int) and not isinstance(self.crossover, bool) and self.crossover >= 1
        if not number and self.crossover not in ("auto", "never"):
            raise SettingsError(f"flashhead: crossover is {self.crossover!r}, expected auto, never or a batch from 1 on; change --additional-config")
        if not isinstance(self.exact_for, tuple) or any(name not in (CONSTRAINED, LOGPROBS) for name in self.exact_for):
            raise SettingsError(f"flashhead: exact_for is {self.exact_for!r}, expected a list of {CONSTRAINED} and {LOGPROBS}; change --additional-config")
        port = self.metrics_port
        if port is not None and (not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= 65_535):
            raise SettingsError(f"flashhead: metrics_port is {port!r}, expected 1 to 65535; change --additional-config")


def read_settings(additional: Any) -> Settings:
    """The settings in vLLM's `additional_config`.

    Raises:
        SettingsError: an unknown name, or a value out of range.
    """
    given = additional if isinstance(additional, dict) else {}
    for name in given:
        if name != "flashhead" and name.lower().replace("_", "").replace("-", "") == "flashhead":
            raise SettingsError(f"flashhead: the settings are named {name}, expected flashhead; change --additional-config")
    found = given.get("flashhead", {})
    known = [f.name for f in dataclasses.fields(Settings)]
    if not isinstance(found, dict):
        raise SettingsError(f"flashhead: the settings are {found!r}, expected an object with {', '.join(known)}; change --additional-config")
    for name in found:
        if name not in known:
            raise SettingsError(f"flashhead: the setting {name} is not known, expected one of {', '.join(known)}; change --additional-config")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return Settings(**values)
