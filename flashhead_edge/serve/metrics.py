"""Counts and times of a server, for Prometheus and for the page. What the decode thread adds is a few adds a token."""

from __future__ import annotations

import math
import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
RECENT = 2.0  # seconds over which the page's tokens a second are counted


class Metrics:
    """One server's; a registry of its own, so that two servers in a process do not meet."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("flashhead_requests", "Requests by route and status", ("route", "status"), registry=self.registry)
        self.texts = Counter("flashhead_texts", "Texts by how they ended", ("ended",), registry=self.registry)
        self.prompt_tokens = Counter("flashhead_prompt_tokens", "Tokens of prompts whose texts have begun", registry=self.registry)
        self.tokens = Counter("flashhead_generated_tokens", "Tokens generated", registry=self.registry)
        self.capped = Counter("flashhead_capped_steps", "Steps of the head at which a cap cut off items within their margin", registry=self.registry)
        self.waiting = Gauge("flashhead_texts_waiting", "Texts that wait for their turn", registry=self.registry)
        self.active = Gauge("flashhead_texts_active", "Texts being made", registry=self.registry)
        self.first_token = Histogram(
            "flashhead_time_to_first_token_seconds", "From a request's arrival to its text's first token", buckets=SECONDS, registry=self.registry
        )
        self.inter_token = Histogram("flashhead_inter_token_seconds", "Between two tokens of a text", buckets=SECONDS, registry=self.registry)
        self.power = Gauge("flashhead_board_power_watts", "Power of the board, where it can be read", registry=self.registry)
        self.temperature = Gauge("flashhead_board_temperature_celsius", "Hottest sensor, where one can be read", registry=self.registry)
        self.memory = Gauge("flashhead_resident_memory_bytes", "Memory of this process", registry=self.registry)
        Gauge("flashhead_model_info", "1, for the model that is served", ("model",), registry=self.registry).labels(model).set(1)
        self.counts = {"waiting": 0, "active": 0}  # as the page reads them
        self.look: tuple[float, dict[str, float | None]] = (-math.inf, {})  # at the board: when, and what was seen
        self.recent: deque[float] = deque(maxlen=1 << 14)

    def queue(self, waiting: int, active: int) -> None:
        """Texts that wait, and that are being made."""
        self.counts = {"waiting": waiting, "active": active}
        self.waiting.set(waiting)
        self.active.set(active)

    def first(self, seconds: float, prompt_tokens: int) -> None:
        self.first_token.observe(seconds)
        self.prompt_tokens.inc(prompt_tokens)

    def between(self, seconds: float) -> None:
        self.inter_token.observe(seconds)

    def step(self, capped: int) -> None:
        """A token, and steps of the head that met a cap on its way."""
        self.tokens.inc()
        if capped:
            self.capped.inc(capped)
        self.recent.append(time.monotonic())

    def ended(self, how: str) -> None:
        self.texts.labels(how).inc()

    def tokens_per_second(self) -> float:
        """Of all texts together, lately."""
        since = time.monotonic() - RECENT
        return sum(at > since for at in self.recent.copy()) / RECENT

    def exposition(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)
